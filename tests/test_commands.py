"""The commands as a user types them, right and wrong."""

import json
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from dico_jax.autoencoders import to_uint8
from dico_jax.errors import UsageError
from dico_jax.sampling.checkpoint_sampler import CheckpointSampler
from dico_jax.sampling.generate import NotFiniteError
from dico_jax.sampling.grids import load_png
from dico_jax.sampling.image_folder import check_outputs, save
from tests.commands import ROOT, assert_refused, call
from tests.test_generation import without_class

COMMANDS = sorted(
    f"dico_jax.{file.stem}"
    for file in (ROOT / "dico_jax").glob("*.py")
    if "cli.run(" in file.read_text() and file.stem != "cli"
)
# The digits experiment in seconds instead of minutes.
_QUICK = [
    "--config=configs/digits.py",
    "--config.data.batch_size=16",
    "--config.training.num_steps=4",
    "--config.sampling.num_steps=2",
    "--config.sampling.batch_size=10",
    "--config.sampling.grid_every_steps=0",
    "--config.eval.class_agreement_samples=0",
    "--config.logging.report=False",
]
QUICK_DICO = [*_QUICK, "--config.model.hidden_size=8"]
# A DiT of one block compiles several times as fast.
QUICK = [
    *_QUICK,
    "--config.model.name=DiT",
    "--config.model.hidden_size=8",
    "--config.model.depth=1",
    "--config.model.num_heads=1",
    "--config.model.patch_size=4",
]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A finished run of four steps."""
    path = tmp_path_factory.mktemp("runs") / "digits"
    averages = ["--config.training.ema_widths=(0.1,)"]
    averages += ["--config.training.ema_snapshot_every_steps=2"]
    page = "--config.logging.report=True"
    done = call("dico_jax.main", *QUICK, *averages, page, f"--workdir={path}")
    assert done.returncode == 0, done.stderr
    (path / "said.txt").write_text(done.stdout)
    return path


def test_main_writes_the_page_of_the_run(workdir):
    pytest.importorskip("bokeh")
    assert "finished: step 4 of 4" in (workdir / "report.html").read_text()
    assert f"\npage        {workdir / 'report.html'}\n" in (workdir / "said.txt").read_text()


@pytest.mark.parametrize("module", COMMANDS)
def test_help_answers_within_two_seconds(module):
    assert {"dico_jax.main", "dico_jax.sample"} <= set(COMMANDS)
    start = time.monotonic()
    done = call(module, "--help", fresh=True)
    assert "flags:" in done.stdout
    assert done.returncode == 0
    # The bar is 2 s on a machine of its own; tests share theirs.
    assert time.monotonic() - start < 6
    # What makes it quick: nothing heavy is imported.
    code = f"import sys, {module}; print('jax' in sys.modules, 'sklearn' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert out.stdout.split() == ["False", "False"], out.stderr


def test_main_leaves_what_it_promises(workdir):
    assert json.loads((workdir / "config.json").read_text())["model"]["hidden_size"] == 8
    assert (workdir / "checkpoints" / "4").is_dir()
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 4
    assert {"loss", "mse", "vb", "grad_norm", "images_per_second"} <= set(lines[-1])
    assert list(workdir.glob("events.out.tfevents.*"))


def test_sample_writes_images_a_grid_and_an_npz(workdir, tmp_path):
    out, npz = tmp_path / "out", tmp_path / "samples.npz"
    args = [f"--ckpt={workdir}", f"--out={out}", "--num_images=12", "--classes=3,1"]
    done = call("dico_jax.sample", *args, f"--npz={npz}")
    assert done.returncode == 0, done.stderr
    files = sorted(out.glob("[0-9]*.png"))
    assert [file.name for file in files] == [f"{i:06d}.png" for i in range(12)]
    images = np.stack([np.asarray(Image.open(file)) for file in files])
    assert images.shape == (12, 8, 8)
    assert Image.open(out / "grid.png").size[1] > 2 * 64  # two rows of enlarged digits
    with np.load(npz) as arrays:
        np.testing.assert_array_equal(arrays["arr_0"], images[..., None])
        np.testing.assert_array_equal(arrays["arr_1"], [3, 1] * 6)
    settings = json.loads((out / "sampling.json").read_text())["settings"]
    assert settings["step"] == 4
    assert settings["sampling"]["cfg_scale"] == 1.4

    # Images that are missing are made again, as they were, whatever the batch size and devices.
    for index in (5, 6, 11):
        files[index].unlink()
    before = files[0].stat().st_mtime_ns
    assert call("dico_jax.sample", *args, "--batch_size=3", devices=2).returncode == 0
    again = np.stack([np.asarray(Image.open(file)) for file in files])
    assert np.abs(again.astype(int) - images).max() <= 1  # one grey level, where rounding decides
    assert files[0].stat().st_mtime_ns == before

    other = call("dico_jax.sample", *args, "--cfg_scale=3")
    assert_refused(other, "--out=", "holds images made with other settings (sampling")
    np.testing.assert_array_equal(np.asarray(Image.open(files[0])), images[0])


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["--config.data.batchsize=4"], ["config.data.batchsize", "did you mean", "batch_size"]),
        (["--config.datas.batch_size=4"], ["config.datas.batch_size", "config.data.batch_size"]),
        (["--config.data.batch_size=four"], ["config.data.batch_size", "four"]),
        (["--config.data.batch_size=0"], ["config.data.batch_size=0", "use 1"]),
        (["--config.model.name=DiCo-M"], ["config.model.name='DiCo-M'", "'DiCo-"]),
        (["--config.model.num_heads=3"], ["config.model.hidden_size=8 must divide", "num_heads=3"]),
        (["--config.data.image_size=10"], ["config.data.image_size=10", "use 8 or 12"]),
        (["--config.model.in_channels=2"], ["config.model.in_channels=2", "use 3, or 1 for grey"]),
        (["--config.data.latent_sampling=mode"], ["config.data.latent_sampling='mode'", "fixed"]),
        (["--config.data.max_bad_fraction=2.0"], ["config.data.max_bad_fraction=2.0", "[0, 1]"]),
        (["--config.mesh.fsdp=3"], ["config.mesh.fsdp=3", "do not fit 1 devices"]),
        (["--config.training.accumulation_steps=3"], ["accumulation_steps=3", "the 16 examples"]),
        (["--config.data.source=mnist"], ["config.data.source='mnist'", "arrays, digits"]),
        (["--config.model.num_classes=9"], ["config.model.num_classes=9", "use 10"]),
        (["--config.model.class_dropout_prob=0.0"], ["config.sampling.cfg_scale=1.4"]),
        (["--config.diffusion.noise_schedule=cos"], ["config.diffusion.noise_schedule='cos'"]),
        (["--config.diffusion.diffusion_steps=5"], ["config.diffusion.diffusion_steps=5"]),
        (["--config.sampling.sampler=dpm"], ["config.sampling.sampler='dpm'", "ddpm, ddim"]),
        (["--config.sampling.num_steps=2000"], ["config.sampling.num_steps=2000"]),
        (["--config.sampling.cfg_channels=4"], ["config.sampling.cfg_channels='4'", "first_three"]),
        (["--config.autoencoder.name=vae"], ["config.autoencoder.name='vae'", "identity"]),
        (["--config.optimizer.b1=1.5"], ["config.optimizer.b1=1.5", "[0, 1)"]),
        (["--config.training.ema_decay=2.0"], ["config.training.ema_decay=2.0", "[0, 1)"]),
        (["--config.training.num_steps=0"], ["config.training.num_steps=0", "at least 1"]),
        (["--config=configs/nothing.py"], ["--config=configs/nothing.py", "b256, cifar10"]),
        (["--config=configs/digits.py:x"], ["TypeError: get_config() takes 0 positional"]),
        (["--config", "digit"], ["--config=digit cannot be read", "digits"]),
        (["--config.seed=99999999999999999999"], ["config.seed=99999999999999999999", "at most"]),
        (["--config.model.depth=(1,1)"], ["config.model.depth=(1, 1) must be at least 1"]),
        (["--config.data.batch_size=None"], ["config.data.batch_size=None must be a whole number"]),
        (["--config.training.num_steps=1.5"], ["config.training.num_steps", "1.5"]),
        (["--batch_size=4"], ["'batch_size'", "did you mean --config.data.batch_size"]),
        (["--workdir=az://b/x"], ["--workdir=az://b/x", "only a disk or gs:// or s3:// works"]),
        (["--workdir="], ["--workdir= is empty"]),
        (["--out=x"], ["'out'", "did you mean --workdir"]),
        (["--wrkdir=x"], ["wrkdir", "workdir"]),
        (["--flagfile=/no/such"], ["/no/such", "No such file"]),
        (["--flagfile=tests"], ["tests", "directory"]),
        (["extra"], ["extra", "--name=value"]),
    ],
)
def test_main_refuses(tmp_path, args, parts):
    workdir = tmp_path / "run"
    done = call("dico_jax.main", *QUICK, f"--workdir={workdir}", *args)
    assert_refused(done, *parts)
    assert not workdir.exists()


def test_main_refuses_a_batch_that_the_devices_cannot_split(tmp_path):
    args = [*QUICK, "--config.data.batch_size=250", f"--workdir={tmp_path / 'run'}"]
    done = call("dico_jax.main", *args, devices=8)
    assert_refused(done, "config.data.batch_size=250 does not divide over 8 devices: use 248 or 25")


def test_main_refuses_a_config_that_is_not_there(tmp_path):
    done = call("dico_jax.main", "--config=configs/no.py", f"--workdir={tmp_path}")
    assert_refused(done, "--config=configs/no.py cannot be read")


def test_a_config_is_found_by_name_and_its_errors_by_line(tmp_path):
    args = ["--config.model.num_classes=None", "--config.data.batch_size=0", "--workdir=x"]
    done = call("dico_jax.main", *args, "--config", "digits", cwd=tmp_path)
    assert_refused(done, "config.data.batch_size=0")
    (tmp_path / "bad.py").write_text("def get_config():\n    return nothing\n")
    done = call("dico_jax.main", "--config=bad.py", "--workdir=x", cwd=tmp_path)
    assert_refused(done, "--config=bad.py, line 2: NameError: name 'nothing' is not defined")


def test_main_needs_its_flags():
    assert_refused(call("dico_jax.main", *QUICK), "workdir")
    assert_refused(call("dico_jax.main", "--workdir=x"), "config")


def test_main_refuses_the_workdir_of_another_config_and_leaves_it_alone(workdir):
    before = {file: file.stat().st_mtime_ns for file in workdir.rglob("*")}
    done = call("dico_jax.main", *QUICK, f"--workdir={workdir}", "--config.seed=1")
    assert_refused(
        done, f"--workdir={workdir} belongs to a run of another", "config.seed was 0, is 1"
    )
    assert {file: file.stat().st_mtime_ns for file in workdir.rglob("*")} == before


def test_sample_rebuilds_averages(workdir, tmp_path):
    args = [f"--ckpt={workdir}", f"--out={tmp_path}", "--num_images=2", "--ema_width=0.1"]
    done = call("dico_jax.sample", *args, "--step=2")
    assert done.returncode == 0, done.stderr
    settings = json.loads((tmp_path / "sampling.json").read_text())["settings"]
    assert (settings["weights"], settings["step"]) == ("ema_width=0.1", 2)
    assert_refused(call("dico_jax.sample", *args, "--step=3"), "--step=3", "steps 2, 4")


def test_sample_keeps_what_is_finite(workdir, tmp_path):
    sampler = CheckpointSampler(str(workdir), overrides={"num_steps": 2})
    whole, sampler.params = sampler.params, without_class(sampler.params, 3)
    with pytest.raises(NotFiniteError, match=r"^2 of 4 images are not finite \(0, 2\)"):
        save(sampler, str(tmp_path), num_images=4, classes="3,1")
    files = ["000001.png", "000003.png", "sampling.json"]
    assert sorted(file.name for file in tmp_path.iterdir()) == files
    kept = (tmp_path / "000001.png").read_bytes()
    # They go on from there, and a file that a power cut has left empty or cut is made again.
    (tmp_path / "000003.png").write_bytes(kept[:60])
    sampler.params = whole
    save(sampler, str(tmp_path), num_images=4, classes="3,1")
    assert (tmp_path / "000001.png").read_bytes() == kept
    assert [load_png(tmp_path / f"{i:06d}.png").shape for i in range(4)] == [(8, 8, 1)] * 4


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["--classes=3,10"], ["--classes=3,10", "no class 10, use 0 to 9"]),
        (["--classes=-1"], ["no class -1"]),
        (["--classes=cat"], ["--classes=cat", "no class cat"]),
        (["--num_images=0"], ["num_images", "0"]),
        (["--num_images=4294967295"], ["num_images", "10000000"]),
        (["--sampler=plms"], ["sampler='plms'", "ddpm, ddim"]),
        (["--steps=0"], ["--steps=0", "at least 1"]),
        (["--classes=random", "--seed=-1"], ["seed=-1"]),
        (["--cfg_scale=nan"], ["--cfg_scale=nan must be finite"]),
        (["--checkpoint=x"], ["'checkpoint'", "did you mean --ckpt"]),
        (["--ckpt="], ["--ckpt= is empty"]),
        (["--ckpt=~no_such/x"], ["--ckpt=~no_such/x", "no such user"]),
        (["--ckpt=" + "x" * 300], ["xxx", "File name too long"]),
        (["--ckpt=az://b/x"], ["--ckpt=az://b/x", "only a disk or gs:// or s3:// or hf:// works"]),
        (["--cfg_scale=-1"], ["cfg_scale=-1"]),
        (["--cfg_scale=inf"], ["cfg_scale=inf", "finite"]),
        (["--step=3"], ["--step=3", "has steps 4"]),
        (["--ckpt=/no/such/folder"], ["--ckpt=/no/such/folder", "no such folder"]),
        (["--ckpt=tests"], ["--ckpt=tests holds no checkpoint"]),
        (["--weights=raw"], ["weights", "raw"]),
        (["--per_class=2"], ["--per_class and --num_images: give one"]),
        (["--out="], ["--out= is empty"]),
    ],
)
def test_sample_refuses(workdir, tmp_path, args, parts):
    out = tmp_path / "out"
    done = call("dico_jax.sample", f"--ckpt={workdir}", f"--out={out}", "--num_images=2", *args)
    assert_refused(done, *parts)
    assert not list(out.glob("*.png"))


def test_sample_makes_some_of_every_class(workdir, tmp_path):
    args = [f"--ckpt={workdir}", f"--out={tmp_path}", "--classes=3,#1", "--per_class=2"]
    done = call("dico_jax.sample", *args, f"--npz={tmp_path / 'x.npz'}", "--cfg_scale=0.5")
    assert done.returncode == 0, done.stderr
    assert "warning: --cfg_scale=0.5 is below 1" in done.stderr
    assert "4 images and grid.png" in done.stdout
    with np.load(tmp_path / "x.npz") as arrays:
        np.testing.assert_array_equal(arrays["arr_1"], [3, 3, 1, 1])
    args[-1] = "--per_class=3"
    assert_refused(call("dico_jax.sample", *args), "per_class was 2, is 3")
    args[-2] = "--classes=random"
    assert_refused(call("dico_jax.sample", *args), "--per_class=3 is for --classes that are named")
    assert_refused(call("dico_jax.sample", args[0]), "--out is missing: name a folder")


def test_outputs_are_looked_at_before_weights_are_fetched(tmp_path):
    (tmp_path / "out").write_text("a file")
    for folder in (tmp_path, tmp_path / "out"):
        done = call("dico_jax.sample", "--ckpt=hf://no/such", f"--out={folder}")
        assert_refused(done, f"--out={folder}")
    measured = "dico_jax.evaluate", "--ckpt=hf://no/such"
    assert_refused(call(*measured), "--reference is needed")
    done = call(*measured, "--reference=x.npz", f"--out={tmp_path / 'x.png'}")
    assert_refused(done, "--out=", "name a .json file")
    sweep = "--sweep_cfg=2:1:0.1", f"--out={tmp_path / 'x.json'}"
    assert_refused(call(*measured, "--reference=x.npz", *sweep), "--sweep_cfg")


def test_sample_shows_how_images_arise(workdir, tmp_path):
    options = {"overrides": {"num_steps": 4, "cfg_scale": 2.0}, "with_latents": True}
    sampler = CheckpointSampler(str(workdir), **options)
    assert save(sampler, str(tmp_path), num_images=3, classes="3,1", trajectory=True) == 3
    images = np.stack([load_png(tmp_path / f"{i:06d}.png") for i in range(3)])
    latents = np.load(tmp_path / "latents.npy")
    assert np.abs(to_uint8(latents).astype(int) - images).max() <= 1
    predicted, steps = sampler.trajectory(sampler.conditions(3, classes="3,1"), 3)
    assert (predicted.shape, steps.tolist()) == ((3, 3, 8, 8, 1), [1, 3, 4])
    assert np.abs(predicted[-1].astype(int) - images).max() <= 1  # the last step adds no noise
    with (
        Image.open(tmp_path / "trajectory.gif") as film,
        Image.open(tmp_path / "trajectory.png") as sheet,
    ):
        assert film.n_frames == 4
        assert sheet.size[0] == 4 * (64 + 2) + 2


def test_sample_lists_classes(workdir):
    done = call("dico_jax.sample", f"--ckpt={workdir}", "--list_classes")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == [str(k) for k in (0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5)] + [
        str(k) for k in (6, 6, 7, 7, 8, 8, 9, 9)
    ]


def test_sample_refuses_to_mix_with_images_of_unknown_origin(workdir, tmp_path):
    (tmp_path / "000000.png").write_bytes(b"mine")
    done = call("dico_jax.sample", f"--ckpt={workdir}", f"--out={tmp_path}")
    assert_refused(done, "holds images but no sampling.json")
    assert (tmp_path / "000000.png").read_bytes() == b"mine"


def test_outputs_of_sample_are_checked_before_work(tmp_path):
    def refused(match, out, npz=None, overwrite=False):
        with pytest.raises(UsageError, match=match):
            check_outputs(str(out), None if npz is None else str(npz), overwrite)

    file = tmp_path / "notes.txt"
    file.write_text("mine")
    refused(r"--out=.*notes.txt is a file: name a folder", file)
    refused(r"--out=.* holds other files \(1, such as notes.txt\): give a new folder", tmp_path)
    out, npz = tmp_path / "new", tmp_path / "a.npz"
    refused("--npz=.*: there is no folder .*/no, make it first", out, tmp_path / "no" / "a.npz")
    refused("--npz=.* is a folder: name a file", out, tmp_path)
    npz.write_bytes(b"mine")
    refused("--npz=.* exists: give another name", out, npz)
    check_outputs(str(out), str(npz), True)
    assert not out.exists()


def test_samples_belong_to_weights_and_not_to_their_place(workdir, tmp_path):
    def sample(run, **options):
        sampler = CheckpointSampler(str(run), overrides={"num_steps": 2}, **options)
        save(sampler, str(tmp_path / "out"), num_images=2)

    sample(workdir)
    image, described = (tmp_path / "out" / name for name in ("000001.png", "sampling.json"))
    before = image.stat().st_mtime_ns
    shutil.copytree(workdir, tmp_path / "moved")
    sample(tmp_path / "moved")
    assert image.stat().st_mtime_ns == before
    with pytest.raises(UsageError, match=r"other settings \(weights was ema, is params; weights_d"):
        sample(workdir, weights="params")
    # What a power cut has left says nothing of the images: they are made again.
    described.write_text("")
    sample(workdir)
    assert image.stat().st_mtime_ns > before
    assert json.loads(described.read_text())["settings"]["weights"] == "ema"


def test_commands_run_from_anywhere(tmp_path):
    """A config is found by its path, and its sibling default.py with it."""
    args = [f"--config={ROOT / 'configs' / 'digits.py'}", "--config.seed=x", "--workdir=run"]
    done = call("dico_jax.main", *args, cwd=tmp_path, fresh=True)
    assert_refused(done, "config.seed")
    assert "No module named" not in done.stderr


def test_no_name_changes_a_terminal(tmp_path):
    code = "from dico_jax import cli; cli.run(lambda: print('a\\x1b[31m\\x07\\x9b b\\rc'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    assert done.stdout == rb"a\x1b[31m\x07\x9b b" + b"\rc\n", done.stderr
