"""How local the attention of a network is: where and how far it looks, what a window leaves."""

import math
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from dico_jax.analysis.channels import fan, heat_map
from dico_jax.analysis.subjects import Subject
from dico_jax.config import flatten
from dico_jax.errors import UsageError
from dico_jax.models import abstract_params
from dico_jax.models.mixers import head_width
from dico_jax.ops.attention import attention
from dico_jax.ops.plain import widened
from dico_jax.reporting.figures import HEIGHT, WIDTH

_ANCHORS = (1 / 4, 1 / 2, 3 / 4)  # of the way along the diagonal


def check(subjects: list[Subject]) -> None:
    """Leaves the blocks that have attention; UsageError for none, or for several networks."""
    if len(subjects) > 1:
        raise UsageError("--ckpt", subjects[1].ckpt, "is one too many: attention looks at one")
    model, (subject,) = subjects[0].sampler.experiment.model, subjects
    known = flatten(abstract_params(model))
    kept = [x for x in subject.layers if f"{x}/attn/qkv/kernel".replace("/", ".") in known]
    if not kept:
        fix = f"is a {type(model).__name__}, whose blocks have no attention: give a DiT"
        raise UsageError("--ckpt", subject.ckpt, fix)
    subject.layers = tuple(kept)


def distances(tokens: int) -> np.ndarray:
    """Between all pairs of the tokens of a square grid, (T, T), in tokens."""
    at = np.stack(np.divmod(np.arange(tokens), math.isqrt(tokens)), axis=-1)
    return np.linalg.norm(at[:, None] - at, axis=-1).astype(np.float32)


def anchor_tokens(tokens: int) -> np.ndarray:
    """The numbers of the tokens whose attention is drawn."""
    side = math.isqrt(tokens)
    return np.array([int(share * side) * (side + 1) for share in _ANCHORS])


def watch(seen: dict[Any, Any], layer: str, name: str, module: Any, call: Any, args: Any) -> Any:
    """See `Subject.program`: keeps attention's weights; with a "radius", none looks farther."""
    if name == "attn/proj" and "radius" in seen:
        return call(seen.pop(layer))
    result = call(*args)
    if name == "attn/qkv":
        n, tokens, _ = result.shape
        heads = module.parent.num_heads or args[0].shape[-1] // head_width(args[0].shape[-1])
        parts = result.reshape(n, tokens, 3, heads, -1)
        q, k, v = (parts[:, :, i] for i in range(3))
        if "radius" in seen:
            near = distances(tokens) <= seen["radius"]
            cut = attention(q, k, v, mask=near, implementation="xla")
            seen[layer] = cut.reshape(n, tokens, -1)
        else:
            logits = jnp.einsum("nqhd,nkhd->nhqk", widened(q), widened(k), precision="highest")
            seen[layer] = jax.nn.softmax(logits / math.sqrt(q.shape[-1]))
    return result


def measures(weights: jax.Array, images: jax.Array) -> dict[str, jax.Array]:
    """Sums over images that weigh 1 or 0 of what is linear in attention (N, heads, T, T)."""
    one = weights.reshape(len(images), -1, *weights.shape[1:]).mean(1)  # of each image's windows
    a, far = jnp.einsum("n,nhqk->hqk", images, one), distances(weights.shape[-1])
    radii = jnp.arange(math.ceil(far.max()) + 1)
    mass = jax.lax.map(lambda r: jnp.where(far <= r, a, 0).sum(2).mean(1), radii)
    anchors = a.mean(0)[anchor_tokens(len(far))]
    return {"mean_distance": (a * far).sum(2).mean(1), "mass": mass.T, "anchors": anchors}


