r"""Every bar of README.md's "On a GPU", part by part, into one JSON file.

    python benchmarks/gpu_agenda.py --out=gpu.json [--reference=DiCo --cifar10=FOLDER]

A call ends within --minutes (9); call it again, with the same --out, until it says that nothing is
left. What is done is in the file and is not done again. A part that does not end within a call of
its own counts as failed; training goes on from call to call. Without --reference (the released
code) or --cifar10 (its pictures) their parts are left out. Exits 0 once all is done and every bar
is met, 3 while parts are left, 1 where a bar is missed or a part failed. --toy runs small networks
on whatever there is, to try the script itself.
"""

import argparse
import dataclasses
import json
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from dico_jax.files import write_json  # noqa: E402

TRAINING_MINUTES = 20
SAVE_SECONDS = 45  # what training may take to save when it is stopped
LEFT = 3  # exit status


@dataclasses.dataclass(frozen=True)
class Part:
    """One command of the agenda.

    Attributes:
      name: its key in the result.
      command: what runs, without --out.
      bar: what has to be reached, "" for nothing.
      met: of the JSON that the command writes, the figure and whether it is enough.
      training: seconds for which a run of training goes on, over several calls; 0 for what
        measures and writes JSON.
    """

    name: str
    command: list[str]
    bar: str = ""
    met: Callable[[Any], tuple[float, bool]] | None = None
    training: float = 0


def benchmark(*arguments: str) -> list[str]:
    """The command that measures this project alone."""
    return [sys.executable, "-m", "dico_jax.benchmark", *arguments]


def utilisation(result: Any) -> tuple[float, bool]:
    """Of a training step."""
    share = result["models"][0]["mfu_of_ceiling"]
    return share, share >= 0.45


def times_as_fast(bar: float) -> Callable[[Any], tuple[float, bool]]:
    """As the network compared with."""

    def met(result):
        ratio = result["comparison"][0]["times_as_fast"]
        return ratio, ratio >= bar

    return met


def ratio_of_forward(name: str, bar: float) -> Callable[[Any], tuple[float, bool]]:
    """To the released code, or to the ceiling."""

    def met(result):
        ratio = result["tasks"]["forward"]["ratios"][f"forward/{name}"]
        return ratio, ratio >= bar

    return met


def agenda(options: argparse.Namespace) -> Iterator[Part]:
    """All parts, the most telling first."""
    quick, sizes, ours, theirs = [], (256, 512), "DiCo-XL", "DiT-XL/2"
    batches, batch = (64, 256), 64
    if options.toy:
        quick = ["--warmup=1", "--repeats=1", "--seconds=0", "--ceiling_sizes=64"]
        sizes, ours, theirs, batches, batch = (32, 64), "DiT-S/4", "DiT-S/2", (2, 4), 2
    precisions = {
        "bfloat16": ["--dtype=bfloat16"],
        "TF32": ["--dtype=float32", "--matmul_precision=default"],
        "float32": ["--dtype=float32", "--matmul_precision=highest"],
    }
    for size, remat in zip(batches, ("none", "dots"), strict=True):
        yield Part(
            f"training step, batch {size}, remat {remat}",
            benchmark("train", f"--model={ours}", "--dtype=bfloat16", f"--batch_size={size}",
                      f"--remat={remat}", *quick),
            "MFU of the ceiling 45%", utilisation,
        )  # fmt: skip
    for dtype, flags in precisions.items():
        for size, bar in zip(sizes, (2.7, 3.1), strict=True):
            yield Part(
                f"beside {theirs} at {size}x{size} in {dtype}",
                benchmark("forward", f"--model={ours}", f"--compare={theirs}", *flags,
                          f"--batch_size={batch}", f"--image_size={size}", *quick),
                f"{bar} times as fast", times_as_fast(bar),
            )  # fmt: skip
    if options.reference:
        for size in batches:
            released = [
                sys.executable, str(HERE / "vs_pytorch.py"), f"--reference={options.reference}",
                "--device=cuda", "--model=DiCo-XL", "--dtype=bfloat16", f"--batch_size={size}",
                "--tasks", "forward", "--ceiling_size=8192",
            ]  # fmt: skip
            if options.torch_python:
                released.append(f"--torch_python={options.torch_python}")
            compiled = [*released, "--sides", "compile", "compile channels-last"]
            for name, bar in (("compile", 1.5), ("ceiling", 0.55)):
                yield Part(
                    f"beside the released code, batch {size}, over {name}",
                    compiled,
                    f"{bar} of {name}",
                    ratio_of_forward(name, bar),
                )
    if options.cifar10 or options.toy:
        config = "digits" if options.toy else "cifar10"
        of_data = [] if options.toy else [f"--config.data.path={options.cifar10}"]
        yield Part(
            f"{TRAINING_MINUTES} minutes of {config}",
            [sys.executable, "-m", "dico_jax.main", f"--config={HERE.parent}/configs/{config}.py",
             f"--workdir={pathlib.Path(options.out).with_suffix('')}-{config}",
             "--config.training.num_steps=1000000", *of_data],
            training=15 if options.toy else 60 * TRAINING_MINUTES,
        )  # fmt: skip


