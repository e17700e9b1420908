"""Small inputs that failed once, each of them a script of commands, end as their notes say.

The folder is `cases` beside the golden numbers. Cases that write PyTorch files need TORCH_PY, a
Python with torch, numpy, safetensors and omegaconf; those that fill a disk need root.
"""

import os
import re
import shutil
import subprocess
import sys

import pytest

from tests import golden
from tests.commands import ROOT

FOLDER = golden.FOLDER.parent / "cases"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no cases at {FOLDER}"),
]
needs_torch = pytest.mark.skipif("TORCH_PY" not in os.environ, reason="TORCH_PY is not set")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")


class Done:
    """What a case has printed: the commands' statuses and last lines, in order, and the rest."""

    def __init__(self, text):
        self.text = text
        self.statuses = [int(status) for status in re.findall(r"^rc=(-?\d+)$", text, re.M)]
        self.lines = re.split(r"^rc=-?\d+$", text, flags=re.M)


@pytest.fixture
def case(tmp_path):
    def run(name):
        path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
        env = os.environ | {"PROJECT": str(ROOT), "W": str(tmp_path), "T": "900", "PATH": path}
        done = subprocess.run(
            ["bash", FOLDER / name / "repro.sh"],
            env=env, capture_output=True, text=True, timeout=1200, check=False,
        )  # fmt: skip
        assert "Traceback" not in done.stdout, done.stdout
        return Done(done.stdout)

    if shutil.which("bash") is None:
        pytest.skip("no bash")
    return run


def _one_line(done, index, *parts):
    """The command was refused in one line that has the parts."""
    assert done.statuses[index] == 2, done.text
    for part in ("error: ", *parts):
        assert part in done.lines[index], done.text


def test_labels_of_dataset_json_are_read(case):
    done = case("edm_dataset_json")
    assert done.statuses == [0], done.text
    assert '"num_classes": 4' in done.text


@needs_torch
def test_averages_are_found(case):
    done = case("ema_silently_raw")
    assert "FAULT" not in done.text
    assert done.text.count("averaged, right") >= 5


def test_flags(case):
    done = case("flag_tracebacks")
    *refused, last = done.statuses[1:]
    assert done.statuses[0] == 0
    assert set(refused) == {2}, done.text
    assert last in (0, 124, 130, 137, 143), done.text  # it trains, for longer than some can wait
    assert all("error: " in lines for lines in done.lines[1 : len(refused) + 1])
    assert "gs:/" not in done.lines[-2].split("error: ")[0].replace("gs://", "")


def test_pixels_are_not_latents(case):
    _one_line(case("float_pixels"), 0, "[-1, 1]")


def test_the_order_of_files_does_not_matter(case):
    done = case("inception_score_order")
    scores = [float(n) for n in re.findall(r"inception_score\D+([\d.]+)", done.text)]
    assert len(scores) == 2, done.text
    assert scores[0] == pytest.approx(scores[1], rel=0.01)


def test_a_damaged_line(case):
    assert case("log_line_damaged").statuses == [0, 0]


@needs_torch
def test_what_is_not_finite_is_no_picture(case):
    done = case("nan_black_images")
    assert done.statuses[:4] == [0, 0, 0, 1], done.text
    assert done.statuses[4] == 2, done.text


def test_heads_come_back(case):
    done = case("num_heads_roundtrip")
    assert done.statuses == [0, 0, 0], done.text
    assert re.findall(r'"num_heads": (\d+)', done.text) == ["4", "4"], done.text


def test_class_2_is_2(case):
    done = case("numeric_class_names")
    assert done.statuses == [0, 0], done.text
    assert "= class 2" in done.text, done.text


def test_one_bad_picture(case):
    assert case("one_bad_picture").statuses == [0, 0, 0, 0]


def test_a_renamed_class(case):
    done = case("resume_label_swap")
    assert done.statuses[0] == 0
    _one_line(done, 1, "cat", "zebra")


@needs_root
def test_a_full_disk_while_sampling(case):
    done = case("sample_disk_full")
    assert done.statuses == [0, 2, 0, 0, 0], done.text


@needs_torch
def test_another_objective(case):
    done = case("sit_as_dit")
    _one_line(done, 2, "SiT")


def test_samples_of_another_model(case):
    done = case("stale_samples")
    assert "FAULT" not in done.text, done.text


@needs_root
def test_a_full_disk_while_training(case):
    done = case("tensorboard_hang")
    assert "FAULT" not in done.text, done.text


def test_a_tilde(case, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    assert case("tilde").statuses == [0, 0]
    assert (tmp_path / "home" / "x" / "config.json").exists()


@needs_torch
def test_names_of_latent_diffusion(case):
    assert set(case("vae_ldm_names").statuses) == {0}


@needs_torch
def test_checkpoints_as_the_world_saves_them(case, tmp_path):
    from dico_jax.errors import UsageError
    from dico_jax.pytorch.conversion import from_pytorch

    case("checkpoints_refused")  # makes the files
    files = sorted((tmp_path / "conv").iterdir())
    (tmp_path / "out").mkdir()
    assert len(files) > 90
    refused = {}
    for file in files:
        try:
            from_pytorch(str(file), str(tmp_path / "out" / file.name))
        except UsageError as error:
            refused[file.name] = str(error)
    # Averages without names, files without weights of this network, another network's table.
    assert set(refused) <= {
        "ema_list.pt", "accelerate_ema_dict.pt", "list_of_sd.pt", "whole_module.pt",
        "extra_buffer.pt",
    }, refused  # fmt: skip
