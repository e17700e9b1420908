"""The first thing a user does: train on the digits, sample, and judge the samples."""

import re

import pytest

from tests.commands import call, compiler_flags


# The shorter run has a narrower network, which learns faster, and compiles in less of a hurry than
# other tests: its steps take longer than the compiler.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_steps", "learning_rate", "width", "sampling_steps", "lowest", "xla_flags"),
    [
        (250, 0.01, 16, 25, 75, compiler_flags(1)),
        (400, 0.004, 24, 50, 85, ""),
    ],
    ids=["shorter", "longer"],
)
def test_a_short_run_draws_digits(
    tmp_path, num_steps, learning_rate, width, sampling_steps, lowest, xla_flags
):
    """A part of the full run in a hurry, with a lower bar; docs/results.md has the full one."""
    done = call(
        "dico_jax.main",
        "--config=configs/digits.py",
        f"--workdir={tmp_path / 'run'}",
        f"--config.training.num_steps={num_steps}",
        f"--config.optimizer.learning_rate={learning_rate}",
        f"--config.model.hidden_size={width}",
        "--config.training.ema_decay=0.95",
        f"--config.sampling.num_steps={sampling_steps}",
        "--config.sampling.grid_every_steps=0",
        "--config.eval.class_agreement_samples=200",
        xla_flags=xla_flags,
    )
    assert done.returncode == 0, done.stderr
    numbers = re.search(
        r"class agreement ([\d.]+)% of 200 samples, spread ([\d.]+) .*right on ([\d.]+)%",
        done.stdout,
    )
    agreement, spread, classifier = map(float, numbers.groups())
    assert classifier >= 97
    assert agreement >= lowest  # a tenth would be chance
    assert 0.7 <= spread <= 1.3  # 1 is the spread of the real digits


@pytest.mark.slow
@pytest.mark.parametrize(("config", "lowest"), [("digits_flow", 98), ("digits_mean_flow", 90)])
def test_other_objectives_draw_digits(tmp_path, config, lowest):
    """The whole runs; the second one's samples take one evaluation of the network each."""
    done = call("dico_jax.main", f"--config=configs/{config}.py", f"--workdir={tmp_path / 'run'}",
                xla_flags="")  # fmt: skip
    assert done.returncode == 0, done.stderr
    numbers = re.search(r"class agreement ([\d.]+)% of 500 samples, spread ([\d.]+)", done.stdout)
    agreement, spread = map(float, numbers.groups())
    assert agreement >= lowest
    assert 0.7 <= spread <= 1.3
