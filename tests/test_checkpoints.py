"""Checkpoints that survive: other meshes, damage, full disks, and what is kept."""

import json
import resource
import shutil
import threading
import time
from typing import Any

import jax
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dico_jax.checkpoints import writer
from dico_jax.checkpoints.averages import weights_digest
from dico_jax.checkpoints.checkpointer import Checkpointer
from dico_jax.checkpoints.reader import SavedWeights
from dico_jax.checkpoints.state import TrainState
from dico_jax.checkpoints.steps import (
    CHECKSUMS,
    DamagedCheckpointError,
    saved_steps,
    verified,
)
from dico_jax.config import with_defaults
from dico_jax.errors import UsageError

# Of reads and writes of TensorStore's that nobody waits for when one has failed.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
META: dict[str, Any] = {"config": {"model": {"name": "none"}}, "class_names": []}


def placed(tree, num_devices):
    """A tree on a mesh of the first devices; leaves are split as FSDP would, where they can be."""
    mesh = Mesh(np.array(jax.devices()[:num_devices]), ("fsdp",))

    def place(leaf):
        split = leaf.ndim > 0 and leaf.shape[0] % 8 == 0
        spec = PartitionSpec("fsdp") if split else PartitionSpec()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    return jax.tree.map(place, tree)


def make_state(step=0, num_devices=8, kind=TrainState, **more):
    rng = np.random.default_rng(step)
    params = {
        "block": {"kernel": rng.normal(size=(64, 96)), "bias": rng.normal(size=(96,))},
        "scale": rng.normal(size=(5,)),
    }
    params = jax.tree.map(lambda x: x.astype(np.float32), params)
    opt_state = jax.tree.map(
        lambda x: (np.asarray(x) + rng.normal(size=x.shape)).astype(x.dtype),
        optax.adamw(1e-3).init(params),
    )
    ema = jax.tree.map(lambda x: x + 1, params)
    state = kind(step=np.int32(step), params=params, ema_params=ema, opt_state=opt_state, **more)
    return placed(state, num_devices)


def abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def assert_same(state, other):
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def save(workdir, *steps, keep=10, **options):
    with Checkpointer(workdir, META, keep, **options) as saver:
        for step in steps:
            saver.save(step, make_state(step))


