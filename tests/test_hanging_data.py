"""Signals while a run waits for data that does not come."""

import os
import signal
import subprocess
import sys

import pytest

from dico_jax.checkpoints.reader import saved_steps
from tests.commands import HURRY, ROOT
from tests.test_interrupts import ENDLESS, wait_for

# The examples of about 12 batches can be read.
HANGING = """
import itertools, runpy, threading
from dico_jax.data.pipeline import training_batches
from dico_jax.training import run

def hangs(source, read, *args, batch_size, **how):
    count = itertools.count()
    def slow(image, mirrored):
        if next(count) > 12 * batch_size:
            threading.Event().wait()
        return read(image, mirrored)
    return training_batches(source, slow, *args, batch_size=batch_size, **how)

run.training_batches = hangs
runpy.run_module("dico_jax.main", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status", "name"), [(signal.SIGTERM, 143, "SIGTERM"), (signal.SIGINT, 130, "^C")]
)
def test_a_signal_saves_the_last_step_where_data_hang(tmp_path, number, status, name):
    process = subprocess.Popen(
        [sys.executable, "-c", HANGING, *ENDLESS, f"--workdir={tmp_path}",
         "--config.training.stall_warning_seconds=2"],
        cwd=ROOT, env=os.environ | {"XLA_FLAGS": HURRY, "JAX_PLATFORMS": "cpu"}, bufsize=0,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        wait_for(process, "no step has ended for .* after step [1-9]")
        process.send_signal(number)
        text = process.communicate(timeout=30)[0].decode()
    finally:
        process.kill()
    assert process.returncode == status, text
    (step,) = saved_steps(tmp_path)
    assert f"{name}: step {step} is saved; the same command goes on" in text
    assert "Traceback" not in text
