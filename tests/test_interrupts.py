"""Ctrl-C, and workers that outlive or are outlived."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from tests.commands import HURRY, ROOT
from tests.test_commands import QUICK

ENDLESS = [*QUICK, "--config.training.num_steps=100000", "--config.training.log_every_steps=1"]
OFTEN = ["--config.training.checkpoint_every_steps=1"]
GRIDS = ["--config.sampling.grid_every_steps=1", "--config.sampling.num_steps=200"]
COMPILING, TRAINING = r"steps 0 to", r"[1-9][0-9]*/100000 \[.*loss"


def start(workdir, *args):
    """A run in a group of its own, which Ctrl-C reaches as from a terminal."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": HURRY, "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [sys.executable, "-m", "dico_jax.main", *ENDLESS, f"--workdir={workdir}", *args],
        cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0,
        start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def wait_for(process, pattern):
    """Reads until the pattern comes; what was read."""
    text = ""
    while not re.search(pattern, text):
        part = os.read(process.stdout.fileno(), 1 << 16)
        assert part, text
        text += part.decode(errors="replace")
    return text


def interrupt(process):
    """Ctrl-C once: what is printed from then on, and the seconds that it takes to the end."""
    started = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    text = process.communicate(timeout=60)[0].decode(errors="replace")
    return text, time.monotonic() - started


MOMENTS = [
    *[(COMPILING, delay, []) for delay in (0.0, 0.3, 0.6, 1.0, 1.5, 2.0, 3.0, 4.0)],
    *[(TRAINING, delay, []) for delay in (0.0, 0.1, 0.2, 0.4, 0.8, 1.5)],
    *[(TRAINING, delay, OFTEN) for delay in (0.0, 0.15, 0.5, 1.0)],
    *[(COMPILING, delay, GRIDS) for delay in (5.0, 7.0, 15.0, 16.5)],
]


@pytest.mark.slow
def test_ctrl_c_at_any_moment_ends_soon_and_without_a_crash(tmp_path):
    assert len(MOMENTS) == 22
    for number, (pattern, delay, args) in enumerate(MOMENTS):
        process = start(tmp_path / str(number), *args)
        try:
            wait_for(process, pattern)
            time.sleep(delay)
            text, seconds = interrupt(process)
        finally:
            process.kill()
        shown = f"{pattern} + {delay} {args}: {process.returncode} after {seconds:.1f} s\n{text}"
        print(shown)
        assert process.returncode == 130, shown
        assert seconds < 5, shown
        assert "Traceback" not in text, shown
        assert "saving step" in text or "interrupted" in text, shown
        if "is saved" in text:
            step = re.search(r"step (\d+) is saved", text)[1]
            assert (tmp_path / str(number) / "checkpoints" / step / "_CHECKPOINT_METADATA").exists()


def workers_of(process):
    """The process ids of its children that read data, of those that live."""
    children = subprocess.run(
        ["pgrep", "-g", str(process.pid), "-f", "spawn_main"], capture_output=True, text=True
    )
    return [int(number) for number in children.stdout.split()]


@pytest.mark.slow
def test_workers_go_with_their_parent_and_one_that_is_killed_is_one_line(tmp_path):
    with_workers = ["--config.data.num_workers=2"]
    process = start(tmp_path / "killed", *with_workers)
    wait_for(process, TRAINING)
    assert len(workers_of(process)) == 2
    process.kill()
    for _ in range(50):
        if not workers_of(process):
            break
        time.sleep(0.1)
    assert not workers_of(process)
    process.communicate()

    process = start(tmp_path / "interrupted", *with_workers)
    wait_for(process, COMPILING)
    time.sleep(2)
    text, seconds = interrupt(process)
    assert process.returncode == 130, text
    assert seconds < 5

    process = start(tmp_path / "worker", *with_workers)
    wait_for(process, TRAINING)
    os.kill(workers_of(process)[0], signal.SIGKILL)
    text = process.communicate(timeout=60)[0].decode(errors="replace")
    assert process.returncode == 1, text
    (error,) = [line for line in re.split("[\r\n]+", text) if line.startswith("error: ")]
    assert "a worker that reads data is gone" in error
    assert "Traceback" not in text
