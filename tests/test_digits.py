"""The first thing a user does: train on the digits, sample, and judge the samples."""

import re

from tests.commands import call


def test_a_short_run_draws_digits(tmp_path):
    """A quarter of the full run in a hurry, with a lower bar; docs/results.md has the full one."""
    done = call(
        "dico_jax.main",
        "--config=configs/digits.py",
        f"--workdir={tmp_path / 'run'}",
        "--config.training.num_steps=400",
        "--config.optimizer.learning_rate=0.004",
        "--config.training.ema_decay=0.95",
        "--config.sampling.num_steps=50",
        "--config.sampling.grid_every_steps=0",
        "--config.eval.class_agreement_samples=200",
        xla_flags="",
    )
    assert done.returncode == 0, done.stderr
    numbers = re.search(
        r"class agreement ([\d.]+)% of 200 samples, spread ([\d.]+) .*right on ([\d.]+)%",
        done.stdout,
    )
    agreement, spread, classifier = map(float, numbers.groups())
    assert classifier >= 97
    assert agreement >= 85  # a tenth would be chance
    assert 0.7 <= spread <= 1.2  # 1 is the spread of the real digits
