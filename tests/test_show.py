"""`show`: what files and folders are, also damaged ones, without JAX."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from dico_jax.checkpoints.writer import StepWriter
from dico_jax.data.latents import FORMAT
from dico_jax.errors import UsageError
from dico_jax.evaluation.statistics import Statistics, save_arrays, save_statistics
from dico_jax.pytorch.torch_files import write_pt, write_safetensors
from dico_jax.showing import KINDS, describe, tensors
from dico_jax.terminal import half_blocks
from tests.commands import ROOT, assert_refused, call
from tests.golden import FOLDER, requires_golden

GOLDEN = sorted(FOLDER.glob("*")) if FOLDER.is_dir() else []
CONFIG = {"model": {"name": "DiT", "hidden_size": 8}, "data": {"source": "digits"}}
WEIGHTS = {"latent": {"0": {"kernel": np.full((2, 3), 2.0, np.float32)}}}


def rows(path, full=False):
    found = describe(str(path), full)
    return found.title, dict(found.rows)


@pytest.fixture
def workdir(tmp_path):
    folder = tmp_path / "run"
    with StepWriter(folder / "checkpoints") as writer:
        meta = {"config": CONFIG, "class_names": ["a", "b"], "converted": None}
        writer.write(5, {"ema_params": WEIGHTS, "params": WEIGHTS}, meta)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"training": {"num_steps": 9}}))
    lines = [{"step": 5, "loss": 0.5}, {"step": 5, "eval/agreement": 0.75}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "samples").mkdir()
    Image.new("RGB", (8, 4), "red").save(folder / "samples" / "step_0000005.png")
    return folder


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """Tests share their machine."""
    monkeypatch.setattr(tensors, "SECONDS", 60.0)


@requires_golden
def test_golden_weights():
    title, found = rows(FOLDER / "dico_tiny.pt")
    assert title == "weights"
    assert "DiCo of no published size (hidden_size=32, depth=(1, 2, 1, 2, 1)" in found["network"]
    assert "1,003,080 parameters, 4 input channels, 10 classes and a null" in found["network"]
    assert found["tensors"] == "127 of 1,003,080 numbers, 4.012 MB, float32"
    assert found["norm"] == "50.0538, no NaN, none infinite"
    assert rows(FOLDER / "dico_tiny.safetensors")[1]["norm"] == found["norm"]
    title, found = rows(FOLDER / "train_checkpoint.pt")
    assert title == "a training checkpoint"
    assert (found["weights"], found["opt"][:12]) == ("ema", "381 tensors,")
    assert "num_classes=10" in found["args"]
    assert "DiT of no published size (hidden_size=64" in rows(FOLDER / "dit_tiny.pt")[1]["network"]
    assert rows(FOLDER / "clip_text.safetensors")[1]["network"] == "CLIP, towers of text"
    assert "autoencoder" in rows(FOLDER / "vae_small.safetensors")[1]["network"]


@requires_golden
@pytest.mark.parametrize("file", GOLDEN, ids=lambda file: file.name)
def test_golden_files_and_damaged_ones(file, tmp_path):
    """Each is known; what is cut, empty or of another kind is one line that names the file."""
    copy, data = tmp_path / file.name, file.read_bytes()
    if file.suffix != ".md":
        title, rows = describe(str(file))[:2]
        assert title
        assert rows
    damaged = [b"", data[:20], data[: len(data) // 2], b"\0" * 1000]
    damaged += [b"\0" * 8 + data[8:]] if file.suffix != ".safetensors" else [data[:-1]]
    for number, bytes_ in enumerate(damaged):
        copy.write_bytes(bytes_)
        with pytest.raises(UsageError) as raised:
            describe(str(copy))
        said = str(raised.value)
        assert said.startswith(str(copy)), (number, said)
        assert "\n" not in said
        assert any(fix in said for fix in ("download or save", "name weights")), said


def test_numbers_that_are_not_finite(tmp_path):
    file = tmp_path / "a.safetensors"
    bad = np.array([1.0, np.nan, np.inf, -2.0], np.float32)
    half = np.full(4, 3.0, np.float16)
    write_safetensors(file, {"net.a": bad, "net.b": half, "ids": np.arange(3)}, {"step": "7"})
    title, found = rows(file)
    assert (title, found["step"]) == ("weights", "7")
    assert found["norm"] == "6.40312 of what is finite; 1 NaN, 1 infinite in net.a"
    assert "1 int64, 1 float32, 1 float16" in found["tensors"]


def test_a_part_is_read_and_said(tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "BYTES", 100)
    file = tmp_path / "a.pt"
    write_pt(file, {"a.weight": np.ones(1000, np.float32), "a.bias": np.ones(10, np.float32)})
    part = "3.16228, no NaN, none infinite; of 1 of 2 tensors (40 bytes read): --full reads all"
    assert rows(file)[1]["norm"] == part
    assert rows(file, full=True)[1]["norm"] == "31.7805, no NaN, none infinite"


def test_workdir_and_checkpoint(workdir):
    title, found = rows(workdir)
    assert title == "a workdir"
    assert found["network"] == "DiT, 6 parameters (hidden_size 8)"
    assert found["checkpoints"] == "5; 9 steps are planned"
    assert found["metrics"] == "steps 5 to 5, loss 0.5, eval/agreement 0.75"
    assert found["norm"] == "4.89898, no NaN, none infinite"
    assert "jax " in found["versions"]
    assert "all files are there" in found["step"]
    assert describe(str(workdir)).picture.shape == (4, 8, 3)
    step = workdir / "checkpoints" / "5"
    assert rows(step)[0] == "a checkpoint"
    assert "all bytes are as written" in rows(step, full=True)[1]["step"]
    assert rows(workdir / "checkpoints")[0] == "a workdir"
    assert rows(workdir / "config.json")[0] == "the config of a run"
    assert rows(workdir / "metrics.jsonl")[1]["eval/agreement"] == "0.75"


def test_damaged_checkpoints(workdir):
    step = workdir / "checkpoints" / "5"
    files = sorted(file for file in step.glob("*/**/*") if file.is_file() and file.stat().st_size)
    for file in files:
        data = file.read_bytes()
        for how, change in (("missing", file.unlink), ("bytes", lambda f=file: f.write_bytes(b""))):
            change()
            with pytest.raises(UsageError, match=f"{step}.* is damaged .*{how}.*: restore it"):
                describe(str(workdir))
            file.write_bytes(data)
    last = files[-1]
    last.write_bytes(bytes([last.read_bytes()[0] ^ 1]) + last.read_bytes()[1:])
    with pytest.raises(UsageError, match="not those that were written"):
        describe(str(step), full=True)


def test_arrays(tmp_path):
    images = np.zeros((3, 4, 4, 3), np.uint8)
    np.savez(tmp_path / "samples.npz", images, np.array([1, 1, 0]))
    title, found = rows(tmp_path / "samples.npz")
    assert title == "images, as ADM's evaluator reads them"
    assert (found["images"], found["labels"]) == ("(3, 4, 4, 3) uint8", "2: [0, 1]")
    assert describe(str(tmp_path / "samples.npz")).picture.shape == (4, 12, 3)
    save_statistics(tmp_path / "s.npz", Statistics("inception", np.ones(2), np.eye(2), count=7))
    title, found = rows(tmp_path / "s.npz")
    assert (title, found["count"]) == ("statistics of features, a reference", "7")
    save_arrays(tmp_path / "c.npz", {"format": "a classifier"}, {"kernel": np.ones(3)})
    assert rows(tmp_path / "c.npz")[1]["format"] == "a classifier"
    np.save(tmp_path / "a.npy", np.full((5, 2), np.nan, np.float32))
    assert "10 NaN" in rows(tmp_path / "a.npy")[1]["norm"]
    np.savez(tmp_path / "o.npz", np.array([{}], object))
    with pytest.raises(UsageError, match="Python objects, which are not read"):
        describe(str(tmp_path / "o.npz"))


def test_results_and_other_files(tmp_path):
    result = {"metrics": {"fid": 2.05}, "features": {"name": "inception"}, "samples": {"count": 9}}
    (tmp_path / "r.json").write_text(json.dumps(result))
    title, found = rows(tmp_path / "r.json")
    assert (title, found["fid"]) == ("a result (dico_jax.evaluate)", "2.05")
    assert found["samples.count"] == "9"
    (tmp_path / "prompts.txt").write_text("a bus\nred\n")
    assert rows(tmp_path / "prompts.txt")[1]["lines"] == "2"
    out = tmp_path / "out"
    out.mkdir()
    Image.new("L", (6, 6)).save(out / "000000.png")
    (out / "sampling.json").write_text(json.dumps({"settings": {"step": 4}, "versions": {}}))
    assert rows(out)[1]["images"] == "1"
    plan = {"format": FORMAT, "source": "x"}
    (tmp_path / "latents").mkdir()
    (tmp_path / "latents" / "manifest.json").write_text(json.dumps({"plan": plan, "shards": []}))
    with pytest.raises(UsageError, match="manifest.json does not describe latents"):
        describe(str(tmp_path / "latents"))
    (tmp_path / "what.bin2").write_bytes(b"\1\2\3")
    for path in (tmp_path / "what.bin2", tmp_path / "nothing_known"):
        (tmp_path / "nothing_known").mkdir(exist_ok=True)
        (tmp_path / "nothing_known" / "x.y").write_text("")
        with pytest.raises(UsageError) as raised:
            describe(str(path))
        assert str(raised.value).startswith(str(path))
        assert KINDS in str(raised.value)
    with pytest.raises(UsageError, match="no such file or folder"):
        describe(str(tmp_path / "missing"))


def test_the_command(workdir, tmp_path):
    before = {file: file.stat().st_mtime_ns for file in workdir.rglob("*")}
    done = call("dico_jax.show", workdir, fresh=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == f"{workdir}: a workdir"
    assert f"picture      {workdir / 'samples' / 'step_0000005.png'}" in done.stdout
    assert "\x1b" not in done.stdout
    assert {file: file.stat().st_mtime_ns for file in workdir.rglob("*")} == before
    shutil.rmtree(workdir / "checkpoints" / "5" / "ema_params")
    assert_refused(call("dico_jax.show", workdir), str(workdir), "is missing", "restore it")
    assert_refused(call("dico_jax.show"), "what to show is missing")
    assert_refused(call("dico_jax.show", "--file", "none.pt"), "none.pt: no such file or folder")
    assert_refused(call("dico_jax.show", "a", "b"), "unexpected argument 'b'")
    (tmp_path / "a.npz").write_bytes(b"PK\3\4")
    assert_refused(call("dico_jax.show", tmp_path / "a.npz"), "a.npz is damaged", "save it again")


def test_it_imports_no_jax(workdir, tmp_path):
    write_pt(tmp_path / "a.pt", {"latent.0.conv1.weight": np.ones((2, 2), np.float32)})
    for path in (workdir, tmp_path / "a.pt"):
        code = "import sys; from dico_jax.showing import describe; "
        code += f"describe({str(path)!r}); print('jax' in sys.modules, 'flax' in sys.modules)"
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.stdout.split() == ["False", "False"], done.stderr


def test_half_blocks():
    image = np.zeros((4, 2, 3), np.uint8)
    image[0, 0] = 255, 0, 0
    text = half_blocks(image, 1 << 24)
    assert text.startswith("\x1b[38;2;255;0;0;48;2;0;0;0m\u2580")
    assert text.count("\n") == 2
    assert "38;5;196;48;5;16" in half_blocks(image, 256)
    wide = half_blocks(np.zeros((100, 1000, 3), np.uint8), 256)
    assert len(wide.splitlines()[0].split("\u2580")) <= 73