def restore_newest(workdir, target=None, **options):
    with Checkpointer(workdir, META, keep=10) as saver:
        return saver.restore_newest(abstract(make_state()) if target is None else target, **options)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A workdir with the steps 5 and 10."""
    workdir = tmp_path_factory.mktemp("original")
    save(workdir, 5, 10)
    return workdir


@pytest.fixture
def workdir(original, tmp_path):
    """A copy of it."""
    return shutil.copytree(original, tmp_path / "run")


@pytest.mark.parametrize("num_devices", [1, 2, 4, 8])
def test_states_come_back_on_any_mesh(original, num_devices):
    target = abstract(make_state(0, num_devices))
    state, step = restore_newest(original, target)
    assert step == int(state.step) == 10
    assert_same(state, make_state(10))
    for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(target), strict=True):
        assert leaf.sharding == wanted.sharding
    assert len(state.params["block"]["kernel"].addressable_shards) == num_devices


def test_a_state_of_one_device_comes_back_on_eight(tmp_path):
    assert restore_newest(tmp_path) is None  # nothing is saved
    state = make_state(3, num_devices=1)
    with Checkpointer(tmp_path, META, keep=1) as saver:
        saver.save(3, state)
        saver.wait()
        assert_same(saver.restore(3, make_state(0)), state)
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
        with pytest.raises(ValueError, match="needs shardings"):
            saver.restore(3, target)


def test_newest_and_every_so_often_are_kept(tmp_path):
    save(tmp_path, 2, 4, 6, 8, 10, keep=2, keep_every=4)
    assert saved_steps(tmp_path) == {4, 8, 10}
    save(tmp_path, 12, keep=1)  # the rule of the moment holds for all
    assert saved_steps(tmp_path) == {12}


def test_a_saved_step_is_left_alone_and_an_older_one_refused(workdir):
    with Checkpointer(workdir, META, keep=10) as saver:
        saver.save(10, make_state(99))
        with pytest.raises(RuntimeError, match="refused to save step 7"):
            saver.save(7, make_state(7))
        saver.save(11, make_state(11), {"attempt": 2})
        saver.wait()
        assert saver.extra(11) == {"attempt": 2}
        assert saver.extra(10) == {}
        assert_same(saver.restore(10, abstract(make_state())), make_state(10))


def find_damage(folder, *args, **share):
    try:
        verified(folder, *args, **share)
    except DamagedCheckpointError as error:
        return error.reason
    return None


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGES = {
    "deleted": lambda file: file.unlink(),
    "emptied": lambda file: file.write_bytes(b""),
    "cut": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "changed": flip,
}


def files_of(folder):
    return sorted(file for file in folder.rglob("*") if file.is_file())


def test_any_damage_of_any_file_is_found(workdir):
    folder = workdir / "checkpoints" / "10"
    assert find_damage(folder) is None
    seen = 0
    for item in ("params", "ema_params", "opt_state", "meta"):
        assert find_damage(folder, item) is None
        for file in files_of(folder / item):
            whole = file.read_bytes()
            for damage in DAMAGES.values():
                damage(file)
                assert str(file.relative_to(folder)) in find_damage(folder)
                assert find_damage(folder, item)
                parts = [find_damage(folder, part=part, parts=3) for part in range(3)]
                assert sum(reason is not None for reason in parts) == 1
                file.write_bytes(whole)
            seen += 1
    assert seen > 20


def largest(folder):
    return max(files_of(folder), key=lambda file: file.stat().st_size)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_arrays_are_passed_over(workdir, damage):
    folder = workdir / "checkpoints"
    DAMAGES[damage](largest(folder / "10" / "opt_state"))
    with Checkpointer(workdir, META, keep=10) as saver:
        with pytest.raises(DamagedCheckpointError, match="10 is damaged .opt_state/"):
            saver.restore(10, abstract(make_state()))
        said: list[str] = []
        state, step = saver.restore_newest(abstract(make_state()), said.append)
        assert step == max(saver.steps()) == 5
        assert_same(state, make_state(5))
        assert len(said) == 1
        for part in ("warning: ", "checkpoints/10 is damaged (opt_state/", "broken-10", "step 5"):
            assert part in said[0]
        # The step can be saved again, and broken again.
        saver.save(10, make_state(10))
    assert {path.name for path in folder.iterdir()} == {"5", "10", "broken-10"}
    assert saved_steps(workdir) == {5, 10}
    assert_same(restore_newest(workdir)[0], make_state(10))
    flip(largest(folder / "10" / "params"))
    assert restore_newest(workdir)[1] == 5
    assert {path.name for path in folder.iterdir()} == {"5", "broken-10", "broken-10-2"}


def test_top_level_files_and_checksums(workdir):
    """Orbax does not need its files beside the items; unreadable checksums are damage."""
    folder = workdir / "checkpoints" / "10"
    for file in folder.iterdir():
        if file.is_file() and file.name != CHECKSUMS:
            file.write_bytes(b"")
    assert_same(restore_newest(workdir)[0], make_state(10))
    DAMAGES["cut"](folder / CHECKSUMS)
    said: list[str] = []
    assert restore_newest(workdir, say=said.append)[1] == 5
    assert "checksums.json cannot be read" in said[0]


def forget_checksums(folder):
    """Makes a step one of a version that had no checksums, or not of conversions."""
    (folder / CHECKSUMS).unlink()
    meta = json.loads((folder / "meta" / "metadata").read_text())
    assert meta.pop("checksums") == "crc32"
    (folder / "meta" / "metadata").write_text(json.dumps(meta))


def remove_sums(folder, name):
    sums = json.loads((folder / CHECKSUMS).read_text())
    (folder / CHECKSUMS).write_text(
        json.dumps(sums | {"files": {k: v for k, v in sums["files"].items() if name not in k}})
    )


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda folder: (folder / CHECKSUMS).unlink(), "it is missing"),
        (lambda folder: remove_sums(folder, ""), "it lacks"),
        (lambda folder: remove_sums(folder, "ema_params"), "it lacks ema_params/"),
        (lambda folder: (folder / CHECKSUMS).write_text("[]"), "checksums.json cannot be read"),
        (lambda folder: (folder / CHECKSUMS).write_text('{"files": []}'), "it lacks"),
        (lambda folder: (folder / CHECKSUMS).write_text('{"files": {"meta/x": 1}}'), "it lacks"),
        (lambda folder: (shutil.rmtree(folder), shutil.copytree(folder.with_name("5"), folder)),
         "as that of step 10: it is that of step 5"),
    ],
)  # fmt: skip
def test_what_checksums_do_not_guard_is_damage(workdir, harm, reason):
    folder = workdir / "checkpoints" / "10"
    harm(folder)
    with (
        Checkpointer(workdir, META, keep=10) as saver,
        pytest.raises(DamagedCheckpointError, match=reason),
    ):
        saver.restore(10, abstract(make_state()))
    with pytest.raises(UsageError, match="10 is damaged"):
        SavedWeights(str(workdir)).leaves("ema")


@pytest.mark.parametrize("name", ["lr[1e-4]", "a*b?", "[", "x[!a]/run"])
def test_folders_that_look_like_patterns(tmp_path, name):
    save(tmp_path / name, 5)
    assert_same(restore_newest(tmp_path / name)[0], make_state(5))
    target = abstract(make_state()).ema_params
    assert_same(SavedWeights(str(tmp_path / name)).read("ema", target), make_state(5).ema_params)
    save(tmp_path / name, 10, keep=1)
    assert {path.name for path in (tmp_path / name / "checkpoints").iterdir()} == {"10"}


def test_digests_of_weights_are_those_of_their_files(workdir, tmp_path):
    digests = {
        (step, weights): weights_digest(str(workdir), step, weights)
        for step in (5, 10)
        for weights in ("ema", "params")
    }
    assert len(set(digests.values())) == 4
    copy = shutil.copytree(workdir, tmp_path / "copy")
    assert weights_digest(str(copy), 10) == digests[10, "ema"]
    # As of a conversion that an earlier version made: from the files themselves.
    forget_checksums(copy / "checkpoints" / "10")
    assert weights_digest(str(copy), 10) == digests[10, "ema"]
    flip(largest(copy / "checkpoints" / "10" / "ema_params"))
    assert weights_digest(str(copy), 10) != digests[10, "ema"]
    assert weights_digest(str(copy), 10, "params") == digests[10, "params"]
    (copy / "checkpoints" / "5" / CHECKSUMS).write_text("[]")
    with pytest.raises(DamagedCheckpointError):
        weights_digest(str(copy), 5)


@pytest.mark.parametrize("damage", ["deleted", "emptied", "cut"])
def test_damage_without_checksums(workdir, damage):
    """As of an older version's: what Orbax and TensorStore notice themselves."""
    folder = workdir / "checkpoints" / "10"
    forget_checksums(folder)
    assert find_damage(folder) is None
    for name in ("manifest.ocdbt", "array_metadatas/process_0", "largest"):
        shutil.copytree(folder, workdir / "copy")
        params = folder / "params"
        file = largest(params) if name == "largest" else params / name
        if damage == "deleted" and name.startswith("array_metadatas"):
            shutil.rmtree(params)  # that file alone is not missed
        else:
            DAMAGES[damage](file)
        if damage == "deleted" and not params.is_dir():
            with pytest.raises(UsageError, match=r"params.*is missing there and \(96,\) here"):
                restore_newest(workdir)
            shutil.rmtree(folder)
        else:
            assert restore_newest(workdir)[1] == 5
            shutil.rmtree(folder.with_name("broken-10"))
        (workdir / "copy").rename(folder)
    shutil.rmtree(folder / "opt_state")
    assert restore_newest(workdir)[1] == 5


