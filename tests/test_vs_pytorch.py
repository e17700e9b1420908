"""What the comparison with the released code refuses; its measurements need that code."""

import os
import pathlib
import subprocess
import sys

import pytest

PROGRAM = pathlib.Path(__file__).parent.parent / "benchmarks" / "vs_pytorch.py"


@pytest.fixture
def reference(tmp_path):
    """A folder with what the released code has by name."""
    (tmp_path / "dico_models.py").write_text("DiT_models = {}\n")
    return tmp_path


def refused(*arguments, **environment):
    """The one line that the program ends with, for wrong usage."""
    command = [sys.executable, str(PROGRAM), *map(str, arguments)]
    ended = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert ended.returncode == 2, ended.stderr
    assert not ended.stdout
    (line,) = ended.stderr.splitlines()
    return line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model=DiCo-Q"], "--model=DiCo-Q: model.name='DiCo-Q' is unknown: use"),
        (["--image_size=250"], "--image_size=250: use a multiple of 64"),
        (["--batch_size=0"], "--batch_size=0: use 1 or more"),
        (["--model=DiT-S/2"], "has no dit_models.py: name a checkout of https://github.com/"),
        (["--torch_python=none/python"], "none/python is not there: name a Python that has torch"),
    ],
)
def test_wrong_usage(reference, arguments, message):
    assert message in refused(f"--reference={reference}", *arguments)


def test_a_python_without_pytorch(reference):
    """The folder's own torch.py stands in the way of any other."""
    (reference / "torch.py").write_text("raise ImportError('no PyTorch here')\n")
    line = refused(f"--reference={reference}", PYTHONPATH=str(reference))
    assert "cannot import torch, numpy" in line
    assert "no PyTorch here" in line


def test_a_folder_that_is_not_there(reference):
    (reference / "torch.py").write_text("")
    out = reference / "none" / "figures.json"
    line = refused(f"--reference={reference}", f"--out={out}", PYTHONPATH=str(reference))
    assert line == f"--out={out}: its folder is not there: make it first"
