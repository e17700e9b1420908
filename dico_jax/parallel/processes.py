"""Several processes as one run, through jax.distributed."""

import contextlib
import glob
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Client, Listener
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from dico_jax.errors import UsageError, one_line


def initialize(
    coordinator_address: str | None = None, num_processes=None, process_id=None, timeout_seconds=300
) -> None:
    """Joins the other processes of the run, if there are any, before JAX is used; or UsageError."""
    names = "--coordinator_address", "--num_processes", "--process_id"
    parts = coordinator_address, num_processes, process_id
    missing = [name for name, value in zip(names, parts, strict=True) if value is None]
    if len(missing) == len(names) and not several_processes(os.environ):
        return
    if 0 < len(missing) < len(names):
        raise UsageError(f"{', '.join(missing)}: give all of {', '.join(names)}, or none")
    if not missing and process_id not in range(num_processes or 0):
        raise UsageError("--process_id", process_id, f"must be in 0 to {(num_processes or 0) - 1}")
    address = coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS", "")
    at = address or "the address that JAX found"
    # JAX aborts the process with a stack trace when the others do not come; this is sooner.
    failed = f"--distributed_timeout={timeout_seconds}: not all processes of this run have joined"
    fix = "check that every one was started, with the same address and number of processes"
    timer = threading.Timer(timeout_seconds, end, [f"{failed} at {at}: {fix}", 2])
    timer.start()
    Heartbeat.host, Heartbeat.silence = address.rpartition(":")[0], min(timeout_seconds, 90)
    limits = ("initialization_timeout", "heartbeat_timeout_seconds")  # JAX aborts: ours come first
    how: Any = dict.fromkeys(limits, timeout_seconds + 60)
    try:
        jax.distributed.initialize(*parts, **how)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"this process cannot join the others at {at}: {reason}") from error
    finally:
        timer.cancel()


def end(text: str, status: int) -> NoReturn:
    """Ends this process now: the main thread is inside JAX, or would wait for the others there."""
    os.write(2, f"\nerror: {text}\n".encode())  # below the bar; whole, JAX may write too
    os._exit(status)


def several_processes(environ: Mapping[str, str]) -> bool:
    return (
        (int(environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in environ)
        or int(environ.get("OMPI_COMM_WORLD_SIZE", "1")) > 1
        or "JAX_COORDINATOR_ADDRESS" in environ
        or "," in environ.get("TPU_WORKER_HOSTNAMES", "")
        or bool(glob.glob("/dev/accel*"))  # a Cloud TPU VM may be one of a slice
        or (bool(glob.glob("/dev/vfio/*")) and "TPU_SKIP_MDS_QUERY" not in environ)
    )


class Heartbeat(contextlib.AbstractContextManager):
    """While it lasts, a process of the run that is gone ends this one too, in one line.

    Each and process 0 tell each other every second that they are there, or "STATUS TEXT" last.
    """

    current: Any = None
    host, silence, grace = "", 90, 3  # of process 0, if known; seconds; and to end by itself

    def __init__(self, go_on: Callable[[], str]):
        self._go_on, self._me, self._peers = go_on, 0, dict[int, Any]()
        self._left, self._ending = threading.Event(), threading.Lock()
        if jax.distributed.is_initialized():
            Heartbeat.current, self._me = self, jax.process_index()
            listener: Any = None if self._me else Listener(("", 0), backlog=128)
            host, port = self.host or socket.gethostname(), listener and listener.address[1]
            said = f"{secrets.token_hex(8)} {host} {port}".encode().ljust(300)
            said = multihost_utils.broadcast_one_to_all(np.frombuffer(said, np.uint8)).tobytes()
            self._start(self._meet, listener, *said.decode().split())
            self._start(self._beat)

    def _start(self, target: Callable, *args) -> None:
        threading.Thread(target=target, args=args, daemon=True).start()

    def _meet(self, listener: Any, key: str, host: str, port: str) -> None:
        while listener:
            with contextlib.suppress(OSError, EOFError, ValueError):  # of strangers without key
                peer = listener.accept()
                if peer.poll(5) and (hello := peer.recv_bytes(64).decode()).startswith(key):
                    self._start(self._listen, int(hello[len(key) :]), peer)
        with contextlib.suppress(OSError):  # JAX is left, which aborts
            peer = Client((host, int(port)))
            peer.send_bytes(f"{key}{self._me}".encode())
            self._listen(0, peer)

    def _beat(self) -> None:
        while not self._left.wait(1):
            self._tell("")

    def _tell(self, said: str, last: bool = False) -> None:
        for peer in list(self._peers.values()):
            with contextlib.suppress(OSError):
                peer.send_bytes(said.encode())
        until = time.monotonic() + 2 * self.grace * last
        while self._me == 0 and self._peers and time.monotonic() < until:
            time.sleep(0.05)  # without process 0 JAX aborts them before they can say why

    def _listen(self, index: int, peer: Any) -> None:
        self._peers[index], said, silent = peer, b"", f" (silent for {self.silence} s)"
        try:
            while not said and peer.poll(self.silence):
                said = peer.recv_bytes()
        except (OSError, EOFError):  # closed by its kernel
            silent = ""
        del self._peers[index]
        text = said.decode() or f"1 process {index} is gone{silent}"
        status, _, why = text.partition(" ")
        if status != "0" and not self._left.wait(self.grace if said else 0):
            self._ending.acquire()  # for good: the first is the cause of all others
            self._tell(text, last=True)
            end(f"{why}: {self._go_on()}" if status == "1" else why, int(status))

    def leave(self, status: int, why: str = "") -> None:
        """Tells the others that this process ends; where the status is not 0, they end as well."""
        if not self._left.is_set():
            self._left.set()
            self._tell(f"{status} process {self._me} has ended with status {status}{why}", True)

    def __exit__(self, kind, error, traceback):
        ours = isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAU" not in str(error)
        if self._peers and ours:  # most likely of another's end, which `_listen` is about to name
            time.sleep(self.silence + self.grace)
        known = {type(None): 0, SystemExit: 0, KeyboardInterrupt: 130, UsageError: 2, object: 1}
        status = next(known[kind] for kind in known if isinstance(error, kind))
        self.leave(status, f": {one_line(error)[:500]}" * bool(str(error)))
