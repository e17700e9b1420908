"""How redundant the channels of a network are, block by block, at several times."""

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from dico_jax.analysis.measures import (
    NOTHING,
    Moments,
    channel_measures,
    merged,
    moments,
    radial_power,
)
from dico_jax.analysis.subjects import Subject
from dico_jax.errors import UsageError
from dico_jax.ops.pointwise import multiply_vector
from dico_jax.reporting.figures import HEIGHT, WIDTH

# Where a block is looked at: its conv module or attention as it leaves it, before the gate of the
# modulation, and what channel attention's gate makes of what.
PLACES = OUTPUT, BEFORE, AFTER = "output", "before_gate", "after_gate"
MEASURES = {
    "dead_share": "near-dead channels", "mean_abs_correlation": "mean |correlation|",
    "effective_rank": "effective rank / width", "score_entropy": "entropy of the score",
}  # fmt: skip
_MAPS = 36  # channels on a sheet


def watch(seen: dict[Any, Any], layer: str, name: str, module: Any, call: Any, args: Any) -> Any:
    if name == "conv3" and len(args) > 1:
        if (layer, BEFORE) in seen:
            seen[layer, AFTER] = args[0]
        seen[layer, OUTPUT] = call(args[0])
        return multiply_vector(seen[layer, OUTPUT], args[1])
    result = call(*args)
    if name == "conv2":
        seen[layer, "conv2"] = result[0]
    elif name == "ca":
        seen[layer, BEFORE] = seen[layer, "conv2"]
    elif name == "attn":
        seen[layer, OUTPUT] = result
    return result