def measure(subject: Subject) -> dict[str, Any]:
    """The result of a network as JSON has it; its maps of anchors are of the middle time."""

    def look(noise, output, seen, weights):
        return output, {layer: measures(of, weights) for layer, of in seen.items()}

    whole, params = subject.program(watch, look), subject.sampler.params
    cut = subject.program(watch, lambda noise, output, seen, weights: output)
    layers: dict[str, Any] = {layer: {} for layer in subject.layers}
    errors, radii = [], [0]
    for point, time in enumerate(subject.times, 1):
        print(f"{subject.ckpt}, time {time:g} ...", file=sys.stderr, flush=True)
        sums: Any = None
        squares: Any = 0.0
        for *given, weights in subject.batches(point):
            output, found = whole(params, *given, weights, point)
            found = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), found)
            sums = found if sums is None else jax.tree.map(np.add, sums, found)
            reach = max(of["mass"].shape[1] for of in found.values()) - 1
            radii = [0, *(2**i for i in range(reach.bit_length()) if 2**i < reach), reach]
            windows = (cut(params, *given, weights, point, {"radius": r}) for r in radii)
            kept, full = np.asarray(weights) > 0, np.asarray(output, np.float64)
            off = [full, *(np.asarray(window) - full for window in windows)]
            squares = squares + np.square(off)[:, kept].sum((1, 2, 3, 4))
        errors.append(np.sqrt(squares[1:] / squares[0]).tolist())
        for layer, of in jax.tree.map(lambda leaf: leaf / len(subject.latents), sums).items():
            for name in ("mean_distance", "mass"):
                layers[layer].setdefault(name, []).append(of[name].tolist())
            if point == (len(subject.times) + 1) // 2:
                layers[layer]["anchors"] = of["anchors"].tolist()
    patch = getattr(subject.sampler.experiment.model, "patch_size", 1)
    about = {"times": subject.times.tolist(), "latents_per_token": patch, "layers": layers}
    return about | {"window": {"radii": radii, "relative_error": errors}}


def figures(results: Mapping[str, Any]) -> Iterator[tuple[str, Figure]]:
    """Attention of anchors in some blocks; distances, mass by radius, and what a window leaves."""
    ((name, result),) = results.items()
    layers, times, window = result["layers"], result["times"], result["window"]
    some = [[*layers][i] for i in np.unique(np.linspace(0, len(layers) - 1, 6).round().astype(int))]
    figure = Figure(figsize=(WIDTH * len(some) / 2, WIDTH * len(_ANCHORS) / 2))
    panels = figure.subplots(len(_ANCHORS), len(some), squeeze=False)
    for layer, column in zip(some, panels.T, strict=True):
        maps = np.array(layers[layer]["anchors"])
        side = math.isqrt(maps.shape[-1])
        for axes, image, at in zip(column, maps, anchor_tokens(side**2), strict=True):
            axes.imshow(image.reshape(side, side))
            axes.plot(at % side, at // side, "r+")
            axes.set_axis_off()
        column[0].set_title(layer)
    figure.suptitle(f"{name}, time {times[(len(times) - 1) // 2]:g}")
    yield "attention_anchors", figure

    figure = Figure(figsize=(2.4 * WIDTH, 2.2 * HEIGHT))
    (mass, error), (by_time, by_head) = figure.subplots(2, 2)
    lines = [np.mean(of["mass"], axis=(0, 1)) for of in layers.values()]
    far = distances(max(len(of["anchors"][0]) for of in layers.values()))
    uniform = [(far <= r).mean() for r in range(max(map(len, lines)))]
    mass.plot(uniform, color="0.5", ls="--", label="uniform")
    fan(mass, [*layers], range(len(uniform)), lines)
    mass.set(xlabel="radius (tokens)", ylabel="attention inside")
    fan(error, [f"time {t:g}" for t in times], window["radii"], window["relative_error"])
    error.set(xlabel="radius of the window (tokens)", ylabel="relative error of the output")
    found = [np.array(of["mean_distance"]) for of in layers.values()]  # (times, heads) each
    most = max(of.shape[1] for of in found)
    heads = [np.append(of.mean(0), [np.nan] * (most - of.shape[1])) for of in found]
    heat_map(by_time, [of.mean(1) for of in found], layers, times)
    heat_map(by_head, heads, layers, range(most))
    by_time.set(xlabel="time", title="mean distance (tokens)")
    by_head.set(xlabel="head", title="mean distance (tokens)")
    yield "attention_locality", figure
