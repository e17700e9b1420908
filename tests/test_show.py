"""`show`: what files and folders are, also damaged ones, without JAX."""

import io
import json
import shutil
import subprocess
import sys
import zipfile

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


def made(scale, fid):
    sampling = {"cfg_scale": scale}
    samples = {"count": 9, "ckpt": "runs/a", "step": 4, "weights": "ema", "sampling": sampling}
    features, reference = {"name": "inception"}, {"path": "r.npz"}
    about = {"samples": samples, "features": features, "reference": reference}
    return {"metrics": {"fid": fid, "kid": None}, **about}


def test_a_sweep(tmp_path):
    file = tmp_path / "sweep.json"
    file.write_text(json.dumps({"sweep": [made(1.5, 3.25), made(1.0, 20.0)]}))
    title, found = rows(file)
    assert title == "results of a sweep over guidance (dico_jax.evaluate)"
    assert (found["samples.ckpt"], found["samples.count"]) == ("runs/a", "9")
    assert list(found.items())[-2:] == [("guidance 1", "fid 20"), ("guidance 1.5", "fid 3.25")]
    for bent in ([], [{}], "x", [{"samples": 1, "metrics": 2}]):
        file.write_text(json.dumps({"sweep": bent}))
        with pytest.raises(UsageError, match="sweep.json is not what its fields say"):
            describe(str(file))


def zipped(file, names):
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            picture = Image.new("RGB", (4, 2), "red")
            picture.save(data := io.BytesIO(), "PNG")
            archive.writestr(name, data.getvalue())
    return file


def test_zips(tmp_path):
    names = ["train/", "train/cat/1.png", "train/cat/2.png", "train/dog/1.png", "readme.txt"]
    file = zipped(tmp_path / "pictures.zip", names)
    title, found = rows(file)
    assert title == "pictures in a zip"
    assert (found["classes"], found["pictures"]) == ("2: train/cat 2, train/dog 1", "3")
    assert describe(str(file)).picture.shape == (2, 4, 3)
    assert rows(zipped(tmp_path / "a.zip", ["a.doc"]))[0] == "a zip without pictures"
    with pytest.raises(UsageError, match=r"b.zip is a zip of nothing"):
        describe(str(zipped(tmp_path / "b.zip", [])))
    file.write_bytes(file.read_bytes().replace(b"IDAT", b"XXXX"))
    with pytest.raises(UsageError, match=r"pictures.zip.* is damaged .*; download or save it"):
        describe(str(file))


def export_to(folder):
    folder.mkdir()
    made_of = {"ckpt": "runs/a", "step": 4}
    meta = {"made_of": made_of, "platforms": ["cpu"], "batch_size": 8, "versions": {"jax": "1"}}
    (folder / "meta.json").write_text(json.dumps(meta))
    (folder / "sampler.stablehlo").write_bytes(b"ML\xefR")
    (folder / "run.py").write_text("import jax")
    np.savez(folder / "weights.npz", kernel=np.full(4, 2.0, np.float32))
    return folder


def test_an_export(tmp_path):
    folder = export_to(tmp_path / "exported")
    title, found = rows(folder)
    assert title == "an exported sampler"
    assert (found["batch_size"], found["made_of.step"]) == ("8", "4")
    assert found["norm"] == "4, no NaN, none infinite"
    assert "show its folder" in rows(folder / "sampler.stablehlo")[0]
    (folder / "weights.npz").unlink()
    with pytest.raises(UsageError, match=r"exported lacks weights.npz: copy all"):
        describe(str(folder))


def test_what_lies_in_a_bucket(bucket, root, workdir, tmp_path):
    from dico_jax.files import as_path, upload

    export_to(tmp_path / "exported")
    write_safetensors(tmp_path / "exported" / "a.safetensors", {"a.b": np.ones(4, np.float32)}, {})
    (tmp_path / "exported" / "r.json").write_text(json.dumps({"sweep": [made(1.0, 2.0)]}))
    Image.new("RGB", (8, 4)).save(tmp_path / "exported" / "a.png")
    (tmp_path / "exported" / "events.out.tfevents.1").write_bytes(b"\0")
    for folder in (tmp_path / "exported", workdir):
        upload(folder, as_path(f"{root}/{folder.name}"))
        names = ["", *(f"/{file.name}" for file in folder.iterdir() if file.name != "run.py")]
        for name in names:
            here, there = describe(f"{folder}{name}"), describe(f"{root}/{folder.name}{name}")
            assert there.title == here.title
            local = [row for row in here.rows if row[0] != "metrics"]
            assert [row for row in there.rows if row[0] != "metrics"] == local, name
            assert there.file == (here.file and here.file.replace(str(folder.parent), root))
    with pytest.raises(UsageError, match=f"{root}/exported/run.py.* is of no kind that is known"):
        describe(f"{root}/exported/run.py")
    with pytest.raises(UsageError, match=f"{root}/none.pt cannot be read"):
        describe(f"{root}/none.pt")


def test_what_lies_on_the_hub(tmp_path, monkeypatch):
    write_pt(tmp_path / "a.pt", {"latent.0.conv1.weight": np.ones((2, 2), np.float32)})
    (tmp_path / "r.json").write_text(json.dumps({"sweep": [made(1.0, 2.0)]}))
    (tmp_path / "cut.safetensors").write_bytes(b"\0" * 8)

    class Hub:
        @staticmethod
        def hf_hub_download(repo, name):
            if not (tmp_path / name).exists():
                raise OSError("404 Client Error.\n\nEntry not found")
            return str(tmp_path / name)

        @staticmethod
        def list_repo_files(repo, revision=None):
            return ["a.pt", "r.json"] if repo == "a/b" else []

    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub)
    assert rows("hf://a/b/a.pt")[1]["norm"] == "2, no NaN, none infinite"
    assert rows("hf://a/b") == rows("hf://a/b/") == rows("hf://a/b/a.pt")
    assert rows("hf://a/b/r.json")[1]["guidance 1"] == "fid 2"
    for name, said in (
        ("hf://a/b/cut.safetensors", "hf://a/b/cut.safetensors"),
        ("hf://a/b/none.pt", "hf://a/b/none.pt: none.pt of a/b cannot be downloaded: 404"),
        ("hf://c/d", "hf://c/d has neither files of weights"),
        ("hf://a", "hf://a: write hf://OWNER/REPO/FILE"),
    ):
        with pytest.raises(UsageError) as raised:
            describe(name)
        assert str(raised.value).startswith(said)
        assert str(tmp_path) not in str(raised.value)
