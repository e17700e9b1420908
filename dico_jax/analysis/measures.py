"""What is measured of features and of attention, as formulas; docs/analysis.md says them in words.

Sums over positions are taken on the devices in float32, those over batches on the host in float64.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dico_jax.ops.plain import widened

DEAD = 0.01  # of the deviation that the channels of a layer have in quadratic mean


class Moments(NamedTuple):
    """Of the features of a layer, (N, positions, C), in sums over images that weigh 1 or 0."""

    rows: Any  # images times positions
    mean: Any  # (C,)
    scatter: Any  # (C, C), sum of the products of deviations from the mean
    score: Any  # (C,), mean over the rows of max(x, 0)


NOTHING = Moments(0.0, 0.0, 0.0, 0.0)


def moments(features: jax.Array, weights: jax.Array) -> Moments:
    """The `Moments` of one batch: features (N, ..., C), weights (N,)."""
    x = widened(features).reshape(len(weights), -1, features.shape[-1])
    w = weights[:, None, None]
    rows = jnp.maximum(weights.sum() * x.shape[1], 1)
    mean, score = ((w * part).sum((0, 1)) / rows for part in (x, jax.nn.relu(x)))
    off = w * (x - mean)
    scatter = jnp.einsum("npc,npd->cd", off, off, precision="highest")
    return Moments(weights.sum() * x.shape[1], mean, scatter, score)


def merged(one: Moments, other: Moments) -> Moments:
    """The moments of the rows of both, in float64 (Chan et al. 1983)."""
    a, b = (Moments(*(np.asarray(part, np.float64) for part in of)) for of in (one, other))
    share, shift = b.rows / (a.rows + b.rows), b.mean - a.mean
    scatter = a.scatter + b.scatter + a.rows * share * np.outer(shift, shift)
    score = a.score + share * (b.score - a.score)
    return Moments(a.rows + b.rows, a.mean + share * shift, scatter, score)


def channel_measures(found: Moments) -> dict[str, float | None]:
    """The redundancy of channels; None where fewer than two of them are alive to be compared."""
    covariance = found.scatter / found.rows
    deviation = np.sqrt(np.diag(covariance))
    alive = deviation > DEAD * np.sqrt(np.mean(deviation**2))
    live = deviation[alive]
    rank = math.exp(_entropy(np.linalg.eigvalsh(covariance))) if len(live) else 0.0
    correlation = np.abs(covariance[np.ix_(alive, alive)]) / np.outer(live, live)
    pairs = len(live) * (len(live) - 1)
    return {
        "dead_share": float(1 - alive.mean()),
        "mean_abs_correlation": float((correlation.sum() - len(live)) / pairs) if pairs else None,
        "effective_rank": rank,
        "effective_rank_share": rank / len(alive),
        "score_entropy": _entropy(found.score) / max(math.log(len(alive)), 1e-9),
    }


def _entropy(values: np.ndarray) -> float:
    """Of what is above 0, divided by its sum, in nats; 0 where nothing is."""
    p = values[values > 0] / max(values[values > 0].sum(), np.finfo(np.float64).tiny)
    return float(-(p * np.log(p)).sum())


def radial_power(images: np.ndarray) -> np.ndarray:
    """Mean of |FFT|^2 / (H W) of images (N, H, W, C) over rings: of white noise 1 everywhere.

    Ring k has the frequencies that round to k cycles per image, k = 0 to min(H, W) // 2.
    """
    height, width = images.shape[1:3]
    power = np.abs(np.fft.fft2(np.asarray(images, np.float64), axes=(1, 2))) ** 2
    rows, columns = np.fft.fftfreq(height, 1 / height), np.fft.fftfreq(width, 1 / width)
    rings = np.rint(np.hypot(rows[:, None], columns)).astype(int).ravel()
    sums = np.bincount(rings, power.mean((0, 3)).ravel() / (height * width))
    return (sums / np.bincount(rings))[: min(height, width) // 2 + 1]
