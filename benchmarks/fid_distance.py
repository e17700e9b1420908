"""How long the numbers of FID and its family take once the features are there.

    python benchmarks/fid_distance.py [--width=2048 --count=50000 --references=10000]
        [--only=moments,frechet,scipy,precision_recall]

Times the moments of `count` rows, the Frechet distance of two of them (bar: 10 s at a width of 2048
on two cores) beside the way of the published code, through scipy.linalg.sqrtm, and precision and
recall against `references` rows with both kinds of distances. Every part runs in a process of its
own; its peak memory is given beyond what it holds when it starts.
"""

import argparse
import multiprocessing
import pathlib
import sys
import time

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from dico_jax.evaluation.distances import frechet_distance, precision_recall
from dico_jax.evaluation.statistics import Moments

BAR_SECONDS = 10
PARTS = ("moments", "frechet", "scipy", "precision_recall")


def features(count, width, seed, spread=1.0):
    """Rows as Inception makes them: at least 0, of few directions and some noise, float32."""
    rng = np.random.default_rng(seed)
    directions = np.random.default_rng(0).standard_normal((60, width), dtype=np.float32) / 8
    rows = np.empty((count, width), np.float32)
    for start in range(0, count, 5000):
        part = rows[start : start + 5000]
        part[:] = spread * rng.standard_normal((len(part), 60), dtype=np.float32) @ directions
        part += 0.3 + 0.2 * rng.standard_normal(part.shape, dtype=np.float32)
        np.maximum(part, 0, out=part)
    return rows


def measured(function):
    """The result, the seconds, and the peak memory in GB beyond what is held at the start."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew (Linux)
    before, start = memory_gigabytes("VmRSS"), time.perf_counter()
    result = function()
    return result, time.perf_counter() - start, memory_gigabytes("VmHWM") - before


def memory_gigabytes(name):
    """Memory of this process: "VmRSS" now, "VmHWM" at its peak."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0]) / 1e6


def moments(args):
    """Streaming moments, in batches of 64 rows."""
    rows = features(args.count, args.width, 1)
    accumulated = Moments(args.width)

    def update():
        for start in range(0, len(rows), 64):
            accumulated.update(rows[start : start + 64])
        return accumulated.covariance

    _, seconds, memory = measured(update)
    print(f"moments of {args.count} x {args.width}: {seconds:.1f} s, {memory:.2f} GB")


def two_moments(args):
    """Means and covariances of two sets of four times as many rows as numbers in a row."""
    for seed, spread in ((1, 1.0), (2, 0.95)):
        rows = features(4 * args.width, args.width, seed, spread).astype(np.float64)
        yield rows.mean(axis=0)
        yield np.cov(rows, rowvar=False)


def frechet(args):
    """Our distance."""
    given = list(two_moments(args))
    found, seconds, memory = measured(lambda: frechet_distance(*given))
    print(
        f"Frechet distance, width {args.width}: {seconds:.1f} s (bar: {BAR_SECONDS} s at 2048), "
        f"{memory:.2f} GB; {found:.12g}"
    )


def scipy(args):
    """The published code's distance."""
    from scipy import linalg

    mean1, covariance1, mean2, covariance2 = two_moments(args)

    def distance():
        root = linalg.sqrtm(covariance1 @ covariance2).real
        traces = np.trace(covariance1) + np.trace(covariance2) - 2 * np.trace(root)
        return np.sum((mean1 - mean2) ** 2) + traces

    found, seconds, memory = measured(distance)
    print(f"  through scipy.linalg.sqrtm: {seconds:.1f} s, {memory:.2f} GB; {found:.12g}")


def precision_and_recall(args, distances):
    """With one kind of distances."""
    reference = features(args.references, args.width, 1)
    samples = features(args.count, args.width, 2, 0.95)
    (precision, recall), seconds, memory = measured(
        lambda: precision_recall(samples, reference, distances=distances)
    )
    print(
        f"precision and recall ({distances}), {args.references} references, {args.count} samples, "
        f"width {args.width}: {seconds:.1f} s, {memory:.2f} GB; {precision:.4f}, {recall:.4f}"
    )


def main():
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--count", type=int, default=50_000)
    parser.add_argument("--references", type=int, default=10_000)
    parser.add_argument("--only", default=",".join(PARTS), help="some of %(default)s")
    args = parser.parse_args()
    chosen = args.only.split(",")
    if set(chosen) - set(PARTS):
        parser.error(f"--only={args.only}: some of {','.join(PARTS)}")
    calls = []
    for part in chosen:
        if part == "precision_recall":
            calls += [(precision_and_recall, (args, kind)) for kind in ("exact", "adm_float16")]
        else:
            calls.append((globals()[part], (args,)))
    context = multiprocessing.get_context("spawn")
    for function, given in calls:
        process = context.Process(target=function, args=given)
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(process.exitcode)


if __name__ == "__main__":
    main()
