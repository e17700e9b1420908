"""How redundant the channels of a network are, block by block, at several times."""

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from dico_jax.analysis import measures
from dico_jax.analysis.subjects import Subject
from dico_jax.errors import UsageError
from dico_jax.ops.pointwise import multiply_vector
from dico_jax.reporting.figures import HEIGHT, WIDTH

# Where a block is looked at: its conv module or attention as it leaves it, before the gate of the
# modulation, and what channel attention's gate makes of what.
PLACES = OUTPUT, BEFORE, AFTER = "output", "before_gate", "after_gate"
MEASURES = {
    "dead_share": "near-dead channels", "mean_abs_correlation": "mean |correlation|",
    "effective_rank_share": "effective rank / width", "score_entropy": "entropy of the score",
}  # fmt: skip
_FEATURES, _LAST = ("conv2", "pwconv1"), ("conv3", "pwconv2")  # of a conv module, of FCDM's block
_MAPS = 36  # channels on a sheet


def watch(seen: dict[Any, Any], layer: str, name: str, module: Any, call: Any, args: Any) -> Any:
    """See `Subject.program`: keeps the features of `PLACES`, (N, ..., C), by layer and place."""
    if name in _LAST:
        if (layer, BEFORE) in seen:
            seen[layer, AFTER] = args[0]
        seen[layer, OUTPUT] = call(args[0])
        return multiply_vector(seen[layer, OUTPUT], args[1])
    result = call(*args)
    if name in _FEATURES:
        seen[layer, "features"] = result[0] if isinstance(result, tuple) else result
    elif name in ("ca", "grn"):
        seen[layer, BEFORE] = seen[layer, "features"]
    elif name == "attn":
        seen[layer, OUTPUT] = result
    return result


def measure(subject: Subject) -> dict[str, Any]:
    """The result of one network as JSON has it, and "maps" of its first block, by place."""

    def look(noise, output, seen, weights):
        found = {key: measures.moments(of, weights) for key, of in seen.items() if key[1] in PLACES}
        return noise, found, {p: seen[i, p][0] for i, p in found if i == subject.layers[0]}

    program, scores, spectra = subject.program(watch, look), [], []
    layers: dict[str, Any] = {}
    for point, time in enumerate(subject.times, 1):
        print(f"{subject.ckpt}, time {time:g} ...", file=sys.stderr, flush=True)
        sums: dict[Any, measures.Moments] = {}
        power: list[np.ndarray] = []
        for *given, weights in subject.batches(point):
            noise, found, first = program(subject.sampler.params, *given, weights, point)
            nothing = dict.fromkeys(found, measures.NOTHING)
            sums = {k: measures.merged((sums or nothing)[k], of) for k, of in found.items()}
            kept = np.asarray(noise)[np.asarray(weights) > 0]
            power += [measures.radial_power(image[None]) for image in kept]
            if point == (len(subject.times) + 1) // 2 and len(power) == len(kept):
                maps = {place: np.asarray(first[place]) for place in PLACES if place in first}
        for layer, place in ((i, p) for i in subject.layers for p in PLACES if (i, p) in sums):
            of = sums[layer, place]
            sizes = {"width": len(of.mean), "rows": int(of.rows)}
            at = layers.setdefault(layer, {}).setdefault(place, sizes)
            for name, value in measures.channel_measures(of).items():
                at.setdefault(name, []).append(value)
        if not layers:
            fix = "has no block with a conv module or attention: give a DiCo or a DiT"
            raise UsageError("--ckpt", subject.ckpt, fix)
        scores.append(sums[[*layers][-1], OUTPUT].score.tolist())
        spectra.append(np.mean(power, axis=0).tolist())
    warn_of_rank(subject.ckpt, layers)
    score = {"layer": [*layers][-1], "values": scores}
    found = {"times": subject.times.tolist(), "layers": layers, "score": score}
    return found | {"noise_spectrum": spectra, "maps": maps}


def warn_of_rank(ckpt: str, layers: Mapping[str, Any]) -> None:
    """Says of the block with the fewest rows for its channels when its rank is that of the data."""
    sizes = {layer: (of[OUTPUT]["rows"], of[OUTPUT]["width"]) for layer, of in layers.items()}
    layer, (rows, width) = min(sizes.items(), key=lambda item: item[1][0] / item[1][1])
    if rows <= width:
        what = (
            f"{rows} rows (images x positions) for {width} channels, a rank of at most {rows - 1}"
        )
        text = f"{ckpt}: too few images, of {layer} {what}: give more --num_images"
        print(f"warning: {text}", file=sys.stderr)


