"""Several processes as one run, through jax.distributed."""

import glob
import os
import sys
import threading
from collections.abc import Mapping

import jax

from dico_jax.errors import UsageError

_LATER_SECONDS = 60


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout_seconds: int = 300,
) -> None:
    """Joins the other processes of the run, if there are any. Call it before JAX is used.

    On Cloud TPU, under Slurm (srun with several tasks), Open MPI and JobSet/GKE with TPUs, JAX
    finds the others by itself. Elsewhere give all of the first three arguments, to every process.

    Args:
      coordinator_address: "host:port" of process 0, which all others can reach.
      num_processes: how many there are.
      process_id: which one this is, from 0.
      timeout_seconds: how long to wait for the others. Then the process ends with status 2 and one
        line on stderr.

    Raises:
      UsageError: an incomplete or wrong description.
    """
    given = {
        "--coordinator_address": coordinator_address,
        "--num_processes": num_processes,
        "--process_id": process_id,
    }
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        if not several_processes(os.environ):
            return
    elif missing:
        raise UsageError(f"{', '.join(missing)}: give all of {', '.join(given)}, or none")
    elif (
        process_id is not None
        and num_processes is not None
        and not (0 <= process_id < num_processes)
    ):
        raise UsageError(f"--process_id={process_id} must be in 0 to {num_processes - 1}")
    at = coordinator_address or "the address that JAX found"
    # JAX aborts the process with a stack trace when the others do not come; this is sooner.
    timer = threading.Timer(timeout_seconds, _give_up, [at, timeout_seconds])
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            initialization_timeout=timeout_seconds + _LATER_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        raise UsageError(
            f"this process cannot join the others at {at}: {str(error).splitlines()[0]}"
        ) from error
    finally:
        timer.cancel()


def _give_up(address: str, timeout_seconds: int) -> None:
    print(
        f"error: --distributed_timeout={timeout_seconds}: not all processes of this run have "
        f"joined at {address} in {timeout_seconds} s: check that every one was started, with the "
        "same address and number of processes, and can reach it",
        file=sys.stderr,
        flush=True,
    )
    os._exit(2)  # the main thread is inside JAX and cannot be woken


def several_processes(environ: Mapping[str, str]) -> bool:
    """Whether the surroundings say that this process is one of several of a run."""
    for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"):
        if int(environ.get(name, "1")) > 1 and ("SLURM_PROCID" in environ or name[0] == "O"):
            return True
    if "JAX_COORDINATOR_ADDRESS" in environ or "," in environ.get("TPU_WORKER_HOSTNAMES", ""):
        return True
    # A Cloud TPU VM may be one of a slice; its metadata server tells JAX.
    return bool(glob.glob("/dev/accel*")) or (
        bool(glob.glob("/dev/vfio/*")) and "TPU_SKIP_MDS_QUERY" not in environ
    )
