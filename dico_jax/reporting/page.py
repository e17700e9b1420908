"""The page of runs: one HTML file that needs no network, and has what it shows in it."""

import base64
import concurrent.futures
import datetime
import io
import json
import math
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import jinja2
import numpy as np
from bokeh import models as bk
from bokeh.document import Document
from bokeh.plotting import figure
from bokeh.resources import Resources
from PIL import Image

from dico_jax.config import DEFAULTS, flatten
from dico_jax.files import new_file, opened
from dico_jax.reporting import curves
from dico_jax.reporting.curves import Published
from dico_jax.reporting.runs import Run

# Of middling brightness: they are seen on white as on black.
COLORS = ("#2f81d8", "#e0731d", "#2c9f5b", "#c8457f", "#8d68d6", "#a07a34", "#1b98a8", "#d3463a")
_MOST_POINTS, _OF_ALL = 2_000, 8_000  # of a curve, and of one of each run
_MOST_GRIDS, _GRID_BYTES, _SIDES = 32, 1_800_000, (768, 512, 384, 256)
_QUARTERS = {
    "mse_t0_25": "mse, least noise", "mse_t25_50": "mse, second quarter",
    "mse_t50_75": "mse, third quarter", "mse_t75_100": "mse, most noise",
}  # fmt: skip
_NORMS = {"grad_norm": "gradient", "param_norm": "parameters", "update_norm": "update"}
_SPEED = {
    "images_per_second": "images per second", "mfu": "MFU", "memory_gb": "memory of a device, GB",
    "data_wait": "share of time waiting for data",
}  # fmt: skip
_PAPER: Any = {"color": "#888888", "tags": ["paper"]}
_RATE = {"learning_rate": "learning rate"}
_OTHER = {"finite", "rollbacks", "skipped_steps", "loss"}


def write_page(runs: Sequence[Run], notes: Sequence[str], out: Any) -> str:
    """Writes the page; a line that says where it is."""
    page = make_page(runs, notes).encode()
    with new_file(out) as stream:
        stream.write(page)
    return f"report of {len(runs)} run{'s' * (len(runs) > 1)} in {out} ({len(page) / 1e6:.1f} MB)"


def make_page(runs: Sequence[Run], notes: Sequence[str], live: str = "") -> str:
    """The HTML of a page; `live`: the stamp of what is served, for a page that asks for newer."""
    groups: dict[str, list[int]] = {}
    for i, run in enumerate(runs):
        groups.setdefault(curves.model_key(run.config), []).append(i)
    drawn = [_Group([(i, runs[i]) for i in of], len(runs)) for of in groups.values()]
    figures = {
        f"g{g}_{k}": fig for g, group in enumerate(drawn) for k, fig in group.figures.items()
    }
    document = Document()
    with document.models.freeze():  # or each would go through the models of all
        for fig in figures.values():
            document.add_root(fig)
    grids, left_out = _grids(runs)
    notes = [*notes, *(f"{run.name}: {note}" for run in runs for note in run.notes)]
    if len(drawn) > 1:
        what = "; ".join(f"{g.title}: {', '.join(r.name for _, r in g.runs)}" for g in drawn)
        notes.append(f"These runs are of {len(drawn)} models or objectives, whose losses do not "
                     f"compare: they are drawn apart ({what}).")  # fmt: skip
    folder = pathlib.Path(__file__).parent
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    bokeh = Resources(mode="inline", components=["bokeh"]).render_js() if figures else ""
    return environment.from_string((folder / "page.html").read_text()).render(
        runs=[_about(i, run) for i, run in enumerate(runs)], notes=notes, live=live,
        css=(folder / "page.css").read_text(), js=(folder / "page.js").read_text(),
        bokeh=bokeh, document=_json(document.to_json(deferred=False)) if figures else "",
        roots=_json({fig.id: name for name, fig in figures.items()}),
        groups=[group.shown(f"g{g}_") for g, group in enumerate(drawn)],
        grids=_json(grids), has_grids=any(grids), left_out=left_out,
        sweeps=_sweeps(runs), config=_config_rows(runs),
        environments=_environment_rows(runs), many=any(len(run.steps) > 100 for run in runs),
        events=[(run, e) for run in runs for e in sorted(run.events, key=lambda e: e.step or 0)],
        date=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    )  # fmt: skip