def figures(results: Mapping[str, Any]) -> Iterator[tuple[str, Figure]]:
    """Score, measures by block and time, maps of the first block, and spectrum of the noise."""
    axes = (figure := Figure(figsize=(1.3 * WIDTH, HEIGHT))).subplots()
    for name, result in results.items():
        score = np.sort(np.mean(result["score"]["values"], axis=0))[::-1]
        label = f"{name}, {result['score']['layer']}"
        axes.plot(np.linspace(0, 1, len(score)), score / max(score.mean(), 1e-30), label=label)
    axes.set(xlabel="channels, by score", ylabel="score / mean score")
    axes.legend()
    yield "channel_score", figure

    figure = Figure(figsize=(WIDTH * (len(results) + 1), 0.85 * HEIGHT * len(MEASURES)))
    panels = figure.subplots(len(MEASURES), len(results) + 1, squeeze=False)
    for row, (measured, title) in zip(panels, MEASURES.items(), strict=True):
        tables = {name: _table(result, measured, OUTPUT) for name, result in results.items()}
        most = max(float(table.filled(0).max()) for table in tables.values()) or 1.0
        for axes, (name, table) in zip(row, tables.items(), strict=False):
            heat_map(axes, table, results[name]["layers"], results[name]["times"], (0.0, most))
            axes.set(title=name if measured == next(iter(MEASURES)) else "", xlabel="time")
        row[0].set_ylabel(title)
        for place, style in ((OUTPUT, "o-"), (AFTER, "s--"), (BEFORE, "^:")):
            for k, (name, result) in enumerate(results.items()):
                if (mean := _table(result, measured, place).mean(axis=1)).count():
                    label = f"{name}, {place.replace('_', ' ')}"
                    row[-1].plot(mean, style, ms=3, color=f"C{k}", label=label)
        row[-1].set(xlabel="block", ylabel=title)
    figure.legend(*panels[0, -1].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    yield "channel_measures", figure

    for number, (name, result) in enumerate(results.items(), 1):
        maps = result["maps"]
        figure = Figure(figsize=(WIDTH * len(maps), 1.15 * WIDTH))
        most = max(np.abs(of).max() for of in maps.values())
        for axes, place in zip(figure.subplots(1, len(maps), squeeze=False)[0], maps, strict=True):
            axes.imshow(_tiled(maps[place]), cmap="RdBu_r", vmin=-most, vmax=most)
            axes.set_axis_off()
            axes.set_title(place.replace("_", " "))
        figure.suptitle(f"{name}, {next(iter(result['layers']))}")
        yield f"feature_maps_{number}", figure

    figure = Figure(figsize=(WIDTH * len(results), 1.1 * HEIGHT))
    panels = figure.subplots(1, len(results), squeeze=False, sharey=True)[0]
    for axes, (name, result) in zip(panels, results.items(), strict=True):
        lines = np.array(result["noise_spectrum"])[:, 1:]
        axes.axhline(1, color="0.5", ls="--", lw=0.8, label="white noise")
        fan(axes, [f"time {t:g}" for t in result["times"]], range(1, lines.shape[1] + 1), lines)
        axes.set(xlabel="cycles per image", yscale="log", title=name)
    panels[0].set_ylabel("power of the predicted noise")
    yield "noise_spectrum", figure


def fan(axes: Any, names: Sequence[str], x: Any, lines: Any) -> None:
    """Draws lines in colours that rise, the first and the last of which are named."""
    for k, (name, line) in enumerate(zip(names, lines, strict=True)):
        color = colormaps["viridis"](k / max(1, len(names) - 1))
        axes.plot(x[: len(line)], line, color=color, label=name if k in (0, len(names) - 1) else "")
    axes.legend()


def heat_map(axes: Any, table: Any, rows: Any, columns: Any, limits: Any = (None, None)) -> None:
    """Draws numbers (rows, columns) with a scale, and the names of some rows and columns."""
    low, high = limits
    drawn = axes.imshow(table, aspect="auto", vmin=low, vmax=high, interpolation="none")
    axes.figure.colorbar(drawn, ax=axes)
    named = [f"{column:.4g}" for column in columns]
    for axis, names, most in ((axes.yaxis, [*rows], 6), (axes.xaxis, named, 4)):
        some = np.unique(np.linspace(0, len(names) - 1, most).round().astype(int))
        axis.set_ticks(some, [names[i].replace("_level_", " ") for i in some])
    axes.grid(visible=False)


def _table(result: Mapping[str, Any], measured: str, place: str) -> Any:
    """A measure of all blocks (blocks, times), masked where there is none."""
    none = {measured: [math.nan] * len(result["times"])}
    rows = [of.get(place, none)[measured] for of in result["layers"].values()]
    return np.ma.masked_invalid(np.array(rows, float))


def _tiled(maps: np.ndarray) -> np.ndarray:
    """At most `_MAPS` channels of maps (H, W, C) or (T, C), spread evenly, as one picture."""
    some = np.unique(np.linspace(0, maps.shape[-1] - 1, _MAPS).round().astype(int))
    side = math.isqrt(maps[..., 0].size)
    maps = maps.reshape(side, side, -1)
    beside = math.ceil(len(some) ** 0.5)
    tiles = np.pad(np.moveaxis(maps[..., some], -1, 0), ((0, -len(some) % beside), (0, 1), (0, 1)))
    return np.vstack([np.hstack(row) for row in tiles.reshape(-1, beside, *tiles.shape[1:])])
