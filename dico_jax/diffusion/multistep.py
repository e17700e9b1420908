"""Multistep solvers: linear combinations of x and of the last x_0 that the network predicted.

Their coefficients follow from the points alone and are computed on the host in float64. Symbols as
in DPM-Solver++ (arXiv 2211.01095) and UniPC (arXiv 2302.04867): lambda = log(alpha / sigma), h its
growth in a step, of which the other points lie r h away from where it starts.
"""

import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dico_jax.diffusion.gaussian import table_at
from dico_jax.diffusion.paths import Path, Solver, Trajectory

_SHORT = 15  # steps of a path below which the last ones are of lower order, as in public code


class _Span(NamedTuple):
    """One step, from x_t to x_s."""

    alpha: float  # at s
    sigma: float
    ratio: float  # sigma at s over that at t
    decay: float  # exp(-h)
    h: float
    r: np.ndarray  # of the points before t, the nearest first, below 0


class Multistep(Solver):
    """Steps x_s = a x_t + sum of c_k x0_k, with the x_0 predicted at the last `order` points.

    The first steps, which have fewer points behind them (points without signal do not count), are
    of lower order, and so are the last where they lead to clean data, at which lambda is infinite.
    """

    order: ClassVar[int]

    def init(self, path: Path, x: jax.Array) -> Any:
        return x, (jnp.zeros_like(x),) * (self.order - 1)

    def step(self, path: Path, carry: Any, i, noise) -> tuple[Any, Trajectory]:
        (x, before), spans = carry, self.spans(path)
        found = (path.estimate(x, i + 1).x0, *before)
        moved = _combined(self.table(spans), i, x, *found)
        if noise is not None:
            fresh = table_at(self.noise_table(spans)[::-1], i, x)
            # Selected rather than multiplied by 0, see `sample_loop`'s `noise_fn`.
            moved = jnp.where(fresh > 0, moved + fresh * noise, moved)
        return (moved, found[: self.order - 1]), Trajectory(moved, found[0])

    def end(self, path: Path, carry: Any) -> jax.Array:
        return carry[0]

    def spans(self, path: Path) -> list[_Span]:
        """All steps, first step first."""
        alpha, sigma = (table[::-1] for table in path.tables)
        with np.errstate(divide="ignore"):
            lambdas = np.log(alpha) - np.log(sigma)
        found, count = [], len(alpha) - 1
        for k in range(count):
            most = self.points(count, k, clean=sigma[-1] == 0)
            before = [m for m in range(max(0, k + 1 - most), k) if np.isfinite(lambdas[m])]
            h = lambdas[k + 1] - lambdas[k]
            r = (lambdas[before][::-1] - lambdas[k]) / h
            ratio = sigma[k + 1] / sigma[k]
            decay = alpha[k] / alpha[k + 1] * ratio
            found.append(_Span(alpha[k + 1], sigma[k + 1], ratio, decay, h, r))
        return found

    def points(self, count: int, k: int, clean: bool) -> int:
        """Of how many points step k of `count` uses predictions."""
        left = count - k
        if clean and (left == 1 or (left == 2 and count < _SHORT)):
            return left
        return self.order

    def table(self, spans: list[_Span]) -> np.ndarray:
        """Coefficients of x and of the x_0, newest first: (T, 1 + order), by a step's number."""
        return _padded([self.coefficients(span) for span in spans], 1 + self.order)

    def coefficients(self, span: _Span) -> np.ndarray:
        """The coefficients of one step, as many as it has points."""
        raise NotImplementedError

    def noise_table(self, spans: list[_Span]) -> np.ndarray:
        """The deviation of the fresh noise of every step, (T,), first step first."""
        raise NotImplementedError


class DpmSolver2M(Multistep):
    """DPM-Solver++ (2M), arXiv 2211.01095, algorithm 2."""

    order = 2

    def coefficients(self, span: _Span) -> np.ndarray:
        share = span.alpha * (1.0 - span.decay)
        return np.append(span.ratio, _of_slopes([share, 0.5 * share], span.r))


class DpmSolver3M(DpmSolver2M):
    """DPM-Solver++ (3M), the multistep solver of the authors' code.

    It is of order 2, as all of its public forms are: they count the second derivative half. The
    error is a few times below that of 2M.
    """

    order = 3

    def coefficients(self, span: _Span) -> np.ndarray:
        if len(span.r) < 2:
            return super().coefficients(span)
        alpha, decay, h = span.alpha, span.decay, span.h
        slope, bend = alpha * ((decay - 1) / h + 1), alpha * (0.5 - (decay - 1 + h) / h**2)
        return np.append(span.ratio, _of_slopes([alpha * (1.0 - decay), slope, bend], span.r))