def test_no_readable_checkpoint(workdir):
    folder = workdir / "checkpoints"
    for step in ("5", "10"):
        DAMAGES["cut"](largest(folder / step / "params"))
    with pytest.raises(UsageError, match=r"no checkpoint can .*/10 is damaged .*/5 is damaged "):
        restore_newest(workdir)
    assert {path.name for path in folder.iterdir()} == {"5", "10"}


def test_another_model_is_no_damage(workdir):
    target = abstract(make_state())
    kernel = target.params["block"]["kernel"]
    wider = jax.ShapeDtypeStruct((64, 128), kernel.dtype, sharding=kernel.sharding)
    without = {"block": target.params["block"]}
    for params, message in (
        (target.params | {"block": target.params["block"] | {"kernel": wider}},
         r"params.block.kernel is \(64, 96\) there and \(64, 128\) here"),
        (without, r"params.scale is \(5,\) there and missing here"),
        (target.params | {"gate": kernel}, r"params.gate is missing there and \(64, 96\) here"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=f"10 is of another model .*{message}") as error:
            restore_newest(workdir, target.replace(params=params))
        assert not isinstance(error.value, DamagedCheckpointError)
    assert saved_steps(workdir) == {5, 10}


class LargerState(TrainState):
    """A state with one more field."""

    averages: Any = None


def test_a_state_with_another_field(workdir, tmp_path):
    average = {"0.05": {"a": np.ones((8, 2), np.float32)}}
    state = make_state(4, kind=LargerState, averages=average)
    with Checkpointer(tmp_path / "larger", META, keep=1) as saver:
        saver.save(4, state)
        saver.wait()
        assert_same(saver.restore(4, abstract(state)), state)
    # Checkpoints without the field do for a state that has nothing in it, and for no other.
    with pytest.raises(UsageError, match=r"averages.0.05.a is missing there and \(8, 2\) here"):
        restore_newest(workdir, abstract(state))
    empty = abstract(make_state(kind=LargerState, averages={}))
    restored, step = restore_newest(workdir, empty)
    assert step == 10
    assert restored.averages == {}
    with Checkpointer(workdir, META, keep=10) as saver:
        saver.save(11, restored.replace(step=restored.step + 1))
    assert restore_newest(workdir, empty)[1] == 11


@pytest.fixture
def small_files():
    """No file can grow beyond 8 KB, as if the disk were full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, limits[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("when", ["save", "close"])
def test_a_save_that_cannot_be_written(workdir, small_files, capfd, when):
    def run():
        with Checkpointer(workdir, META, keep=1) as saver:
            small_files()
            saver.save(15, make_state(15))
            if when == "save":
                saver.save(20, make_state(20))

    with pytest.raises(UsageError) as error:
        run()
    for part in ("checkpoints: step 15 could not be saved (File too large; ", " MB free there)",
                 "make room", "goes on from step 10"):  # fmt: skip
        assert part in str(error.value)
    assert "\n" not in str(error.value)
    assert capfd.readouterr().err == ""  # Orbax would print hundreds of lines
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"5", "10"}
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    assert_same(restore_newest(workdir)[0], make_state(10))
    save(workdir, 15)
    assert_same(restore_newest(workdir)[0], make_state(15))


def test_what_comes_late_of_a_failed_save_goes_too(tmp_path):
    folder = tmp_path / "15.orbax-checkpoint-tmp"
    folder.mkdir()

    def write_late():
        time.sleep(0.2)
        folder.mkdir()
        (folder / "a file").write_text("late")

    thread = threading.Thread(target=write_late)
    thread.start()
    writer._remove_unfinished(tmp_path, 15)
    thread.join()
    assert not folder.exists()


def test_a_folder_that_has_gone(workdir):
    with Checkpointer(workdir, META, keep=1) as saver:
        shutil.rmtree(workdir)
        workdir.write_text("a file")
        with pytest.raises(UsageError, match=r"15 could not be saved \(.*from the beginning"):
            saver.save(15, make_state(15))


def test_what_ended_the_run_is_not_hidden_by_a_failed_save(workdir, small_files, capfd):
    def run():
        with Checkpointer(workdir, META, keep=1) as saver:
            small_files()
            saver.save(15, make_state(15))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert "warning: " in (err := capfd.readouterr().err)
    assert "step 15 could not be saved" in err


def test_other_errors_of_a_save_keep_their_name(workdir, monkeypatch):
    def broken(*args):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(writer, "checksums", broken)
    with pytest.raises(RuntimeError, match="step 15 could not be saved .a bug"):
        save(workdir, 15)
    assert saved_steps(workdir) == {5, 10}


def test_damaged_weights_are_not_sampled(workdir):
    saved = SavedWeights(str(workdir))
    assert saved.config == with_defaults(META["config"])  # as an older version may have saved it
    target = abstract(make_state()).ema_params
    assert_same(saved.read("ema", target), make_state(10).ema_params)
    folder = workdir / "checkpoints" / "10"
    flip(largest(folder / "ema_params"))
    assert saved.leaves("params")
    for read in (lambda: saved.read("ema", target), lambda: saved.leaves("ema")):
        with pytest.raises(UsageError, match="10 is damaged .ema_params/.*another step"):
            read()
    flip(folder / "opt_state" / "_METADATA")
    with pytest.raises(UsageError, match="10 is damaged .opt_state/_METADATA"):
        saved.optimizer_leaves()
    (folder / "meta" / "metadata").write_text(json.dumps({}))
    with pytest.raises(UsageError, match="10 is damaged .meta/metadata has 2 bytes"):
        SavedWeights(str(workdir))
