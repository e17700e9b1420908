"""Prepared latents: shards, resuming, checksums, and what is refused."""

import json
import shutil

import msgpack
import numpy as np
import pytest

from configs import default
from dico_jax.autoencoders import Autoencoder
from dico_jax.autoencoders.weights import Weights
from dico_jax.data import latent_preparation
from dico_jax.data.latent_preparation import Options, prepare_latents
from dico_jax.data.latents import PreparedLatents, read_manifest, verify
from dico_jax.errors import UsageError
from tests.test_encoding import encode

SIZE = 8


class Noise:
    """Eleven pictures of three classes; some of them may be bad."""

    kind = "pictures"
    class_names = ("a", "b", "c")

    def __init__(self, bad=(), skipped=(), count=11, **fields):
        self.bad, self.skipped = bad, dict.fromkeys(skipped, "no picture")
        self.fields = fields
        rng = np.random.default_rng(0)
        self.images = rng.integers(0, 256, (count, SIZE, SIZE, 3), np.uint8)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        image = b"no picture" if i in self.bad else self.images[i]
        return {"image": image, "label": int(i) % 3} | self.fields

    def example_id(self, i):
        return f"{'abc'[i % 3]}/{i}.png"

    def __repr__(self):
        return "Noise()"


def autoencoder(digest="1" * 64):
    return Autoencoder(
        "sd_vae", 2, 3, encode_moments=encode, decode=lambda params, latents: latents,
        load=lambda: Weights({"gain": np.float32(2)}, encoder_digest=digest),
    )  # fmt: skip


def options(**changes):
    return Options(**{"image_size": SIZE, "shard_size": 4, "batch_size": 3} | changes)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    out = tmp_path_factory.mktemp("latents") / "out"
    prepare_latents(Noise(), autoencoder(), str(out), options())
    return out


@pytest.fixture
def copy(prepared, tmp_path):
    return shutil.copytree(prepared, tmp_path / "copy")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_moments_of_both_orientations_labels_and_ids(prepared):
    source, pictures = PreparedLatents(str(prepared)), Noise()
    assert len(source) == 11
    assert source.class_names == ["a", "b", "c"]
    assert source.image_shape == (4, 4, 6)
    for i in range(11):
        example, image = source[np.int64(i)], pictures.images[i]
        assert example["label"] == i % 3
        assert source.example_id(i) == pictures.example_id(i)
        both = np.stack([image, image[:, ::-1]]) / np.float32(127.5) - 1
        expected = encode({"gain": np.float32(2)}, both)
        assert example["image"].dtype == np.float16
        np.testing.assert_allclose(example["image"], expected, atol=1e-3)
    manifest = verify(str(prepared))
    assert [shard.count for shard in manifest.shards] == [4, 4, 3]
    # The documented size: 4 * orientations * h * w * channels bytes, and labels and names.
    assert sum(shard.bytes for shard in manifest.shards) > 11 * 4 * 2 * 4 * 4 * 3
    versions = json.loads((prepared / "manifest.json").read_text())["versions"]
    assert versions["jax"]


@pytest.mark.parametrize(("dtype", "mirrored"), [("bfloat16", True), ("float16", False)])
def test_other_forms(tmp_path, dtype, mirrored):
    prepare_latents(Noise(), autoencoder(), str(tmp_path), options(dtype=dtype, mirrored=mirrored))
    example = PreparedLatents(str(tmp_path))[5]["image"]
    assert example.shape == (2 if mirrored else 1, 4, 4, 6)
    assert str(example.dtype) == dtype
    verify(str(tmp_path))


def test_processes_share_the_work_and_the_last_one_writes_the_manifest(prepared, tmp_path):
    parts = [options(process_index=i, process_count=2, batch_size=5) for i in range(2)]
    assert prepare_latents(Noise(), autoencoder(), str(tmp_path), parts[1]) is None
    assert len(list(tmp_path.glob("*.array_record"))) == 1
    with pytest.raises(UsageError, match=r"is not finished \(1 of 3 shards\): run the same"):
        read_manifest(tmp_path)
    assert prepare_latents(Noise(), autoencoder(), str(tmp_path), parts[0]) is not None
    assert contents(tmp_path) == contents(prepared)