def _json(value: Any) -> str:
    return json.dumps(value).replace("<", "\\u003c")


def _about(i: int, run: Run) -> dict[str, Any]:
    """What the overview says of a run."""
    loss, speed = (run.values.get(n, np.zeros(0)) for n in ("loss", "images_per_second"))
    last = loss[np.isfinite(loss)][-max(1, len(loss) // 50) :]
    rest = float(run.config.get("training.num_steps") or 0) - run.last
    rate = np.nanmedian(speed[-20:]) if np.isfinite(speed[-20:]).any() else math.nan
    left = rest * run.batch_size / rate / 3600 if not run.ended and rate > 0 and rest > 0 else None
    best = [f"{n} {v[-1]:.4g} at {s[-1]:,.0f}" for n, (s, v) in run.evaluations.items()
            if re.search(r"(^|/)(fid|inception_score|agreement)$", n)]  # fmt: skip
    found, published = [], curves.published_of(run.config)
    if published:
        found = curves.compared(published, run.steps, run.values.get("loss", np.zeros(0)))
    return {
        "i": i, **_looks(i, run), "folder": str(run.folder),
        "model": curves.model_title(run.config), "state": run.state, "ended": run.ended,
        "step": f"{run.last:,.0f}",
        "images": curves.short(run.last * run.batch_size),
        "hours": f"{run.hours[-1]:.3g}" if len(run.steps) and np.isfinite(run.hours[-1]) else "-",
        "loss": f"{last.mean():.4f}" if len(last) else "-",
        "speed": "-" if math.isnan(rate) else f"{rate:,.4g}", "left": left and f"{left:.3g} h left",
        "best": best, "compared": found,
        "checkpoints": ", ".join(f"{step:,}" for step in run.checkpoints),
        "bad": run.bad[:20], "bad_count": len(run.bad),
    }  # fmt: skip


class _Group:
    """Runs whose losses compare, and their figures by name."""

    def __init__(self, runs: Sequence[tuple[int, Run]], total: int):
        self.runs, self.title = runs, curves.model_title(runs[0][1].config)
        self.published = next(filter(None, (curves.published_of(r.config) for _, r in runs)), None)
        self.range = bk.DataRange1d(range_padding=0.02)
        most = min(_MOST_POINTS, _OF_ALL // total)
        self.sources = {i: _source(run, most) for i, run in runs}
        self.merged = max((len(r.steps) / most for _, r in runs), default=0)
        keys = {key: None for _, run in runs for key in run.values}
        known = {*_QUARTERS, *_NORMS, *_SPEED, *_RATE, *_OTHER}
        terms = {"term": {k: k for k in keys if k not in known}, "norm": _NORMS, "speed": _SPEED}
        self.figures = {"loss": self._curve("loss", "loss", tall=True)} if "loss" in keys else {}
        for kind, of in {"quarter": _QUARTERS, **terms, "rate": _RATE}.items():
            self.figures |= {f"{kind}_{k}": self._curve(k, t) for k, t in of.items() if k in keys}
        names = dict.fromkeys(n for _, run in runs for n in run.evaluations)
        for name in names:
            if not name.endswith(("num_samples", "bad_pictures", "_std")):
                self.figures[f"eval_{name}"] = self._evaluation(name)
        if any(run.events for _, run in runs):
            self.figures["events"] = self._events()

    def shown(self, prefix: str) -> dict[str, Any]:
        """The parts of its section: headings, explanations and figures."""
        parts = []
        for kind, title in (
            ("loss", "Loss"), ("quarter", "Loss by timestep quarter"), ("term", "Loss terms"),
            ("eval", "Evaluation"), ("norm", "Norms"), ("speed", "Speed, memory, data"),
            ("rate", "Learning rate"), ("events", "What happened"),
        ):  # fmt: skip
            found = [(fig.title.text, prefix + k) for k, fig in self.figures.items()
                     if k.split("_")[0] == kind]  # fmt: skip
            if found:
                parts.append({"kind": kind, "title": title, "figures": found})
        more = self.merged > 1 and f"A point is the mean of about {self.merged:.0f} logged steps."
        return {
            "title": self.title, "parts": parts, "merged": more, "published": self.published,
            "names": [run.name for _, run in self.runs],
        }  # fmt: skip

    def _figure(self, title: str, tall: bool = False, **more: Any) -> Any:
        fig = figure(
            title=title, height=380 if tall else 230, sizing_mode="stretch_width",
            x_range=self.range, x_axis_label="steps", tools="pan,wheel_zoom,reset",
            active_drag=None, active_scroll=None, toolbar_location="above" if tall else "right",
            background_fill_color=None, border_fill_color=None, outline_line_color=None,
            output_backend="canvas", **more,
        )  # fmt: skip
        fig.add_tools(bk.BoxZoomTool(description="box zoom"))
        fig.toolbar.logo, fig.toolbar.autohide = None, False
        fig.xaxis.formatter = bk.NumeralTickFormatter(format="0.[0]a")
        fig.xaxis.ticker = bk.BasicTicker(desired_num_ticks=5)
        fig.grid.grid_line_color, fig.grid.grid_line_alpha = "#888888", 0.25
        return fig

    def _hover(self, fig: Any, renderers: list[Any], rows: list[tuple[str, str]]) -> None:
        more = [("run", "$name"), ("step", "@step{0,0}"), *rows]
        fig.add_tools(bk.HoverTool(renderers=renderers, tooltips=more, mode="mouse"))

    def _curve(self, key: str, title: str, tall: bool = False) -> Any:
        fig, hovered = self._figure(title, tall), []
        if key == "loss" and self.published and self.published.losses:
            self._landmarks(fig, self.published)
        for i, run in self.runs:
            source, raw = self.sources[i], ["raw", "run", i]
            if key not in source.data:
                continue
            how = _looks(i, run) | {"source": source}
            if f"{key}_least" in source.data:
                ends = {"y1": f"{key}_least", "y2": f"{key}_most"}
                _add(fig, bk.VArea, tags=raw, alpha=0.16, **ends, **how)
            _add(fig, bk.Line, tags=raw, alpha=0.4, y=key, **how)
            smooth = ["smooth", "run", i, key]
            hovered.append(_add(fig, bk.Line, tags=smooth, y=key, line_width=2, **how))
        means = [self.sources[i].data[key] for i, _ in self.runs if key in self.sources[i].data]
        self._fit(fig, np.concatenate(means), tall)
        number = "0.000000" if key == "learning_rate" else "0.0000"
        self._hover(fig, hovered, [(title, f"@{{{key}}}{{{number}}}")])
        return fig

    def _fit(self, fig: Any, values: np.ndarray, tall: bool) -> None:
        values = values[np.isfinite(values)]
        if tall and len(values) and min(values) < max(values):
            # The first steps would leave no room for all that follows.
            low, high = min(values), np.quantile(values, 0.98)
            fig.y_range = bk.Range1d(low - 0.1 * (high - low), high + 0.1 * (high - low))
        elif len(values):
            fig.y_range.default_span = 0.2 * float(np.abs(values).max()) or 1.0  # of a constant

    def _landmarks(self, fig: Any, published: Published) -> None:
        first, last = min(published.losses), max(published.losses)
        steps = np.unique(np.append(np.geomspace(first, last, 60), [*published.losses]))
        line = published.loss_at(steps)
        ends = {"low": line * (1 - curves.BAND), "high": line * (1 + curves.BAND)}
        how: Any = {"source": _published(steps, loss=line, **ends), **_PAPER}
        _add(fig, bk.VArea, y1="low", y2="high", alpha=0.22, **how)
        _add(fig, bk.Line, y="loss", line_dash="dashed", **how)
        losses = [*published.losses.values()]
        marks = _published(np.array([*published.losses]), loss=losses)
        dots = _add(fig, bk.Scatter, y="loss", source=marks, size=9, marker="diamond",
                    name=f"{published.name}, released", **_PAPER)  # fmt: skip
        self._hover(fig, [dots], [("loss", "@loss{0.0000}")])

    def _evaluation(self, name: str) -> Any:
        fig, hovered = self._figure(name), []
        metric = name.rsplit("/", 1)[-1]
        if self.published and len((found := self.published.numbers(metric))[0]):
            how = {"source": _published(found[0], value=found[1]), "y": "value", **_PAPER}
            how["name"] = f"{self.published.name}, paper"
            _add(fig, bk.Line, line_dash="dashed", **how)
            hovered.append(_add(fig, bk.Scatter, size=8, marker="diamond", **how))
        for i, run in self.runs:
            if name in run.evaluations:
                steps, numbers = run.evaluations[name]
                source = bk.ColumnDataSource(_axes(run, steps) | {"value": numbers})
                how = _looks(i, run) | {"source": source, "tags": ["run", i], "y": "value"}
                _add(fig, bk.Line, line_width=2, **how)
                hovered.append(_add(fig, bk.Scatter, size=7, **how))
        all_numbers = [run.evaluations[name][1] for _, run in self.runs if name in run.evaluations]
        self._fit(fig, np.concatenate(all_numbers), False)
        self._hover(fig, hovered, [(name, "@value{0.0000}")])
        return fig

    def _events(self) -> Any:
        kinds = [*dict.fromkeys(e.kind for _, run in self.runs for e in run.events)]
        fig, hovered = self._figure("events by step", y_range=kinds[::-1]), []
        fig.height = 110 + 26 * len(kinds)
        for i, run in self.runs:
            known = [e for e in run.events if e.step is not None]
            x = _axes(run, np.array([e.step for e in known], float))
            more: Any = {"kind": [e.kind for e in known], "text": [e.text for e in known]}
            how = _looks(i, run) | {"source": bk.ColumnDataSource(x | more), "tags": ["run", i]}
            hovered.append(_add(fig, bk.Scatter, y="kind", size=11, marker="triangle", **how))
        self._hover(fig, hovered, [("", "@text")])
        return fig


def _add(fig: Any, kind: Any, source: Any, color: str, name: str = "", alpha: float = 1, **of: Any):
    """A glyph over steps. It is drawn in one way: fig.line() and others make it in three."""
    parts = [part for part in ("line", "fill") if hasattr(kind, f"{part}_color")]
    looks = {f"{part}_color": color for part in parts} | {f"{part}_alpha": alpha for part in parts}
    more = {"nonselection_glyph": None, "selection_glyph": None, "muted_glyph": None}
    return fig.add_glyph(source, kind(x="step", **looks, **of), name=name, **more)


def _looks(i: int, run: Run) -> dict[str, Any]:
    return {"color": COLORS[i % len(COLORS)], "name": run.name}


def _axes(run: Run, steps: np.ndarray) -> dict[str, np.ndarray]:
    """The three positions of steps (n,) on the axis of a run."""
    hours = np.interp(steps, run.steps, run.hours) if len(run.steps) else np.full(len(steps), 0.0)
    return {"step": steps, "images": steps * run.batch_size, "hours": hours}


def _published(steps: np.ndarray, **columns: Any) -> bk.ColumnDataSource:
    """Columns at steps of the published runs, whose batches had 256 images."""
    hours = np.full(len(steps), np.nan)
    return bk.ColumnDataSource({"step": steps, "images": steps * 256, "hours": hours} | columns)


def _source(run: Run, most: int) -> bk.ColumnDataSource:
    """The columns of a run, in float32 but for the axes."""
    steps, means, ranges = curves.bucketed(run.steps, run.values, most)
    columns = {name: value.astype(np.float32) for name, value in means.items()}
    for name in ("loss", "grad_norm") if len(run.steps) > len(steps) else ():
        if name in ranges:
            least, greatest = ranges[name]
            columns |= {f"{name}_least": least.astype("f4"), f"{name}_most": greatest.astype("f4")}
    return bk.ColumnDataSource(_axes(run, steps) | columns)


def _grids(runs: Sequence[Run]) -> tuple[list[list[dict[str, Any]]], str]:
    """Per run its grids as data, as large and as many as there is room for; what is left out."""
    each = max(4, _MOST_GRIDS // max(1, len(runs)))
    chosen = []
    for run in runs:
        at = np.unique(np.linspace(0, len(run.grids) - 1, min(each, len(run.grids))).astype(int))
        chosen.append([run.grids[i] for i in at])
    jobs = [(step, file) for of in chosen for step, file in of]
    for side in _SIDES:
        with concurrent.futures.ThreadPoolExecutor() as pool:  # Pillow works without Python's lock
            made = [*pool.map(lambda job, side=side: _encoded(job[1], side), jobs)]
        if sum(map(len, made)) <= _GRID_BYTES:
            break
    while sum(map(len, made)) > _GRID_BYTES:  # every other one, the last of all the last to go
        made[-2::-2] = [""] * len(made[-2::-2])
    shown, texts = [], iter(made)
    for of in chosen:
        pairs = [(step, next(texts)) for step, _ in of]
        shown.append([{"step": step, "src": text} for step, text in pairs if text])
    there, here = sum(len(run.grids) for run in runs), sum(map(len, shown))
    said = f"{there - here} of {there} grids are left out, so that the page stays small."
    return shown, said if here < there else ""


def _encoded(file: Any, side: int) -> str:
    """A picture as a data address in WebP; "" where it cannot be read, as one that is written."""
    try:
        with opened(file) as stream:
            image: Any = Image.open(stream)
            image.load()
        if max(image.size) > side:
            image = image.convert("RGB")
            image.thumbnail((side, side), Image.Resampling.BOX, reducing_gap=2.0)
        image.convert("RGB").save(data := io.BytesIO(), "WEBP", quality=82, method=2)
    except (OSError, ValueError, SyntaxError):
        return ""
    return f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"


def _sweeps(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A table per run and metric: weights by guidance scale, each number with its shade, 0 to 1."""
    tables = []
    for run in runs:
        cells: dict[str, dict[tuple[str, float], float]] = {}
        for result in run.results:
            of = result["samples"]
            scale = (of.get("sampling") or {}).get("cfg_scale")
            for metric, value in result["metrics"].items():
                if value is not None and scale is not None and not metric.endswith("_std"):
                    where = f"{of.get('weights', '')} at {of.get('step', 0):,}", float(scale)
                    cells.setdefault(metric, {})[where] = float(value)
        for metric, found in cells.items():
            rows, scales = sorted({k[0] for k in found}), sorted({k[1] for k in found})
            least, most = min(found.values()), max(found.values())
            span = (most - least) or 1.0
            low = metric in ("fid", "sfid", "kid")  # the best is the least
            table = [(row, [(None, 0.0) if (v := found.get((row, s))) is None else
                            (f"{v:.4g}", (most - v if low else v - least) / span) for s in scales])
                     for row in rows]  # fmt: skip
            tables.append({"run": run.name, "metric": metric, "scales": scales, "rows": table,
                           "best": "least" if low else "greatest"})  # fmt: skip
    return tables


def _config_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A row per field: what each run has, whether they differ, whether one is no default."""
    presets = flatten(json.loads(json.dumps(DEFAULTS)))
    rows = []
    for field in sorted({key for run in runs for key in run.config}):
        values = [json.dumps(run.config[field]) if field in run.config else "" for run in runs]
        changed = any(v not in ("", json.dumps(presets.get(field))) for v in values)
        kind = "differs" if len(set(values)) > 1 else "changed" if changed else "default"
        rows.append({"field": field, "values": values, "kind": kind})
    return rows


def _environment_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    found = []
    for run in runs:
        of = dict(run.environment)
        for result in run.results[-1:]:
            of = {
                "devices of the evaluation": result.get("devices"),
                **result.get("versions", {}),
                **of,
            }
        found.append({k: v for k, v in flatten(of).items() if v is not None})
    names = dict.fromkeys(key for of in found for key in of)
    return [{"name": n, "values": [of.get(n, "-") for of in found]} for n in names]
