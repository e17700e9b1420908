"""Compiled ahead of time for TPU, without one: the bytes of DiCo-XL."""

import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("libtpu", reason="compiling for TPU needs the package libtpu")

PROGRAM = pathlib.Path(__file__).resolve().parents[1] / "benchmarks" / "tpu_bytes.py"


@pytest.mark.slow
def test_bytes_of_dico_xl_are_within_the_bar():
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, str(PROGRAM)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "times the ideal" in done.stdout
