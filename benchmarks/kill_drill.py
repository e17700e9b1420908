r"""Kills a run again and again, and compares what it ends with to a run that was left alone.

    python benchmarks/kill_drill.py [--kills=20 --seed=0 --folder=DIR]

Trains a small model of the digits twice, on one CPU device. The second run is killed with SIGKILL:
in turns after a random number of steps, and a random moment after a save has begun. The same
command starts it again each time. Prints a table of the kills, and whether the two runs are
identical: every array of the last checkpoint, and the losses and gradient norms of every step,
which depend on the order of the data and on all randomness. Exits with 1 where they differ.
"""

import argparse
import contextlib
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from dico_jax.checkpoints.reader import stored_leaves

ROOT = pathlib.Path(__file__).resolve().parents[1]
EVERY = 10  # steps between two checkpoints
COMPARED = ("loss", "mse", "vb", "grad_norm")


def command(workdir: pathlib.Path, num_steps: int) -> list[str]:
    """The command that is given again and again."""
    fields = {
        "data.batch_size": 16,
        "model.hidden_size": 4,
        "training.num_steps": num_steps,
        "training.checkpoint_every_steps": EVERY,
        "training.log_every_steps": 1,
        "sampling.num_steps": 2,
        "sampling.grid_every_steps": 0,
        "eval.class_agreement_samples": 0,
    }
    options = [f"--config.{name}={value}" for name, value in fields.items()]
    config = f"--config={ROOT / 'configs' / 'digits.py'}"
    return [sys.executable, "-m", "dico_jax.main", config, f"--workdir={workdir}", *options]


