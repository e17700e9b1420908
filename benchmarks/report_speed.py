"""Seconds and bytes of a report of a run with 400,000 logged steps, and of eight such runs.

python benchmarks/report_speed.py
"""

import json
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

STEPS, RUNS = 400_000, 8
BARS = {1: (10.0, 5e6), RUNS: (30.0, 5e6)}  # seconds, bytes
NAMES = (
    "data_wait", "grad_norm", "images_per_second", "learning_rate", "loss", "mfu", "mse",
    "mse_t0_25", "mse_t25_50", "mse_t50_75", "mse_t75_100", "param_norm", "update_norm", "vb",
)  # fmt: skip
CONFIG = {"model": {"name": "DiCo-XL"}, "data": {"batch_size": 256, "image_size": 256}}


def make_run(folder: pathlib.Path, seed: int) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    with (folder / "metrics.jsonl").open("w") as stream:
        for step in range(1, STEPS + 1):
            values = {name: (step * 7919 + seed + k) % 104729 / 104729 + 0.1
                      for k, name in enumerate(NAMES)}  # fmt: skip
            stream.write(json.dumps({"step": step, **values}) + "\n")


def cpu_seconds() -> float:
    """Of all processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> int:
    missed = 0
    with tempfile.TemporaryDirectory() as root:
        folders = [pathlib.Path(root, f"run{k}") for k in range(RUNS)]
        for seed, folder in enumerate(folders):
            make_run(folder, seed)
        out = pathlib.Path(root, "report.html")
        for count, (most_seconds, most_bytes) in BARS.items():
            started, before = time.perf_counter(), cpu_seconds()
            command = [sys.executable, "-m", "dico_jax.report", *folders[:count], f"--out={out}"]
            subprocess.run(command, check=True, capture_output=True)
            seconds, size = time.perf_counter() - started, out.stat().st_size
            bars = f"at most {most_seconds:.0f} s, {most_bytes / 1e6:.0f} MB"
            cpu = cpu_seconds() - before
            took = f"{seconds:.1f} s, {cpu:.1f} s of CPU, {size / 1e6:.2f} MB"
            print(f"{count} x {STEPS:,} steps: {took} ({bars})")
            missed += seconds > most_seconds or size > most_bytes
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