def test_a_killed_call_goes_on_without_redoing_finished_shards(prepared, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    read, calls = [], []

    class Dies(Noise):
        def __getitem__(self, i):
            read.append(int(i))
            return super().__getitem__(i)

    record = latent_preparation._record

    def dying(*args):
        calls.append(args)
        if len(calls) == 7:
            raise Killed
        return record(*args)

    monkeypatch.setattr(latent_preparation, "_record", dying)
    with pytest.raises(Killed):
        prepare_latents(Dies(), autoencoder(), str(tmp_path), options())
    monkeypatch.setattr(latent_preparation, "_record", record)
    first = tmp_path / "latents-00000-of-00003.array_record"
    assert [path.name for path in tmp_path.glob("*.array_record")] == [first.name]
    written = first.stat().st_mtime_ns
    (tmp_path / ".writing-0-left").mkdir()  # what a kill without clean-up leaves
    read.clear()
    prepare_latents(Dies(), autoencoder(), str(tmp_path), options())
    assert read[0] == 0  # which tells the fields
    assert set(read[1:]) == set(range(4, 11))
    assert first.stat().st_mtime_ns == written
    assert contents(tmp_path) == contents(prepared)


def test_bad_pictures_are_skipped_and_listed(tmp_path):
    source = Noise(bad=(2, 9), skipped=["a/notes.txt"])
    manifest = prepare_latents(source, autoencoder(), str(tmp_path), options(max_bad_fraction=0.25))
    assert set(manifest.bad) == {"c/2.png", "a/9.png", "a/notes.txt"}
    assert "no picture in a format" in manifest.bad["c/2.png"]
    found = PreparedLatents(str(tmp_path))
    ids = [found.example_id(i) for i in range(len(found))]
    assert ids == [source.example_id(i) for i in range(11) if i not in (2, 9)]
    verify(str(tmp_path))


def test_too_many_bad_pictures_stop_and_finished_shards_stay(tmp_path):
    source, out = Noise(bad=(5, 9, 10)), str(tmp_path)
    with pytest.raises(UsageError) as error:
        prepare_latents(source, autoencoder(), out, options(max_bad_fraction=0.2))
    for part in ("--max_bad_fraction=0.2: 3 of 11", "c/5.png", "a/9.png", "b/10.png"):
        assert part in str(error.value)
    assert len(list(tmp_path.glob("*.array_record"))) == 2
    assert not list(tmp_path.glob(".writing*"))
    done = prepare_latents(source, autoencoder(), out, options(max_bad_fraction=0.3))
    assert len(done.bad) == 3


@pytest.mark.parametrize(
    ("source", "vae", "changes", "message"),
    [
        (Noise(), autoencoder("2" * 64), {}, "encoder_digest was"),
        (Noise(), autoencoder(), {"image_size": 10}, "image_size was 8, is 10"),
        (Noise(), autoencoder(), {"dtype": "bfloat16"}, 'dtype was "float16", is "bfloat16"'),
        (Noise(count=12), autoencoder(), {}, "num_examples was 11, is 12"),
        (
            Noise(caption="c"),
            autoencoder(),
            {},
            r'fields was \["label"\], is \["caption", "label"\]',
        ),
        (Noise(), autoencoder(), {"image_size": 9}, "--image_size=9 must be a multiple of 2"),
        (PreparedLatents, autoencoder(), {}, "has moments, not pictures"),
        (Noise(), Autoencoder("identity", 1, None, decode=abs), {}, "'identity' has no encoder"),
    ],
)
def test_another_plan_is_refused_and_nothing_is_changed(prepared, source, vae, changes, message):
    before = contents(prepared)
    source = source if isinstance(source, Noise) else source(str(prepared))
    with pytest.raises(UsageError, match=message):
        prepare_latents(source, vae, str(prepared), options(**changes))
    assert contents(prepared) == before


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UsageError, match="is not empty and has no plan.json"):
        prepare_latents(Noise(), autoencoder(), str(tmp_path), options())
    with pytest.raises(FileExistsError):  # which the command says in one line
        prepare_latents(Noise(), autoencoder(), str(tmp_path / "thesis.tex"), options())


def damaged(file, at=-1):
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


SHARD = "latents-00001-of-00003.array_record"


def test_a_wrong_checksum(copy):
    damaged(copy / SHARD, 300)
    source = PreparedLatents(str(copy))
    with pytest.raises(UsageError, match=f"{copy}/{SHARD} has a wrong checksum"):
        source.check_checksums()
    source.check_checksums(process_index=0, process_count=3)  # another one's part
    with pytest.raises(UsageError, match="wrong checksum"):
        verify(str(copy))


def config(folder, **changes):
    data = default.get_config().data
    data.path, data.image_size = str(folder), SIZE
    data.update(changes)
    return data


def remove(name):
    return lambda copy: (copy / name).unlink()


