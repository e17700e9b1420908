"""Plans beside runs: scaled by one's measured speed, compared with one that is about to start."""

import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dico_jax.benchmarking.programs import compile_ahead
from dico_jax.checkpoints.reader import saved_steps
from dico_jax.config import SCHEMES, config_to_dict, flatten, with_defaults
from dico_jax.errors import UsageError
from dico_jax.files import as_path, is_remote
from dico_jax.parallel.mesh import batch_sharding
from dico_jax.planning import aot, planner
from dico_jax.planning.chips import Slice
from dico_jax.training.run import Run

_STEPS = 3  # that a dry run takes and times


def calibration(workdir: str, where: Slice) -> float:
    """The measured step time of a run on such a slice over the middle of its estimated range.

    UsageError where the workdir has no config or no measured speed.
    """
    folder = as_path(workdir)
    try:
        config = ConfigDict(with_defaults(json.loads((folder / "config.json").read_text())))
        speeds = recorded_speeds(workdir)
    except (OSError, ValueError) as error:
        raise UsageError("--calibrate", workdir, f"is no workdir of a run: {error}") from error
    if not speeds:
        raise UsageError("--calibrate", workdir, "has no images_per_second in metrics.jsonl yet")
    least, most = planner.prepare(config, where)[0].time.total
    return config.data.batch_size / statistics.median(speeds) / (least * most) ** 0.5


def recorded_speeds(workdir: str) -> list[float]:
    """Images per second of every report of a run but the first, which may have compiled."""
    file, found = as_path(workdir) / "metrics.jsonl", []
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            found.append(float(json.loads(line)["images_per_second"]))
        except (ValueError, LookupError, TypeError):  # of another kind, or cut short
            continue
    return found[1:] or found


def read_plan(file: str) -> dict[str, Any]:
    """What `dico_jax.plan --out` wrote; or UsageError."""
    try:
        plan = json.loads(as_path(file).read_text())
        for part in ("config", "devices", "versions", "flags"):
            plan[part]
    except (OSError, ValueError, LookupError, TypeError) as error:
        fix = "is no plan that dico_jax.plan --out has written"
        raise UsageError("--plan", file, fix) from error
    return plan


def compare(file: str, config: ConfigDict) -> None:
    """Warns of what is not as a plan has it."""
    for text in differences(read_plan(file), config) if jax.process_index() == 0 else ():
        print(f"warning: --plan={file}: {text}", file=sys.stderr)


def differences(plan: Mapping[str, Any], config: ConfigDict) -> Iterator[str]:
    """What the run that is about to start has otherwise than it was planned."""
    devices = jax.devices()
    found = {"devices": f"{len(devices)} x {devices[0].device_kind}"}
    planned = {"devices": "{count} x {kind}".format(**plan["devices"])}
    found |= {f"config.{k}": v for k, v in flatten(config_to_dict(config)).items()}
    planned |= {f"config.{k}": v for k, v in plan["config"].items()}
    found |= {name: os.environ.get(name, "") for name in plan["flags"]}
    planned |= plan["flags"]
    versions = aot.about()["versions"]
    found |= {f"version of {name}": versions.get(name) for name in plan["versions"]}
    planned |= {f"version of {name}": version for name, version in plan["versions"].items()}
    for name in sorted(found.keys() | planned.keys()):
        is_path = name.removeprefix("config.") in SCHEMES
        unset = name == "config.model.num_classes" and found.get(name) is None
        if not is_path and not unset and found.get(name) != planned.get(name):
            yield f"{name} is {found.get(name)!r}, and {planned.get(name)!r} was planned"


def dry_run(config: ConfigDict, workdir: str, allowed: Sequence[str] = ()) -> None:
    """Checks all that a run needs, and prints what it would do; nothing is written.

    The step is compiled and taken a few times with zeros. UsageError for what does not work.
    """
    run = Run(config, workdir, allowed)
    config, training, start = run.config, run.config.training, max(saved_steps(workdir), default=0)
    state = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(run.target))
    lines = [run.describe(start), _saves(config, workdir, state, start)]
    seconds, memory = _time_steps(run)
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    has = f" of {limit / 1e9:.2f} GB" if limit else ""
    lines.append(f"a step needs {memory / 1e9:.2f} GB of a device{has}")
    if limit and memory > limit:
        fix = "do not fit: try --config.model.remat=blocks, --config.mesh.fsdp or a smaller batch"
        raise UsageError(f"{lines[-1]}, which {fix}")
    left = training.num_steps - start
    lines.append(
        f"a step takes {seconds:.3g} s, {config.data.batch_size / seconds:,.0f} images per second: "
        f"{left * seconds / 3600:,.2f} h for the {left:,} steps that are left, without data, "
        "samples and saves"
    )
    if jax.process_index() == 0:
        print(*lines, "no step was kept: without --dry_run it starts", sep="\n")


def _saves(config: ConfigDict, workdir: str, state: int, start: int) -> str:
    training, left = config.training, config.training.num_steps - start
    count = -(-left // training.checkpoint_every_steps)
    kept = min(count, training.keep_checkpoints)
    forever = left // training.keep_every_steps if training.keep_every_steps else 0
    old = len(saved_steps(workdir))  # which make room
    needed = (max(0, kept - old) + forever + 1) * state  # one more while it is written
    text = f"saves {count} times, {state / 1e9:.2f} GB each, keeps {kept + forever}"
    if is_remote(workdir):
        return text
    folder = as_path(workdir).absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        fix = f"needs {needed / 1e9:.2f} GB for checkpoints, and {free / 1e9:.2f} GB are free there"
        raise UsageError("--workdir", workdir, fix)
    return f"{text}: {needed / 1e9:.2f} GB of {free / 1e9:.2f} GB that are free"


def _time_steps(run: Run) -> tuple[float, int]:
    """The median of a few steps in seconds, and the bytes that one needs on a device."""
    model, size = run.experiment.model, run.config.data.batch_size
    x = np.zeros((size, *run.experiment.latent_shape), np.float32)
    given = {"x": x, "condition": model.from_read(model.zero_condition(size))}
    batch = jax.device_put(given, batch_sharding(run.mesh))
    found = compile_ahead(run.train_step, run.stacked, batch)
    state = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding), run.stacked
    )
    times = []
    for _ in range(_STEPS):
        before = time.perf_counter()
        state, _ = jax.block_until_ready(found.executable(state, batch, jnp.int32(0)))
        times.append(time.perf_counter() - before)
    return statistics.median(times), aot.describe(found).memory