def run(part: Part, seconds: float, before: dict, figures: dict) -> dict:
    """Runs a part for at most so long.

    Args:
      part: what.
      seconds: how long.
      before: what an earlier call has found of it.
      figures: results by command, of parts that share one.

    Returns:
      "status" ("done", "failed" or "goes on"), "seconds" in all, and what was found.
    """
    found: dict[str, Any] = {"command": part.command, "bar": part.bar, "seconds": 0.0} | before
    if (key := json.dumps(part.command)) in figures:
        return found | judged(part, figures[key])
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "figures.json"
        extra = [] if part.training else [f"--out={out}"]
        process = subprocess.Popen(
            [*part.command, *extra], cwd=HERE.parent, stderr=subprocess.PIPE, text=True
        )
        limit = min(seconds, part.training - found["seconds"]) if part.training else seconds
        try:
            _, errors = process.communicate(timeout=max(limit, 1))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)  # training saves
            try:
                _, errors = process.communicate(timeout=SAVE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                _, errors = process.communicate()
        found["seconds"] += time.monotonic() - start
        if part.training:
            stopped = process.returncode in (0, 143)
            enough = found["seconds"] >= part.training
            status = ("done" if enough else "goes on") if stopped else "failed"
            return found | {"status": status, **({} if stopped else {"error": errors[-2000:]})}
        if not out.exists():  # a bar that it checks itself may be missed: then it has written
            return found | {"status": "failed", "error": errors[-2000:]}
        figures[key] = json.loads(out.read_text())
    return found | judged(part, figures[key])


def judged(part: Part, result: Any) -> dict:
    """The figure of a part beside its bar."""
    assert part.met is not None
    figure, met = part.met(result)
    return {"status": "done", "figure": figure, "met": met, "result": result}


def main() -> int:
    """Goes on with the agenda; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, help="the JSON file, also of earlier calls")
    parser.add_argument("--reference", help="a checkout of the released code")
    parser.add_argument("--torch_python", help="a Python with torch and numpy [this one]")
    parser.add_argument("--cifar10", help="folder of CIFAR-10's training pictures")
    parser.add_argument("--minutes", type=float, default=9, help="of this call [%(default)s]")
    parser.add_argument("--toy", action="store_true", help="small networks, to try the script")
    options = parser.parse_args()
    out, end = pathlib.Path(options.out), time.monotonic() + 60 * options.minutes - SAVE_SECONDS
    done: dict[str, dict] = json.loads(out.read_text())["parts"] if out.exists() else {}
    figures = {json.dumps(p["command"]): p["result"] for p in done.values() if "result" in p}
    parts, fresh = list(agenda(options)), True
    for part in parts:
        before = done.get(part.name, {})
        if before.get("status") in ("done", "failed"):
            continue
        left = end - time.monotonic()
        if not fresh and left <= 0:
            break
        found = run(part, left, before, figures)
        cut = found["status"] == "failed" and time.monotonic() >= end
        if cut and not fresh:
            break  # it has all of the next call
        done[part.name], fresh = found, False
        write_json(out, {"parts": done})
        figure = f" {found['figure']:.3f} ({part.bar})" if "figure" in found else ""
        print(f"{part.name}: {found['status']}{figure}, {found['seconds']:.0f} s", flush=True)
    open_parts = [
        p.name for p in parts if done.get(p.name, {}).get("status", "") in ("", "goes on")
    ]
    print(f"left: {', '.join(open_parts) or 'nothing'}")
    if open_parts:
        return LEFT
    return int(any(p["status"] == "failed" or p.get("met") is False for p in done.values()))


if __name__ == "__main__":
    sys.exit(main())