@contextlib.contextmanager
def run(workdir: pathlib.Path, num_steps: int):
    """The process of one run, killed at the end of the context if it still lives."""
    flags = "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0"
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{flags} --xla_llvm_disable_expensive_passes=true",
        "PYTHONPATH": str(ROOT),
        # Compile once for all processes.
        "JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    with (workdir.parent / f"{workdir.name}.log").open("a") as log:
        process = subprocess.Popen(command(workdir, num_steps), env=env, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def finish(workdir: pathlib.Path, num_steps: int) -> None:
    """Runs to the end."""
    with run(workdir, num_steps) as process:
        if process.wait() != 0:
            sys.exit(f"{workdir}: exit status {process.returncode}, see {workdir}.log")


class Watch:
    """What a run has reached, from its files."""

    def __init__(self, workdir: pathlib.Path, process: subprocess.Popen):
        self.workdir, self.process = workdir, process
        self._last = None

    def wait(self, condition) -> None:
        """Waits until `condition()` is true."""
        while not condition():
            if self.process.poll() is not None:
                sys.exit(f"{self.workdir}: exit status {self.process.returncode}, not killed yet")
            time.sleep(0.0005)

    def last_step(self) -> int:
        """The last step of metrics.jsonl, 0 if there is none."""
        with contextlib.suppress(FileNotFoundError):
            lines = (self.workdir / "metrics.jsonl").read_text().split("\n")[:-1]
            return json.loads(lines[-1])["step"] if lines else 0
        return 0

    def advances(self) -> bool:
        """Whether a step was taken since the last call; lines dropped at the start are none."""
        last, self._last = self._last, self.last_step()
        return last is not None and self._last > last

    def is_saving(self) -> bool:
        """Whether a checkpoint is being written."""
        return any((self.workdir / "checkpoints").glob("*tmp*"))

    def newest_checkpoint(self) -> int:
        """The newest step that is saved, 0 if there is none."""
        names = [path.name for path in (self.workdir / "checkpoints").glob("*")]
        return max((int(name) for name in names if name.isdecimal()), default=0)


def kill_once(workdir: pathlib.Path, num_steps: int, draw: random.Random, in_save: bool) -> dict:
    """Starts the run, kills it at some moment of its training, and tells where."""
    start = time.monotonic()
    with run(workdir, num_steps) as process:
        watch = Watch(workdir, process)
        watch.wait(watch.advances)
        ready = time.monotonic() - start
        first = watch.last_step()
        if in_save:
            newest = watch.newest_checkpoint() + EVERY * draw.randrange(2)
            watch.wait(lambda: watch.newest_checkpoint() >= newest)
            watch.wait(lambda: not watch.is_saving())  # also what the last kill has left
            watch.wait(watch.is_saving)
            time.sleep(draw.uniform(0, 0.1))
        else:
            steps = draw.randrange(2 * EVERY)
            watch.wait(lambda: watch.last_step() >= first + steps)
            time.sleep(draw.uniform(0, 0.02))
        process.send_signal(signal.SIGKILL)
        process.wait()
    return {
        "kill": "in a save" if in_save else "at a step",
        "ready": ready,
        "first": first,
        "last": watch.last_step(),
        "newest": watch.newest_checkpoint(),
        "cut": watch.is_saving(),
    }


def differences(one: pathlib.Path, other: pathlib.Path, num_steps: int) -> list[str]:
    """What differs between two finished runs."""
    found = []
    losses = [_losses(workdir) for workdir in (one, other)]
    for steps in losses:
        if list(steps) != list(range(1, num_steps + 1)):
            found.append("the steps of metrics.jsonl")
    found += [f"step {s} of metrics.jsonl" for s in losses[0] if losses[0][s] != losses[1].get(s)]
    folders = [workdir / "checkpoints" / str(num_steps) for workdir in (one, other)]
    items = [path.name for path in folders[0].iterdir() if (path / "_METADATA").exists()]
    if not {"params", "ema_params", "opt_state"} <= set(items):
        found.append("the items of the checkpoint")
    for item in items:
        leaves = [stored_leaves(folder / item) for folder in folders]
        if leaves[0].keys() != leaves[1].keys() or not leaves[0]:
            found.append(f"the leaves of {item}")
            continue
        for path in leaves[0]:
            a, b = (np.asarray(each[path].read()) for each in leaves)
            if a.dtype != b.dtype or a.tobytes() != b.tobytes():
                found.append(f"{item} {'.'.join(path)}")
    return found


def _losses(workdir: pathlib.Path) -> dict[int, tuple]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {
        line["step"]: tuple(line[name] for name in COMPARED) for line in lines if "loss" in line
    }


def drill(folder: pathlib.Path, kills: int, seed: int) -> list[str]:
    """Both runs; returns what differs."""
    draw, num_steps = random.Random(seed), 2 * EVERY * (kills + 1)
    whole, killed = folder / "whole", folder / "killed"
    start = time.monotonic()
    finish(whole, num_steps)
    print(f"{num_steps} steps, a checkpoint every {EVERY}; left alone: "
          f"{time.monotonic() - start:.0f} s")  # fmt: skip
    print("kill  when        ready after  steps      newest checkpoint  save cut short", flush=True)
    cut = 0
    for number in range(1, kills + 1):
        told = kill_once(killed, num_steps, draw, in_save=number % 2 == 0)
        cut += told["cut"]
        print(f"{number:4}  {told['kill']:10} {told['ready']:9.1f} s  "
              f"{told['first']:4} to {told['last']:4} {told['newest']:14} "
              f"{'yes' if told['cut'] else 'no':>14}", flush=True)  # fmt: skip
    finish(killed, num_steps)
    print(f"{kills} kills, {cut} of them cut a save short; then the run was left to its end")
    return differences(whole, killed, num_steps)


def main() -> None:
    """Runs the drill."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="for both runs; a temporary one if not given")
    args = parser.parse_args()
    with contextlib.ExitStack() as resources:
        folder = args.folder or resources.enter_context(tempfile.TemporaryDirectory())
        found = drill(pathlib.Path(folder), args.kills, args.seed)
    if found:
        more = f" and {len(found) - 10} more" if len(found) > 10 else ""
        sys.exit(f"differs: {', '.join(found[:10])}{more}")
    print("identical")


if __name__ == "__main__":
    main()