def measure(subject: Subject) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The result of one network as JSON has it, and maps (H, W, C) of its first block, by place."""

    def look(noise, output, seen, weights):
        features = {key: found for key, found in seen.items() if key[1] in PLACES}
        maps = {place: f[0] for (layer, place), f in features.items() if layer == subject.layers[0]}
        return noise, {key: moments(found, weights) for key, found in features.items()}, maps

    program, params = subject.program(watch, look), subject.sampler.params
    layers: dict[str, Any] = {}
    sheet: dict[str, np.ndarray] = {}
    scores, spectra = [], []
    for point, time in enumerate(subject.times, 1):
        print(f"{subject.ckpt}, time {time:g} ...", file=sys.stderr, flush=True)
        sums: dict[Any, Moments] = {}
        power: Any = 0.0
        for x, told, weights in subject.batches(point):
            noise, found, maps = program(params, x, told, weights, point)
            sums = {key: merged(sums.get(key, NOTHING), of) for key, of in found.items()}
            kept = np.asarray(noise)[np.asarray(weights) > 0]
            power = power + len(kept) * radial_power(kept)
            if point == (len(subject.times) + 1) // 2 and not sheet:
                sheet = {p: _as_map(np.asarray(maps[p])) for p in PLACES if p in maps}
        for layer, place in ((i, p) for i in subject.layers for p in PLACES if (i, p) in sums):
            found = sums[layer, place]
            sizes = {"width": len(found.mean), "rows": int(found.rows)}
            at = layers.setdefault(layer, {}).setdefault(place, sizes)
            for name, value in channel_measures(found).items():
                at.setdefault(name, []).append(value)
        if (last := [*layers][-1:]) == []:
            fix = "has no block with a conv module or attention: give a DiCo or a DiT"
            raise UsageError("--ckpt", subject.ckpt, fix)
        scores.append(sums[last[0], OUTPUT].score.tolist())
        spectra.append((power / len(subject.latents)).tolist())
    result = {
        "times": subject.times.tolist(),
        "layers": layers,
        "score": {"layer": last[0], "values": scores},
        "noise_spectrum": spectra,
    }
    return result, sheet


def _as_map(features: np.ndarray) -> np.ndarray:
    """Features of one image, (H, W, C) or those of tokens (T, C), as (H, W, C)."""
    side = math.isqrt(features.size // features.shape[-1])
    return features if features.ndim == 3 else features.reshape(side, side, -1)


def rank_warnings(results: Mapping[str, Any]) -> Iterator[str]:
    """Says which blocks have fewer rows than channels, whose rank is then that of the data."""
    for name, result in results.items():
        few = {layer: found[OUTPUT] for layer, found in result["layers"].items()}
        few = {layer: of for layer, of in few.items() if of["rows"] <= of["width"]}
        if few:
            layer, of = min(few.items(), key=lambda item: item[1]["rows"] / item[1]["width"])
            what = f"{of['rows']} rows (images x positions) for {of['width']} channels"
            fix = f"its rank is at most {of['rows'] - 1}: give more --num_images"
            yield f"{name}: {len(few)} blocks, such as {layer}, have too few images: {what}, {fix}"


def figures(results: Mapping[str, Any], sheets: Mapping[str, Any]) -> Iterator[Any]:
    """Score, measures by block and time, maps of the first block, and spectrum of the noise."""
    figure = Figure(figsize=(1.3 * WIDTH, HEIGHT))
    axes = figure.subplots()
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
            blocks, times = results[name]["layers"], results[name]["times"]
            drawn = heat_map(axes, table, [*blocks], times, 0.0, most)
            axes.set(title=name if measured == next(iter(MEASURES)) else "", xlabel="time")
            figure.colorbar(drawn, ax=axes)
        row[0].set_ylabel(title)
        for place, style in ((OUTPUT, "o-"), (AFTER, "s--"), (BEFORE, "^:")):
            for k, (name, result) in enumerate(results.items()):
                mean = _table(result, measured, place).mean(axis=1)
                how = {"color": f"C{k}", "label": f"{name}, {place.replace('_', ' ')}"}
                if mean.count():
                    row[-1].plot(mean, style, ms=3, **how)
        row[-1].set(xlabel="block", ylabel=title)
    figure.legend(*panels[0, -1].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    yield "channel_measures", figure

    for number, (name, maps) in enumerate(sheets.items()):
        figure = Figure(figsize=(WIDTH * len(maps), 1.15 * WIDTH))
        most = max(np.abs(of).max() for of in maps.values())
        for axes, place in zip(figure.subplots(1, len(maps), squeeze=False)[0], maps, strict=True):
            axes.imshow(_tiled(maps[place]), cmap="RdBu_r", vmin=-most, vmax=most)
            axes.set_axis_off()
            axes.set_title(place.replace("_", " "))
        figure.suptitle(f"{name}, {next(iter(results[name]['layers']))}")
        yield f"feature_maps_{number + 1}", figure

    figure = Figure(figsize=(WIDTH * len(results), 1.1 * HEIGHT))
    panels = figure.subplots(1, len(results), squeeze=False, sharey=True)[0]
    for axes, (name, result) in zip(panels, results.items(), strict=True):
        times, spectra = result["times"], result["noise_spectrum"]
        for k, power in enumerate(spectra):
            label = f"time {times[k]:g}" * (k in (0, len(times) - 1))
            color = colormaps["viridis"](k / max(1, len(times) - 1))
            axes.plot(range(1, len(power)), power[1:], color=color, label=label)
        axes.axhline(1, color="0.5", ls="--", lw=0.8, label="white noise")
        axes.set(xlabel="cycles per image", yscale="log", title=name)
        axes.legend()
    panels[0].set(ylabel="power of the predicted noise")
    yield "noise_spectrum", figure


def heat_map(axes: Any, table: np.ndarray, rows: Sequence[str], columns: Any, *limits: Any) -> Any:
    """Draws numbers (rows, columns), some of whose names stand beside them."""
    low, high = limits or (None, None)
    drawn = axes.imshow(table, aspect="auto", vmin=low, vmax=high, interpolation="none")
    named = [f"{column:.4g}" for column in columns]
    for axis, names, most in ((axes.yaxis, rows, 6), (axes.xaxis, named, 4)):
        some = np.unique(np.linspace(0, len(names) - 1, most).round().astype(int))
        axis.set_ticks(some, [names[i].replace("_level_", " ") for i in some])
    axes.grid(visible=False)
    return drawn


def _table(result: Mapping[str, Any], measured: str, place: str) -> Any:
    """A measure of all blocks (blocks, times), masked where there is none; of a rank the share."""
    rows, none = [], [math.nan] * len(result["times"])
    for of in result["layers"].values():
        at = of.get(place, {"width": 1})
        scale = at["width"] if measured == "effective_rank" else 1
        rows.append(np.array(at.get(measured, none), float) / scale)
    return np.ma.masked_invalid(rows)


def _tiled(maps: np.ndarray) -> np.ndarray:
    """At most `_MAPS` channels of maps (H, W, C), spread evenly, beside and below each other."""
    some = np.unique(np.linspace(0, maps.shape[-1] - 1, _MAPS).round().astype(int))
    beside = math.ceil(len(some) ** 0.5)
    tiles = np.pad(np.moveaxis(maps[..., some], -1, 0), ((0, 0), (0, 1), (0, 1)))
    tiles = np.pad(tiles, ((0, -len(tiles) % beside), (0, 0), (0, 0)))
    return np.concatenate([np.concatenate([*row], axis=1)
                           for row in tiles.reshape(-1, beside, *tiles.shape[1:])])  # fmt: skip