def rewrite(name, **changes):
    def write(copy):
        values = json.loads((copy / name).read_text())
        values["plan"] |= changes
        (copy / name).write_text(json.dumps(values))

    return write


@pytest.mark.parametrize(
    ("damage", "changes", "message"),
    [
        (None, {"path": None}, "data.path is not set"),
        (remove(SHARD), {}, f"{SHARD} has not the"),
        (
            lambda copy: (copy / SHARD).write_bytes(b""),
            {},
            "has not the .* its manifest says",
        ),
        (remove("manifest.json"), {}, r"is not finished \(3 of 3 shards\)"),
        (lambda c: [remove(f"{n}.json")(c) for n in ("plan", "manifest")], {}, "no manifest.json"),
        (lambda copy: (copy / "manifest.json").write_text("{"), {}, "manifest.json does not desc"),
        (lambda copy: (copy / "manifest.json").write_text("{}"), {}, "does not describe latents"),
        (rewrite("manifest.json", format="2"), {}, "its format is '2', not 'dico_jax latents 1'"),
        (shutil.rmtree, {}, "does not exist"),
        (None, {"image_size": 16}, "prepared for config.data.image_size=8, not 16"),
        (rewrite("manifest.json", shape=(1, 4, 4, 6)), {}, "prepared without mirrored pictures"),
    ],
)
def test_bad_folders_are_found_when_they_are_opened(copy, damage, changes, message):
    if damage:
        damage(copy)
    with pytest.raises(UsageError, match=message) as error:
        PreparedLatents.from_config(config(copy, **changes))
    assert str(error.value).startswith("data.path")


def test_records_of_a_source_without_classes_are_right(tmp_path):
    class Plain(Noise):
        class_names = ()

        def __getitem__(self, i):
            return {"image": self.images[i]}

    prepare_latents(Plain(), autoencoder(), str(tmp_path), options())
    assert not verify(str(tmp_path)).fields


def test_verify_finds_a_wrong_record(tmp_path):
    prepare_latents(Noise(label=7), autoencoder(), str(tmp_path), options())
    with pytest.raises(UsageError, match="record 0 cannot be read, .* is of no class"):
        verify(str(tmp_path))


def test_further_fields_are_kept(tmp_path):
    """Captions, token arrays, nested ones: whatever msgpack and NumPy hold."""
    tokens = np.arange(6, dtype=np.float16).reshape(3, 2)

    class Captioned(Noise):
        def __getitem__(self, i):
            captions = [f"a picture \u00e9 {j}" for j in range(int(i) % 3)]
            fields = {"caption": captions, "tokens": tokens + int(i), "size": np.int64(i)}
            extra = {"seen": {"x": b"\0", "y": None}} if i == 4 else {}
            return super().__getitem__(i) | fields | extra

    source = Captioned(bad=(1,))
    for workers in (0, 1):
        out = str(tmp_path / str(workers))
        wanted = options(max_bad_fraction=0.1, num_workers=workers)
        manifest = prepare_latents(source, autoencoder(), out, wanted)
        assert manifest.fields == {"label", "caption", "tokens", "size"}
        verify(out)
        found = PreparedLatents(out)
        assert len(found) == 10
        assert found[3]["seen"] == {"x": b"\0", "y": None}
        for i, index in enumerate([0, *range(2, 11)]):
            example, original = found[i], source[index]
            assert example["label"] == original["label"]
            assert example["caption"] == original["caption"]
            assert example["size"] == index
            np.testing.assert_array_equal(example["tokens"], original["tokens"])
            assert example["tokens"].dtype == np.float16


def test_fields_that_cannot_be_kept(tmp_path):
    with pytest.raises(UsageError, match="a/0.png has a field that cannot be kept: a object"):
        prepare_latents(Noise(made=object()), autoencoder(), str(tmp_path), options())


def test_latents_of_the_first_version(prepared, tmp_path):
    """Shards that tell no fields, of records with labels alone."""
    copy = shutil.copytree(prepared, tmp_path / "copy")
    for file in [copy / "manifest.json", *copy.glob("latents-*.json")]:
        values = json.loads(file.read_text())
        for shard in values.get("shards", [values]):
            assert shard.pop("fields") == ["label"]
        file.write_text(json.dumps(values))
    manifest = verify(str(copy))
    assert manifest.fields == {"label"}
    assert prepare_latents(Noise(), autoencoder(), str(copy), options()).shards == manifest.shards
    record = msgpack.unpackb(PreparedLatents(str(copy))._records[0])
    assert list(record) == ["moments", "label", "id"]
