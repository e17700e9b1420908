"""The commands as a user types them, in processes of their own.

Importing JAX and its friends takes longer than most commands that are refused. So a process that
has imported them, and nothing of this package, waits to be forked; `fresh=True` does without.
"""

import importlib.metadata
import multiprocessing
import os
import pathlib
import runpy
import socket
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]


def compiler_flags(optimization_level):
    """A compiler in a hurry, for tests and commands that compute little."""
    flags = f"--xla_backend_optimization_level={optimization_level}"
    flags += " --xla_llvm_disable_expensive_passes=true"
    if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones do not know the flag
        flags += " --xla_cpu_use_fusion_emitters=false"  # a third less time in the compiler
    return flags


HURRY = compiler_flags(0)
_TIMEOUT = 600

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(
    [
        "jax.numpy",
        "flax.linen",
        "optax",
        "orbax.checkpoint",
        "grain",
        "ml_collections",
        "PIL.Image",
        "tensorboardX",
        "sklearn.datasets",
        "sklearn.model_selection",
        "sklearn.svm",
    ]
)


def call(module, *args, cwd=ROOT, devices=1, xla_flags=HURRY, fresh=False):
    """Runs `python -m MODULE ARGS`; what `subprocess.run` returns.

    On so many CPU devices, or where `devices` is None on those that the command makes.
    """
    command = [sys.executable, "-m", module, *map(str, args)]
    env = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {xla_flags}",
        "PYTHONPATH": str(ROOT),
    }
    if devices is None:
        env["XLA_FLAGS"] = xla_flags
    if fresh:
        return subprocess.run(
            command, cwd=cwd, env=env, capture_output=True, text=True, timeout=_TIMEOUT, check=False
        )
    with tempfile.TemporaryDirectory() as folder:
        files = [os.path.join(folder, name) for name in ("stdout", "stderr")]
        process = _server.Process(target=_run, args=(command[2:], cwd, env, files))
        process.start()
        process.join(_TIMEOUT)
        if process.is_alive():
            process.kill()
            raise subprocess.TimeoutExpired(command, _TIMEOUT)
        texts = [pathlib.Path(file).read_text() for file in files]
    return subprocess.CompletedProcess(command, process.exitcode, *texts)


def call_together(num_processes, devices_each, module, *args):
    """Runs a command as several processes of one run on this machine, each with CPU devices.

    Returns what each has printed, once all have ended well.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = f"--xla_force_host_platform_device_count={devices_each} {HURRY}"
    processes = []
    for index in range(num_processes):
        joined = [f"--coordinator_address={address}", f"--num_processes={num_processes}"]
        joined += [f"--process_id={index}"]
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", module, *args, *(joined if num_processes > 1 else [])],
                cwd=ROOT,
                env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    outputs = [process.communicate(timeout=_TIMEOUT)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * num_processes, outputs
    return outputs


def _run(command, cwd, env, files):
    for number, name in enumerate(files, start=1):
        file = os.open(name, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    module, *args = command
    sys.argv = [module, *args]
    sys.path[0] = str(cwd)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def assert_refused(done, *parts):
    """Exit status 2, and one line on stderr that has all parts."""
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0], lines[0]
