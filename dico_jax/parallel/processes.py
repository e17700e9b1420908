"""Several processes as one run, through jax.distributed."""

import glob
import os
import sys
import threading
from collections.abc import Mapping
from typing import Any, NoReturn

import jax

from dico_jax.errors import UsageError


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout_seconds: int = 300,
) -> None:
    """Joins the other processes of the run, if there are any. Call it before JAX is used.

    Where JAX does not find the others, give the first three arguments. Where they do not come in
    time, the process ends with status 2 and one line on stderr.
    """
    names = "--coordinator_address", "--num_processes", "--process_id"
    parts = coordinator_address, num_processes, process_id
    missing = [name for name, value in zip(names, parts, strict=True) if value is None]
    if len(missing) == len(names) and not several_processes(os.environ):
        return
    if 0 < len(missing) < len(names):
        raise UsageError(f"{', '.join(missing)}: give all of {', '.join(names)}, or none")
    if not missing and process_id not in range(num_processes or 0):
        raise UsageError("--process_id", process_id, f"must be in 0 to {(num_processes or 0) - 1}")
    at = coordinator_address or "the address that JAX found"
    # JAX aborts the process with a stack trace when the others do not come; this is sooner.
    failed = f"not all processes of this run have joined at {at} in {timeout_seconds} s: check"
    fix = "that every one was started, with the same address and number of processes"
    text = f"--distributed_timeout={timeout_seconds}: {failed} {fix}"
    timer = threading.Timer(timeout_seconds, end, [text, 2])
    timer.start()
    how: Any = {"initialization_timeout": timeout_seconds + 60}
    how["heartbeat_timeout_seconds"] = min(timeout_seconds, 100)
    try:
        jax.distributed.initialize(*parts, **how)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"this process cannot join the others at {at}: {reason}") from error
    finally:
        timer.cancel()


def end(text: str, status: int) -> NoReturn:
    """Ends this process now: the main thread is inside JAX, or would wait for the others there."""
    print(f"\nerror: {text}", file=sys.stderr)  # below the progress bar
    os._exit(status)


def several_processes(environ: Mapping[str, str]) -> bool:
    return (
        (int(environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in environ)
        or int(environ.get("OMPI_COMM_WORLD_SIZE", "1")) > 1
        or "JAX_COORDINATOR_ADDRESS" in environ
        or "," in environ.get("TPU_WORKER_HOSTNAMES", "")
        or bool(glob.glob("/dev/accel*"))  # a Cloud TPU VM may be one of a slice, which JAX is told
        or (bool(glob.glob("/dev/vfio/*")) and "TPU_SKIP_MDS_QUERY" not in environ)
    )