class DpmSolver2MSde(Multistep):
    """SDE-DPM-Solver++ (2M), arXiv 2211.01095, section 4.3: fresh noise in every step."""

    order = 2
    draws_noise = True

    def coefficients(self, span: _Span) -> np.ndarray:
        share = span.alpha * (1.0 - span.decay**2)
        return np.append(span.ratio * span.decay, _of_slopes([share, 0.5 * share], span.r))

    def noise_table(self, spans: list[_Span]) -> np.ndarray:
        return np.array([s.sigma * np.sqrt(1.0 - s.decay**2) for s in spans])


class UniPC(Multistep):
    """UniPC with B2(h) = exp(h) - 1, arXiv 2302.04867, algorithms 5 to 8.

    Every x is corrected with the prediction at it, which the next step uses too: one evaluation a
    step. The order is that of the predictor; the corrected x are of one more.
    """

    def init(self, path: Path, x: jax.Array) -> Any:
        return x, x, (jnp.zeros_like(x),) * self.order

    def step(self, path: Path, carry: Any, i, noise) -> tuple[Any, Trajectory]:
        (x, previous, before), spans = carry, self.spans(path)
        now = path.estimate(x, i + 1).x0
        x = _combined(self.corrector(spans), i, x, previous, now, *before)
        found = (now, *before[:-1])
        moved = _combined(self.table(spans), i, x, *found)
        return (moved, x, found), Trajectory(moved, now)

    def points(self, count: int, k: int, clean: bool) -> int:
        return min(self.order, count - k) if clean else self.order

    def coefficients(self, span: _Span) -> np.ndarray:
        """Equation 9; of order 2 the weight is 1/2 whatever h, as in the authors' code."""
        if len(span.r) < 2:
            weights = np.full(len(span.r), 0.5)
        else:
            powers, wanted = _unified(span.h, span.r)
            weights = np.linalg.solve(powers[:, :-1][:-1], wanted[:-1])
        return np.append(span.ratio, _of_differences(span, weights, span.r))

    def corrector(self, spans: list[_Span]) -> np.ndarray:
        """Coefficients of the x that came, that before, the x_0 now, and those before."""
        rows: list[np.ndarray] = [np.array([1.0])]  # nothing comes before the first step
        for span in spans[:-1]:
            powers, wanted = _unified(span.h, span.r)
            weights = np.linalg.solve(powers, wanted) if len(span.r) else np.array([0.5])
            first, *old, new = _of_differences(span, weights, np.append(span.r, 1.0))
            rows.append(np.array([0.0, span.ratio, new, first, *old]))
        return _padded(rows, 3 + self.order)


class UniPC2(UniPC):
    """UniPC of order 2."""

    order = 2


class UniPC3(UniPC):
    """UniPC of order 3."""

    order = 3


def _of_slopes(weights: list[float], r: np.ndarray) -> np.ndarray:
    """Coefficients of the values at 0 and at r, of weights of a polynomial's coefficients.

    The polynomial, in units of h, goes through these values; the first weight is of its constant.
    """
    powers = np.vander(np.append(0.0, r), increasing=True)
    return np.linalg.solve(powers.T, np.array(weights[: len(powers)]))


def _unified(h: float, r: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The powers of r, and of 1 for the step's end, and what they are to give: (P, P), (P,)."""
    count = len(r) + 1
    powers = np.vander(np.append(r, 1.0), increasing=True).T
    phi, wanted = np.expm1(-h) / -h - 1.0, []
    for k in range(count):
        wanted.append(phi * math.factorial(k + 1) / np.expm1(-h))
        phi = phi / -h - 1.0 / math.factorial(k + 2)
    return powers, np.array(wanted)


def _of_differences(span: _Span, weights: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Coefficients of the x_0 at the start, and of those whose differences to it have weights."""
    share = span.alpha * (1.0 - span.decay)
    each = share * weights / r
    return np.append(share - each.sum(), each)


def _padded(rows: list[np.ndarray], width: int) -> np.ndarray:
    """Rows as an array in the order of the steps' numbers, the last step first."""
    return np.stack([np.append(row, np.zeros(width - len(row))) for row in rows[::-1]])


def _combined(table: np.ndarray, i, *arrays: jax.Array) -> jax.Array:
    """The sum of arrays times row i of a table of (T, len(arrays))."""
    row = jnp.asarray(table, arrays[0].dtype)[i]
    total = row[0] * arrays[0]
    for k, array in enumerate(arrays[1:], 1):
        total = total + row[k] * array
    return total
