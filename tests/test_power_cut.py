"""A power cut: images of a disk that are taken while a run saves all the time.

The run's folder is on an ext4 in a file. What that file holds at a moment is what a disk would hold
if the power were cut then: mounted, it has what the kernel had written by then, and no more.
"""

import contextlib
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from dico_jax.checkpoints.reader import SavedWeights, saved_steps, verified
from dico_jax.errors import UsageError

ROOT = pathlib.Path(__file__).resolve().parents[1]
MOMENTS = 10  # of each rule of keeping
RUN = [
    sys.executable, "-m", "dico_jax.main", "--config=configs/digits.py",
    "--config.data.batch_size=16", "--config.model.name=DiT", "--config.model.hidden_size=8",
    "--config.model.depth=1", "--config.model.num_heads=1", "--config.model.patch_size=4",
    "--config.training.num_steps=100000", "--config.training.checkpoint_every_steps=1",
    "--config.training.log_every_steps=1", "--config.sampling.grid_every_steps=0",
    "--config.eval.class_agreement_samples=0",
]  # fmt: skip


@contextlib.contextmanager
def mounted(image, folder):
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-o", "loop", image, folder], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"needs loop devices to mount: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def readable(workdir):
    """The steps that can be read, whole."""
    found = set()
    for step in saved_steps(workdir):
        with contextlib.suppress(UsageError, OSError):
            verified(workdir / "checkpoints" / str(step))
            for leaf in SavedWeights(str(workdir), step).leaves("ema").values():
                leaf.read()
            found.add(step)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("keep", [1, 3])
def test_what_was_saved_survives_a_power_cut(tmp_path, keep):
    if os.geteuid() or not all(map(shutil.which, ("mkfs.ext4", "mount", "umount"))):
        pytest.skip("needs root and mkfs.ext4")
    disk = tmp_path / "disk.img"
    with disk.open("wb") as file:
        file.truncate(192 << 20)
    subprocess.run(["mkfs.ext4", "-q", disk], check=True)
    moments = random.Random(keep)
    with mounted(disk, tmp_path / "disk") as folder:
        workdir = folder / "run"
        command = [*RUN, f"--workdir={workdir}", f"--config.training.keep_checkpoints={keep}"]
        with (tmp_path / "out.txt").open("w") as out:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                stdout=out,
                stderr=out,
            )
        try:
            for moment in range(MOMENTS):
                before = saved_steps(workdir)
                while not saved_steps(workdir) - before:
                    assert process.poll() is None, (tmp_path / "out.txt").read_text()[-2000:]
                    time.sleep(0.001)
                time.sleep(moments.random() * 0.3)
                process.send_signal(signal.SIGSTOP)
                said = saved_steps(workdir)
                copy = tmp_path / f"{moment}.img"
                subprocess.run(["cp", "--sparse=always", disk, copy], check=True)
                process.send_signal(signal.SIGCONT)
                with mounted(copy, tmp_path / f"cut{moment}") as cut:
                    steps = readable(cut / "run")
                    assert said & steps, (said, steps, list((cut / "run").rglob("*")))
                    assert max(said) in steps, (said, steps)
                    assert (cut / "run" / "config.json").read_text().startswith("{")
                copy.unlink()
        finally:
            process.kill()
            process.wait()
