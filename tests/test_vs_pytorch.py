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
        (["--model=DiCo-Q"], "model.name='DiCo-Q' is unknown: use"),
        (["--image_size=250"], "--image_size=250: use a multiple of 32"),
        (["--batch_size=0"], "--batch_size=0: use 1 or more"),
        (["--model=DiT-S/2"], "has no dit_models.py: name a checkout of https://github.com/"),
        (["--torch_python=none/python"], "--torch_python=none/python does not run (No such file"),
        (["--torch_python=."], "--torch_python=. does not run (Permission denied)"),
        (["--out=none/figures.json"], "--out=none/figures.json: there is no folder"),
        (["--out=figures"], "--out=figures: name a .json file"),
    ],
)
def test_wrong_usage(reference, arguments, message):
    assert message in refused(f"--reference={reference}", *arguments)


@pytest.mark.parametrize(
    ("torch", "arguments", "reason"),
    [
        ("raise ImportError('no PyTorch')", [], "no PyTorch"),
        ("", ["--device=cuda"], "module 'torch' has no attribute 'cuda'"),
    ],
)
def test_a_pytorch_that_cannot_do_it(reference, torch, arguments, reason):
    """The folder's own torch.py stands in the way of any other."""
    (reference / "torch.py").write_text(torch)
    line = refused(f"--reference={reference}", *arguments, PYTHONPATH=str(reference))
    assert "fails at 'import torch, numpy" in line
    assert reason in line


def test_a_result_that_is_there_already(reference):
    out = reference / "figures.json"
    out.write_text("kept")
    assert "exists: give another name" in refused(f"--reference={reference}", f"--out={out}")
    assert out.read_text() == "kept"
