"""Where examples come from: folders, zip files, ArrayRecord files, TFDS, arrays, digits."""

import concurrent.futures
import contextlib
import errno
import functools
import importlib
import io
import json
import os
import pickle
import random
import socket
import struct
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
from PIL import Image

from configs import default
from dico_jax import files
from dico_jax.data import paths
from dico_jax.data.pictures import BadExample, PictureReader
from dico_jax.data.sources import SOURCES, create_source
from dico_jax.errors import UsageError
from tests.real_data import DATA, IMAGENET, requires_data

TREE = {
    "dog/b.PNG": b"dog b",
    "dog/a.jpg": b"dog a",
    "cat/2.webp": b"cat 2",
    "cat/10.jpeg": b"cat 10",
    "bird/\u00e4 b.png": b"bird",
}
IDS = ["bird/\u00e4 b.png", "cat/10.jpeg", "cat/2.webp", "dog/a.jpg", "dog/b.PNG"]
HIDDEN = [
    ".DS_Store",
    ".git/objects/a.png",
    "__MACOSX/dog/a.jpg",
    "dog/._a.jpg",
    "dog/Thumbs.db",
    "cat/desktop.ini",
    "cat/.ipynb_checkpoints/x.png",
]


def data_config(source, **fields):
    config = default.get_config().data
    config.update({"source": source, **fields})
    return config


def open_source(source, **fields):
    return create_source(data_config(source, **fields))


def write_folder(path, tree, folders=()):
    """A folder of the files of `tree` (name to content)."""
    for name, content in tree.items():
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    for name in folders:
        (path / name).mkdir(parents=True)
    path.mkdir(exist_ok=True)
    return open_source("folder", path=str(path))


def write_zip(path, tree, folders=(), **options):
    """The same as a zip file."""
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name in folders:
            archive.mkdir(name)
        for name, content in tree.items():
            archive.writestr(name, content)
    return open_source("zip", path=str(path))


def write_deflated(path, tree, folders=()):
    return write_zip(path, tree, folders, compression=zipfile.ZIP_DEFLATED)


layouts = pytest.mark.parametrize("write", [write_folder, write_zip, write_deflated])


@layouts
def test_classes_are_folders(tmp_path, write):
    source = write(tmp_path / "x", TREE | {"README.txt": b""})
    assert source.kind == "pictures"
    assert source.class_names == ["bird", "cat", "dog"]
    assert [source.example_id(i) for i in range(len(source))] == IDS
    assert [e["label"] for e in source] == [0, 1, 1, 2, 2]  # an end: out of range is IndexError
    assert [e["image"] for e in source] == [TREE[name] for name in IDS]
    assert source.skipped == {}
    assert source[-1] == source[4]
    assert source[np.int64(1)]["image"] == b"cat 10"
    with pytest.raises(IndexError):
        source.example_id(5)


@layouts
def test_hidden_files_are_nothing(tmp_path, write):
    source = write(tmp_path / "x", TREE | dict.fromkeys(HIDDEN, b"x"))
    assert source.skipped == {}
    assert [source.example_id(i) for i in range(len(source))] == IDS


@layouts
def test_other_files_are_skipped(tmp_path, write):
    others = ["dog/notes.txt", "cat/README", "loose.png"]
    source = write(tmp_path / "x", TREE | dict.fromkeys(others, b"x"))
    assert len(source) == 5
    assert source.skipped == {
        "cat/README": "its suffix '' is not a picture's",
        "dog/notes.txt": "its suffix '.txt' is not a picture's",
        "loose.png": "it lies beside the class folders",
    }


@layouts
def test_one_class_is_enough(tmp_path, write):
    source = write(tmp_path / "x", {"all/1.png": b"1", "all/2.png": b"2"})
    assert source.class_names == ["all"]
    assert [source.example_id(i) for i in range(2)] == ["all/1.png", "all/2.png"]


@layouts
def test_sources_travel_to_workers(tmp_path, write):
    source = write(tmp_path / "x", TREE)
    assert source[0]["image"] == b"bird"  # whatever is open now must not be in the way
    copy = pickle.loads(pickle.dumps(source))
    assert repr(copy) == repr(source)
    assert "0x" not in repr(source)
    assert list(copy) == list(source)
    assert copy.example_id(3) == "dog/a.jpg"


@layouts
def test_names_of_many_files_pickle_small(tmp_path, write):
    tree = {f"class/{i:05d}.png": b"" for i in range(1000)}
    # 8 bytes for each name's end, and 32 for each entry of a zip file.
    assert len(pickle.dumps(write(tmp_path / "x", tree))) < 1000 * (9 + 8 + 32) + 2000


@layouts
def test_threads_read_at_once(tmp_path, write):
    tree = {f"{i % 7}/{i}.png": os.urandom(20_000) for i in range(100)}
    source = write(tmp_path / "x", tree)
    order = random.Random(0).choices(range(100), k=1000)
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        for index, example in zip(order, pool.map(source.__getitem__, order), strict=True):
            assert example["image"] == tree[source.example_id(index)]


def test_names_that_are_not_utf8_are_shown_with_escapes(tmp_path):
    (tmp_path / "a").mkdir()
    with open(os.fsencode(tmp_path) + b"/a/\xff.png", "wb") as file:
        file.write(b"here")
    source = open_source("folder", path=str(tmp_path))
    assert source.example_id(0) == "a/\\xff.png"
    assert source[0]["image"] == b"here"


@pytest.mark.parametrize("name", ["folder", "zip", "array_record", "arrays"])
def test_paths_must_be_there(tmp_path, name):
    with pytest.raises(UsageError, match="^data.path is not set: give "):
        open_source(name)
    missing = str(tmp_path / "nothing")
    with pytest.raises(
        UsageError, match=f"^data.path={missing}: (FileNotFoundError|there are no ArrayRecord)"
    ):
        open_source(name, path=missing)
    with pytest.raises(UsageError, match="^data.path=http://x/y: only local and gs:// paths"):
        open_source(name, path="http://x/y")


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_folder(tmp_path / "x", TREE)
    assert len(open_source("folder", path="~/x")) == 5


def test_path_of_another_kind(tmp_path):
    write_folder(tmp_path / "folder", TREE)
    with pytest.raises(UsageError, match=r"data.path=.*folder: IsADirectoryError"):
        open_source("zip", path=str(tmp_path / "folder"))
    write_zip(tmp_path / "file.zip", TREE)
    with pytest.raises(UsageError, match=r"data.path=.*file.zip: NotADirectoryError"):
        open_source("folder", path=str(tmp_path / "file.zip"))


def refuse(error, name):
    """A function that raises for one path, in the place of os.scandir or open."""

    def call(real, path, *args):
        if str(path).endswith(name):
            raise OSError(error, os.strerror(error), path)  # of the class of that number
        return real(path, *args)

    return call


@pytest.mark.parametrize("name", ["x", "x/cat"])
def test_no_permission_to_list(tmp_path, monkeypatch, name):
    write_folder(tmp_path / "x", TREE)
    call = functools.partial(refuse(errno.EACCES, name), os.scandir)
    monkeypatch.setattr(os, "scandir", call)
    with pytest.raises(UsageError, match="^data.path=.*x: PermissionError: .*(x|/cat)'$"):
        open_source("folder", path=str(tmp_path / "x"))


def test_no_permission_to_read(tmp_path, monkeypatch):
    write_zip(tmp_path / "x.zip", TREE)
    call = functools.partial(refuse(errno.EACCES, "x.zip"), open)
    monkeypatch.setattr(files, "open", call, raising=False)
    with pytest.raises(UsageError, match="^data.path=.*x.zip: PermissionError: .*x.zip'$"):
        open_source("zip", path=str(tmp_path / "x.zip"))


def test_one_file_that_cannot_be_read_is_bad_and_a_broken_disk_is_not(tmp_path, monkeypatch):
    source = write_folder(tmp_path / "x", TREE)
    for error in (errno.EACCES, errno.ENOENT):
        call = functools.partial(refuse(error, "a.jpg"), open)
        monkeypatch.setattr(files, "open", call, raising=False)
        with pytest.raises(BadExample, match="Permission denied|No such file"):
            source[3]
        assert source[4]["image"] == b"dog b"
    call = functools.partial(refuse(errno.EIO, "a.jpg"), open)
    monkeypatch.setattr(files, "open", call, raising=False)
    with pytest.raises(OSError, match="Input/output error"):
        source[3]


def test_huge_files_are_bad(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "MAX_FILE_BYTES", 4)
    source = write_folder(tmp_path / "x", TREE)
    assert source[0]["image"] == b"bird"
    with pytest.raises(BadExample, match="larger than 4 bytes"):
        source[1]


@layouts
def test_no_folders(tmp_path, write):
    with pytest.raises(UsageError, match=r"no folders|no folders of pictures \(0 pictures"):
        write(tmp_path / "x", {})
    with pytest.raises(UsageError, match=r"2 pictures lie in .*one is enough"):
        write(tmp_path / "y", {"1.png": b"", "2.png": b"", "notes.txt": b""})


@layouts
def test_empty_classes_are_all_named(tmp_path, write):
    expected = (
        "no pictures in the class folders a, z "
        r"\(skipped in them: 2, such as a/b.txt\): fill or remove them$"
    )
    with pytest.raises(UsageError, match=expected):
        write(tmp_path / "x", TREE | {"a/b.txt": b"", "a/c.bin": b""}, ["z"])


@layouts
def test_pictures_that_lie_too_deep(tmp_path, write):
    expected = (
        r"pictures lie deeper than CLASS/FILE \((train|val)/.*the folder that holds the classes"
    )
    with pytest.raises(UsageError, match=expected):
        write(tmp_path / "x", {"train/a/1.png": b"", "val/a/1.png": b"", "train/a/2.png": b""})
    with pytest.raises(UsageError, match=r"\(dog/old/c.png\)"):
        write(tmp_path / "y", TREE | {"dog/old/c.png": b""})


@layouts
def test_folders_without_pictures_may_lie_in_a_class(tmp_path, write):
    assert len(write(tmp_path / "x", TREE | {"dog/notes/a.txt": b""}, ["cat/empty"])) == 5


def test_broken_links_and_pipes_are_skipped(tmp_path):
    write_folder(tmp_path, TREE)
    (tmp_path / "dog" / "link.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "dog" / "good.png").symlink_to(tmp_path / "dog" / "a.jpg")
    (tmp_path / "ape").symlink_to(tmp_path / "cat")
    os.mkfifo(tmp_path / "dog" / "pipe.png")
    source = open_source("folder", path=str(tmp_path))
    assert source.class_names == ["ape", "bird", "cat", "dog"]
    assert len(source) == 8
    reason = "it is not a file, or a broken link"
    assert source.skipped == {"dog/link.png": reason, "dog/pipe.png": reason}


@pytest.fixture
def bucket(monkeypatch):
    """A file system in memory in the place of gs://."""
    from etils.epath import backend, gpath
    from fsspec.implementations.memory import MemoryFileSystem

    class Bucket(MemoryFileSystem):
        store = {}  # noqa: RUF012
        pseudo_dirs = [""]  # noqa: RUF012
        cachable = False

        @classmethod
        def _strip_protocol(cls, path):
            return "/" + str(path).removeprefix("gs://").strip("/")

    fs = Bucket()
    monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)  # it would be taken instead
    monkeypatch.setattr(backend.fsspec_backend.__class__, "_get_filesystem", lambda self, name: fs)
    return fs


def test_folder_in_a_bucket(bucket):
    for name, content in (TREE | {"dog/notes.txt": b"", "dog/.hidden.png": b""}).items():
        bucket.pipe_file(f"gs://bucket/x/{name}", content)
    source = open_source("folder", path="gs://bucket/x")
    assert [source.example_id(i) for i in range(5)] == IDS
    assert [e["image"] for e in pickle.loads(pickle.dumps(source))] == [TREE[i] for i in IDS]
    assert list(source.skipped) == ["dog/notes.txt"]
    with pytest.raises(UsageError, match="^data.path=gs://bucket/y: FileNotFoundError: "):
        open_source("folder", path="gs://bucket/y")
    bucket.rm_file("gs://bucket/x/dog/a.jpg")
    with pytest.raises(BadExample, match="FileNotFoundError"):
        source[3]


def test_zip_in_a_bucket(bucket, tmp_path):
    write_zip(tmp_path / "x.zip", TREE)
    bucket.pipe_file("gs://bucket/x.zip", (tmp_path / "x.zip").read_bytes())
    source = open_source("zip", path="gs://bucket/x.zip")
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        images = [e["image"] for e in pool.map(source.__getitem__, range(5))]
    assert images == [TREE[i] for i in IDS]
    with pytest.raises(UsageError, match="^data.path=gs://bucket/y.zip: FileNotFoundError: "):
        open_source("zip", path="gs://bucket/y.zip")


@pytest.mark.parametrize("name", ["folder", "zip"])
def test_buckets_need_gcsfs(monkeypatch, name):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    # Of a test before, which has read a bucket.
    importlib.import_module(
        "etils.epath.backend"
    )._FileSystemSpecBackend._get_filesystem.cache_clear()
    monkeypatch.delitem(importlib.import_module("fsspec.registry")._registry, "gcs", raising=False)
    with pytest.raises(UsageError, match="pip install gcsfs"):
        open_source(name, path=f"gs://bucket/{name}")


@pytest.mark.parametrize("name", ["array_record", "arrays", "tfds"])
def test_what_cannot_be_read_in_buckets(name):
    with pytest.raises(
        UsageError, match="^data.path=gs://b/x: .* copy them .* or mount the bucket"
    ):
        open_source(name, path="gs://b/x", name="cifar10")


def test_common_folders_of_a_zip_are_left_out(tmp_path):
    tree = {f"data/train/{name}": content for name, content in TREE.items()}
    tree |= {"data/LICENSE": b"", "data/train/": b"", "data/train/dog/": b"", "data/x.txt": b""}
    source = write_zip(tmp_path / "x.zip", tree)
    assert [source.example_id(i) for i in range(5)] == IDS
    assert [e["image"] for e in source] == [TREE[name] for name in IDS]
    assert source.skipped == {}
    assert write_zip(tmp_path / "y.zip", {"top/only/1.png": b""}).class_names == ["only"]


def test_names_in_a_zip_are_only_names(tmp_path):
    source = write_zip(tmp_path / "x.zip", {"/abs/1.png": b"1", "/tmp/2.png": b"2"})
    assert source.class_names == ["abs", "tmp"]
    assert [e["image"] for e in source] == [b"1", b"2"]
    source = write_zip(tmp_path / "y.zip", {"../1.png": b"1", "b/2.png": b"2", "b\\3/4.png": b"4"})
    assert [source.example_id(i) for i in range(3)] == ["../1.png", "b/2.png", "b\\3/4.png"]
    assert [e["image"] for e in source] == [b"1", b"2", b"4"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.zip", "y.zip"]


def test_the_later_of_two_entries_counts(tmp_path):
    write_zip(tmp_path / "x.zip", {"a/1.png": b"old"})
    with (
        zipfile.ZipFile(tmp_path / "x.zip", "a") as archive,
        pytest.warns(UserWarning, match="Duplicate name"),
    ):
        archive.writestr("a/1.png", b"new")
    source = open_source("zip", path=str(tmp_path / "x.zip"))
    assert [e["image"] for e in source] == [b"new"]


def central_header(data, name):
    """Where an entry's header in a zip file's directory starts."""
    return data.rindex(name.encode()) - 46


def test_bad_zip_files(tmp_path):
    path = tmp_path / "x.zip"
    write_zip(path, TREE)
    good = path.read_bytes()

    def opening(data):
        path.write_bytes(data)
        with pytest.raises(UsageError) as caught:
            open_source("zip", path=str(path))
        assert str(caught.value).startswith(f"data.path={path}: ")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "it is not a zip file, or damaged" in opening(b"")
    assert "it is not a zip file, or damaged" in opening(b"\xff\xd8 a picture")
    assert "it is not a zip file, or damaged" in opening(good[:-30])
    assert "it has no folders of pictures" in opening(zip_bytes({}))
    at = central_header(good, "dog/a.jpg")
    encrypted = bytearray(good)
    encrypted[at + 8] |= 1
    assert "dog/a.jpg is encrypted: pack it without a password" in opening(encrypted)
    outside = bytearray(good)
    outside[at + 42 : at + 46] = struct.pack("<L", 1 << 30)
    assert "its entry dog/a.jpg lies outside the file" in opening(outside)
    method = zip_bytes(TREE, zipfile.ZIP_BZIP2)
    assert "is packed with another method than deflate" in opening(method)


def zip_bytes(tree, compression=zipfile.ZIP_STORED):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, content in tree.items():
            archive.writestr(name, content)
    return out.getvalue()


def test_bad_zip_entries(tmp_path):
    path = tmp_path / "x.zip"
    good = zip_bytes(TREE | {"dog/a.jpg": bytes(range(256))})
    data = good.index(bytes(range(256)))
    header = good.index(b"dog/a.jpg") - 30

    def reason(damaged):
        path.write_bytes(damaged)
        source = open_source("zip", path=str(path))
        assert source[4]["image"] == b"dog b"
        with pytest.raises(BadExample) as caught:
            source[3]
        return str(caught.value)

    assert "Bad CRC-32" in reason(good.replace(bytes(range(256)), bytes(256)))
    assert "Bad magic number" in reason(good[:header] + b"??" + good[header + 2 :])
    assert "differ" in reason(good[: data - 4] + b"x" + good[data - 3 :])
    huge = bytearray(good)
    at = central_header(good, "dog/a.jpg")
    huge[at + 24 : at + 28] = struct.pack("<L", 0xFFFFFF00)
    assert "declares 4294967040 bytes" in reason(bytes(huge))
    cut = bytearray(zip_bytes({"dog/a.jpg": bytes(9999)}, zipfile.ZIP_DEFLATED))
    at = central_header(cut, "dog/a.jpg")
    cut[at + 20 : at + 24] = struct.pack("<L", 5)
    path.write_bytes(cut)
    with pytest.raises(BadExample, match="its zip entry is damaged"):
        open_source("zip", path=str(path))[0]


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_damaged_zip_files_give_our_errors_alone(tmp_path, compression):
    rng = np.random.default_rng(0)
    path = tmp_path / "x.zip"
    good = zip_bytes({name: bytes(range(100)) for name in TREE}, compression)
    outcomes, reasons = set(), []
    for _ in range(400):
        data = bytearray(good)
        for place in rng.integers(0, len(data), rng.integers(1, 6)):
            data[place] = rng.integers(256)
        path.write_bytes(data[: len(data) - int(rng.integers(0, 3) == 0)])
        try:
            source = open_source("zip", path=str(path))
        except UsageError as error:
            reasons.append(str(error))
            continue
        for index in range(len(source)):
            try:
                assert source[index]["image"] == bytes(range(100))
                outcomes.add("good")
            except BadExample:
                outcomes.add("bad")
    assert outcomes == {"good", "bad"}
    assert reasons
    assert not any("\n" in reason for reason in reasons)


@requires_data
def test_real_folder():
    source = open_source("folder", path=str(IMAGENET))
    assert len(source) == len(source.class_names) == 60
    assert source.skipped == {}
    picture = PictureReader(64, 3)(source[7]["image"])
    assert picture.shape == (64, 64, 3)
    assert source.example_id(0) == "n01443537/n01443537_goldfish.JPEG"


@requires_data
@pytest.mark.parametrize(("part", "count"), [("train", 50_000), ("test", 10_000)])
def test_real_zips(part, count):
    start = time.process_time()
    source = open_source("zip", path=str(DATA / f"cifar10_{part}.zip"))
    assert time.process_time() - start < 2
    assert len(source) == count
    assert source.class_names[0] == "airplane"
    assert source.class_names[9] == "truck"
    example = source[count - 1]
    assert example["label"] == 9
    picture = PictureReader(32, 3)(example["image"])
    assert picture.shape == (32, 32, 3)


@pytest.mark.slow
def test_many_files_are_listed_fast(tmp_path):
    for c in range(100):
        folder = tmp_path / f"{c:03d}"
        folder.mkdir()
        for i in range(1000):
            (folder / f"{c:03d}_{i}.JPEG").touch()
    start = time.process_time()
    assert len(open_source("folder", path=str(tmp_path))) == 100_000
    assert time.process_time() - start < 1  # of ImageNet: 13


def make_example(**features):
    from tensorflow_datasets.proto import tf_example_pb2

    example = tf_example_pb2.Example()
    for name, value in features.items():
        feature = example.features.feature[name]
        values = value if isinstance(value, list) else [value]
        kind = feature.int64_list if isinstance(values[0], int) else feature.bytes_list
        kind.value.extend(values)
    return example.SerializeToString()


def write_records(file, records):
    from array_record.python import array_record_module

    file.parent.mkdir(parents=True, exist_ok=True)
    writer = array_record_module.ArrayRecordWriter(str(file), "group_size:1,uncompressed")
    for record in records:
        writer.write(record)
    writer.close()


def picture_records(indices, **features):
    return [make_example(image=b"image %d" % i, label=i % 3, **features) for i in indices]


def test_array_records(tmp_path):
    write_records(tmp_path / "x" / "b.array_record", picture_records(range(3, 7)))
    write_records(tmp_path / "x" / "a.arrayrecord-00000-of-00001", picture_records(range(3)))
    write_records(tmp_path / "x" / "empty.array_record", [])
    source = open_source("array_record", path=str(tmp_path / "x"))
    assert source.kind == "pictures"
    assert source.class_names == ["0", "1", "2"]
    assert [e["image"] for e in source] == [b"image %d" % i for i in range(7)]
    assert [e["label"] for e in source] == [0, 1, 2, 0, 1, 2, 0]
    names = [source.example_id(i) for i in (0, 2, 3, 6)]
    assert names == [
        *("a.arrayrecord-00000-of-00001/0", "a.arrayrecord-00000-of-00001/2"),
        *("b.array_record/0", "b.array_record/3"),
    ]
    copy = pickle.loads(pickle.dumps(source))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(copy.__getitem__, range(7))) == list(source)
    assert repr(copy) == repr(source)
    with pytest.raises(IndexError):
        source[7]
    pattern = open_source("array_record", path=str(tmp_path / "x" / "b.*"))
    assert len(pattern) == 4
    assert len(open_source("array_record", path=str(tmp_path / "x" / "b.array_record"))) == 4


def test_array_records_of_old_names_with_class_names_and_ids(tmp_path):
    features = {"image/encoded": b"i", "image/class/label": 1, "image/filename": b"n01/1.JPEG"}
    other = {"image/encoded": b"i", "image/class/label": 2}
    write_records(tmp_path / "a.array_record", [make_example(**f) for f in (features, other)])
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(UsageError, match="has a label 2: count from 0, or name all classes"):
        open_source("array_record", path=str(tmp_path))  # whose first label may be 1
    other["image/class/label"] = 7
    write_records(tmp_path / "a.array_record", [make_example(**f) for f in (features, other)])
    source = open_source("array_record", path=str(tmp_path))
    assert source.class_names == ["cat", "dog"]
    assert source[0] == {"image": b"i", "label": 1}
    assert source.example_id(0) == "n01/1.JPEG"
    assert source.example_id(1) == "a.array_record/1"
    with pytest.raises(BadExample, match="its label is 7, but there are 2 classes"):
        source[1]
    (tmp_path / "classes.txt").write_text("cat\n\ndog\n")
    with pytest.raises(UsageError, match=r"classes.txt has empty lines"):
        open_source("array_record", path=str(tmp_path))


def test_bad_array_records(tmp_path):
    bad = [
        make_example(image=b"i", label=[1, 2]),
        make_example(image=b"i", label=-1),
        make_example(image=[b"i", b"j"], label=0),
        make_example(label=0),
        make_example(image=b"i"),
    ]
    good = make_example(image=b"i", label=0)
    write_records(tmp_path / "a.array_record", [b"no proto", *bad[3:], good, *bad, good])
    source = open_source("array_record", path=str(tmp_path))
    for index in (0, 1, 2, 4, 5, 6, 7, 8):
        with pytest.raises(BadExample):
            source[index]
    assert source[3] == source[9] == {"image": b"i", "label": 0}
    assert source.example_id(0) == "a.array_record/0"


def test_damaged_array_records(tmp_path):
    file = tmp_path / "a.array_record"
    payload = [os.urandom(30_000) for _ in range(6)]
    records = [make_example(image=p, label=0, id=b"id %d" % i) for i, p in enumerate(payload)]
    write_records(file, records)
    good = file.read_bytes()
    at = good.index(payload[2][:100])
    file.write_bytes(good[:at] + bytes(100) + good[at + 100 :])
    source = open_source("array_record", path=str(tmp_path))
    with pytest.raises(BadExample, match="its record is damaged: "):
        source[2]
    assert source[3]["image"] == payload[3]
    assert [source.example_id(i) for i in (2, 3)] == ["a.array_record/2", "id 3"]
    for content in (b"", b"junk" * 30_000, good[: len(good) // 2]):
        file.write_bytes(content)
        with pytest.raises(
            UsageError, match=r"^data.path=.*a.array_record cannot be read: [^\n]*$"
        ):
            open_source("array_record", path=str(tmp_path))


def test_array_records_with_nothing_to_train_on(tmp_path):
    with pytest.raises(UsageError, match=r"there are no ArrayRecord files.*\*.array_record\*"):
        open_source("array_record", path=str(tmp_path))
    write_records(tmp_path / "a.array_record", [])
    with pytest.raises(UsageError, match="its 1 ArrayRecord files are empty"):
        open_source("array_record", path=str(tmp_path))
    write_records(tmp_path / "a.array_record", [make_example(picture=b"i", label=0)])
    with pytest.raises(UsageError, match="need the features .* have 'label', 'picture'"):
        open_source("array_record", path=str(tmp_path))
    write_records(tmp_path / "a.array_record", [b"no proto"])
    with pytest.raises(UsageError, match="have no tf.train.Example"):
        open_source("array_record", path=str(tmp_path))


def encoded(value):
    out = io.BytesIO()
    Image.new("RGB", (12, 8), (value, 0, 0)).save(out, "PNG")
    return out.getvalue() + b"\0\0"  # as some files end; they must not be lost


def prepare_dataset(data_dir, name, features, examples, file_format="array_record", keys=None):
    """Prepares a dataset without TensorFlow; its splits are "train" and "test"."""
    import tensorflow_datasets as tfds

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            described = tfds.features.FeaturesDict(features)
            return tfds.core.DatasetInfo(builder=self, features=described, supervised_keys=keys)

        def _split_generators(self, dl_manager):
            return {"train": enumerate(examples[2:]), "test": enumerate(examples[:2])}

        def _generate_examples(self):
            raise AssertionError

    Builder.name = name
    Builder.__module__ = "dataset"  # of a package it would look for files beside it
    tfds.disable_progress_bar()
    Builder(data_dir=data_dir, file_format=file_format).download_and_prepare()


def label_feature():
    import tensorflow_datasets as tfds

    return tfds.features.ClassLabel(names=["cat", "dog"])


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """A folder of TFDS's datasets: named, unnamed (without file_name), pixels, several, none."""
    import tensorflow_datasets as tfds

    data_dir = tmp_path_factory.mktemp("tfds")
    image = tfds.features.Image()
    features = {"image": image, "label": label_feature()}

    def examples(**more):  # anew for each dataset: writing reads the files to their ends
        return [{"image": io.BytesIO(encoded(i)), "label": i % 2} | more for i in range(10)]

    named = [e | {"file_name": f"{i}.png"} for i, e in enumerate(examples())]
    prepare_dataset(data_dir, "named", features | {"file_name": tfds.features.Text()}, named)
    prepare_dataset(data_dir, "unnamed", features, examples())
    prepare_dataset(data_dir, "parquet", features, examples(), "parquet")
    prepare_dataset(data_dir, "unlabelled", features, examples(label=-1))
    tensor = tfds.features.Tensor(shape=(4, 4, 3), dtype=np.uint8)
    pixels = [{"pixels": np.full((4, 4, 3), i, np.uint8), "label": 1} for i in range(3)]
    prepare_dataset(data_dir, "pixels", {"pixels": tensor, "label": label_feature()}, pixels)
    more = features | {"mask": image, "coarse": label_feature()}
    for name, keys in (("several", ("image", "label")), ("unclear", None)):
        several = [e | {"mask": io.BytesIO(encoded(9)), "coarse": 0} for e in examples()]
        prepare_dataset(data_dir, name, more, several, keys=keys)
    prepare_dataset(data_dir, "numbers", {"label": label_feature()}, [{"label": 0}] * 3)
    return data_dir


def test_tfds(datasets):
    source = open_source("tfds", path=str(datasets), name="named")
    assert source.kind == "pictures"
    assert source.class_names == ["cat", "dog"]
    assert len(source) == 8
    names = [source.example_id(i) for i in range(8)]
    assert sorted(names) == [f"{i}.png" for i in range(2, 10)]
    for name, example in zip(names, source, strict=True):
        value = int(name.removesuffix(".png"))
        assert example == {"image": encoded(value), "label": value % 2}
    copy = pickle.loads(pickle.dumps(source))
    assert repr(copy) == repr(source)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(copy.__getitem__, range(8))) == list(source)


def test_tfds_splits_versions_and_folders(datasets):
    part = open_source("tfds", path=str(datasets), name="unnamed:1.0.0", split="train[25%:]+test")
    assert len(part) == 8
    assert part.example_id(3) == "train[25%:]+test/3"
    assert [e["image"].startswith(b"\x89PNG") for e in part] == [True] * 8
    version = open_source("tfds", path=str(datasets / "unnamed" / "1.0.0"), split="test")
    assert len(version) == 2


def test_tfds_of_other_forms(datasets):
    parquet = open_source("tfds", path=str(datasets), name="parquet")
    assert [e["image"].startswith(b"\x89PNG") for e in parquet] == [True] * 8
    with pytest.raises(UsageError, match="cannot be read: parquet files are"):
        open_source("tfds", path=str(datasets), name="parquet", split="train[:3]")
    pixels = open_source("tfds", path=str(datasets), name="pixels")[0]
    assert pixels["image"].shape == (4, 4, 3)
    assert pixels["image"].dtype == np.uint8
    several = open_source("tfds", path=str(datasets), name="several")
    assert {e["label"] for e in several} == {0, 1}
    assert several[0]["image"].startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "unclear"}, "need one image, but have image, mask: the features are"),
        ({"name": "numbers"}, "need one image, but have none: the features are label"),
        ({"name": "unlabelled"}, "^data.split='train' of .* has no labels"),
        ({"name": "named", "split": "val"}, "^data.split='val' is not a split .*use one of .*test"),
        ({"name": "named", "split": "train[:"}, "^data.split='train.:' is not a split"),
        ({"name": "named", "split": "train[:0]"}, "has no examples.: use one of "),
        ({"name": "named:2.0.0"}, r"is not prepared in .* \(has 1.0.0\): .*tfds build "),
        ({"name": "cifar10"}, "^data.name='cifar10' is not prepared .*--file_format=array_record"),
        ({"name": "no name!"}, "^data.name='no name!' is not prepared"),
        ({}, "^data.name=None is not prepared .*the folder of dataset_info.json"),
    ],
)
def test_tfds_that_cannot_be_read(datasets, monkeypatch, fields, message):
    monkeypatch.setattr(socket, "socket", None)  # no network is tried
    with pytest.raises(UsageError, match=message) as caught:
        open_source("tfds", path=str(datasets), **fields)
    assert "\n" not in str(caught.value)


def test_tfds_with_nothing_set(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="^data.name is not set"):
        open_source("tfds")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "mine"))
    with pytest.raises(UsageError, match=f"is not prepared in {tmp_path}/mine "):
        open_source("tfds", name="cifar10")


def test_tfds_of_numbers_as_pictures(tmp_path):
    import tensorflow_datasets as tfds

    features = {"image": tfds.features.Image(shape=(8, 12, 1)), "label": label_feature()}
    examples = [{"image": io.BytesIO(encoded(0)), "label": 0} for _ in range(3)]
    prepare_dataset(tmp_path, "grey", features, examples)
    assert len(open_source("tfds", path=str(tmp_path), name="grey")) == 1
    description = tmp_path / "grey" / "1.0.0" / "features.json"
    description.write_text(description.read_text().replace('"uint8"', '"float32"'))
    with pytest.raises(UsageError, match="need one image, but have none"):
        open_source("tfds", path=str(tmp_path), name="grey")


def test_tfds_in_a_form_that_needs_tensorflow(tmp_path):
    import tensorflow_datasets as tfds

    features = {"image": tfds.features.Image(), "label": label_feature()}
    examples = [{"image": io.BytesIO(encoded(0)), "label": 0} for _ in range(3)]
    prepare_dataset(tmp_path, "old", features, examples)
    info = tmp_path / "old" / "1.0.0" / "dataset_info.json"
    values = json.loads(info.read_text())
    values["fileFormat"] = "tfrecord"
    for split in values["splits"]:
        split["filepathTemplate"] = split["filepathTemplate"].replace("array_record", "tfrecord")
    info.write_text(json.dumps(values))
    for file in info.parent.glob("*array_record*"):
        file.rename(file.with_name(file.name.replace("array_record", "tfrecord")))
    with pytest.raises(UsageError, match="cannot be read: tfrecord .*file_format=array_record"):
        open_source("tfds", path=str(tmp_path), name="old")


def test_tfds_with_files_missing_or_damaged(tmp_path):
    import tensorflow_datasets as tfds

    features = {"image": tfds.features.Image(), "label": label_feature()}
    noise = [os.urandom(5000) for _ in range(6)]  # not compressed, so that it can be found
    examples = [{"image": io.BytesIO(encoded(i) + noise[i]), "label": 0} for i in range(6)]
    prepare_dataset(tmp_path, "named", features, examples)
    (file,) = (tmp_path / "named" / "1.0.0").glob("*train.array_record*")
    content = file.read_bytes()
    file.unlink()
    with pytest.raises(UsageError, match=r"^data.split='train': .* is missing"):
        open_source("tfds", path=str(tmp_path), name="named")
    (other,) = file.parent.glob("*test.array_record*")
    file.write_bytes(other.read_bytes())
    with pytest.raises(UsageError, match=r"^data.split='train': .* has 2 records instead of 4"):
        open_source("tfds", path=str(tmp_path), name="named")
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(UsageError, match=r"^data.split='train': .* cannot be read: [^\n]*$"):
        open_source("tfds", path=str(tmp_path), name="named")
    damaged = bytearray(content)
    damaged[damaged.index(noise[3][1000:1100])] ^= 1
    file.write_bytes(damaged)
    source = open_source("tfds", path=str(tmp_path), name="named")
    reasons = []
    for index in range(4):
        try:
            source[index]
        except BadExample as error:
            reasons.append(str(error))
    assert len(reasons) == 1
    assert reasons[0].startswith("its record is damaged: ")


@pytest.mark.parametrize("name", ["tfds", "array_record"])
def test_tfds_not_installed(monkeypatch, name):
    monkeypatch.setitem(sys.modules, "dico_jax.data.records", None)
    with pytest.raises(UsageError, match=f"^data.source='{name}' needs tensorflow-datasets"):
        open_source(name)


def test_digits():
    source = open_source("digits")
    assert len(source) == 1797
    example = source[0]
    assert example["image"].dtype == np.uint8
    assert example["image"].shape == (8, 8, 1)
    assert max(source[i]["image"].max() for i in range(9)) == 255
    assert example["label"] == 0
    assert (source.kind, source.skipped, source.example_id(5)) == ("pictures", {}, "5")
    assert source.class_names == list("0123456789")
    assert pickle.loads(pickle.dumps(source))[9]["label"] == source[9]["label"]


def write_arrays(folder, examples, labels):
    np.save(folder / "examples.npy", examples)
    np.save(folder / "labels.npy", labels)
    return str(folder)


def test_arrays(tmp_path):
    latents = np.random.default_rng(0).normal(size=(6, 2, 4, 4, 4)).astype(np.float16)
    path = write_arrays(tmp_path, latents, np.array([0, 1, 2, 0, 1, 2]))
    source = open_source("arrays", path=path)
    assert source.kind == "latents"
    assert len(source) == 6
    assert source.image_shape == (4, 4, 4)
    assert source.class_names == ["0", "1", "2"]
    assert source.skipped == {}
    assert source.example_id(4) == "4"
    np.testing.assert_array_equal(source[4]["image"], latents[4])
    data = pickle.dumps(source)
    assert len(data) < 1000
    np.testing.assert_array_equal(pickle.loads(data)[4]["image"], latents[4])
    assert len(open_source("arrays", path=write_arrays(tmp_path, latents[:, 0], [0] * 6))) == 6
    pixels = np.zeros((3, 8, 8, 3), np.uint8)
    assert open_source("arrays", path=write_arrays(tmp_path, pixels, [0] * 3)).kind == "pictures"


@pytest.mark.parametrize(
    ("examples", "labels", "message"),
    [
        (
            np.zeros((4, 4, 4)),
            np.zeros(4, int),
            r"examples.npy is float64 \(4, 4, 4\), but must be",
        ),
        (np.zeros((4, 3, 8, 8, 4)), np.zeros(4, int), r"\(4, 3, 8, 8, 4\), but must be"),
        (np.zeros((4, 8, 8, 4)), np.zeros(3, int), r"labels.npy is int64 \(3,\), but must be"),
        (np.zeros((4, 8, 8, 4)), np.zeros(4), r"labels.npy is float64"),
        (np.zeros((4, 8, 8, 4)), np.array([0, 1, -1, 0]), r"labels.npy has -1: count from 0"),
        (np.zeros((0, 8, 8, 4)), np.zeros(0, int), "at least one"),
        (
            np.zeros((4, 8, 8, 4), np.uint8),
            np.zeros(4, int),
            r"uint8 .*must be uint8 \(N, H, W, 1 or 3\)",
        ),
        (np.zeros((4, 2, 8, 8, 3), np.uint8), np.zeros(4, int), r"is uint8 .*must be uint8 \(N"),
        (
            np.zeros((4, 8, 8, 3), np.int32),
            np.zeros(4, int),
            "is int32 .*, but must be uint8",
        ),
    ],
)
def test_wrong_arrays(tmp_path, examples, labels, message):
    with pytest.raises(UsageError, match=message):
        open_source("arrays", path=write_arrays(tmp_path, examples, labels))


def test_no_arrays(tmp_path):
    with pytest.raises(UsageError, match="^data.path=.*: FileNotFoundError: .*examples.npy"):
        open_source("arrays", path=str(tmp_path))
    (tmp_path / "examples.npy").write_bytes(b"no array")
    with pytest.raises(UsageError, match=r"examples.npy .*is no NumPy array: [^\n]*$"):
        open_source("arrays", path=str(tmp_path))


def test_unknown_sources():
    with pytest.raises(UsageError, match="data.source='digit' is unknown: use one of latents, fol"):
        open_source("digit")
    known = "latents folder zip captions tar tfds array_record arrays digits worded_digits"
    assert list(SOURCES) == known.split()


def test_workers_stay_light(tmp_path):
    """Reading pictures imports neither JAX nor TFDS, and pickles open in another process."""
    trees = [write_folder(tmp_path / "x", TREE), write_zip(tmp_path / "y.zip", TREE)]
    files = []
    for number, source in enumerate(trees):
        files.append(str(tmp_path / str(number)))
        (tmp_path / str(number)).write_bytes(pickle.dumps(source))
    code = (
        "import pickle, sys\n"
        "for file in sys.argv[1:]:\n"
        "    source = pickle.load(open(file, 'rb'))\n"
        "    print(*(e['label'] for e in source))\n"
        "import dico_jax.data.sources\n"
        "print(*{'jax', 'tensorflow_datasets', 'grain', 'sklearn'} & set(sys.modules))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *files], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["0 1 1 2 2", "0 1 1 2 2", ""]


def picture_bytes(value):
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 0, 0)).save(stream, "png")
    return stream.getvalue()


def edm_files(labels):
    """Files as EDM's and StyleGAN's dataset_tool.py writes them, in numbered folders."""
    files = {f"{i // 4:05d}/img{i:08d}.png": picture_bytes(i) for i in range(len(labels))}
    pairs = [[name, label] for name, label in zip(files, labels, strict=True)]
    return files | {"dataset.json": json.dumps({"labels": pairs}).encode()}


def write_files(path, files):
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return open_source("zip", path=str(path))
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return open_source("folder", path=str(path))


@pytest.mark.parametrize("name", ["edm", "edm.zip"])
def test_labels_of_a_dataset_json_are_read(tmp_path, name):
    labels = [3, 0, 1, 3, 0, 1, 1]
    source = write_files(tmp_path / name, edm_files(labels))
    assert source.class_names == ["0", "1", "2", "3"]
    assert len(source) == len(labels)
    for i in range(len(source)):
        number = int(source.example_id(i)[-12:-4])
        assert source[i]["label"] == labels[number]
        assert source[i]["image"] == picture_bytes(number)
    assert not source.skipped


@pytest.mark.parametrize(
    "labels",
    [[0, 1, -1], [1, 2, 3], [0, 2**32, 1], [0, 1, 0.5], [[1, 0], [0, 1]], [True], [None], []],
)
def test_other_labels_of_a_dataset_json_are_refused(tmp_path, labels):
    with pytest.raises(UsageError, match=r"its dataset.json does not give all pictures whole num"):
        write_files(tmp_path / "edm", edm_files(labels))


def test_a_damaged_dataset_json_is_refused(tmp_path):
    for i, content in enumerate([b"{", b"[1]", b'{"labels": [["a", 1]]}', b"[" * 100_000]):
        with pytest.raises(UsageError, match=r"its dataset.json does not give"):
            write_files(tmp_path / f"{i}.zip", edm_files([0, 1]) | {"dataset.json": content})


def test_a_dataset_json_without_labels_is_one_class(tmp_path):
    files = edm_files([0] * 6) | {"dataset.json": b'{"labels": null}'}
    source = write_files(tmp_path / "edm.zip", files)
    assert (source.class_names, len(source)) == (["0"], 6)


def test_classes_that_are_numbers_lie_in_their_order(tmp_path):
    files = {f"{number}/a.png": picture_bytes(number) for number in (10, 2, 1, 0, 11)}
    assert write_files(tmp_path / "x.zip", files).class_names == ["0", "1", "2", "10", "11"]
    assert write_files(tmp_path / "x", files).class_names == ["0", "1", "2", "10", "11"]
    files["cat/a.png"] = picture_bytes(3)
    assert write_files(tmp_path / "y", files).class_names == ["0", "1", "10", "11", "2", "cat"]


def test_a_zip_of_windows_has_backslashes(tmp_path):
    file = tmp_path / "x.zip"
    with zipfile.ZipFile(file, "w") as archive:
        for name in ("cat\\1.png", "dog\\2.png"):
            archive.writestr(name, picture_bytes(len(name)))
    source = open_source("zip", path=str(file))
    assert source.class_names == ["cat", "dog"]
    assert source[1] == {"image": picture_bytes(9), "label": 1}


def test_a_number_in_labels_allocates_nothing(tmp_path):
    np.save(tmp_path / "examples.npy", np.zeros((3, 8, 8, 3), np.uint8))
    for labels, said in (
        (np.array([0, 1, -1]).astype(np.uint32), "labels.npy has 4294967295: count from 0"),
        (np.array([1, 2, 3]), "labels.npy has 1: count from 0"),
    ):
        np.save(tmp_path / "labels.npy", labels)
        with pytest.raises(UsageError, match=said):
            open_source("arrays", path=str(tmp_path))


@pytest.mark.parametrize(
    ("labels", "said"), [([1, 2, 3], "are 1 to 3: count from 0"), ([0, 2**40], "are 0 to 1099")]
)
def test_labels_of_records_are_checked(tmp_path, labels, said):
    examples = [make_example(image=b"i", label=label) for label in labels]
    write_records(tmp_path / "a.array_record", examples)
    with pytest.raises(UsageError, match=said):
        open_source("array_record", path=str(tmp_path))


def test_links_that_lead_in_circles_end(tmp_path):
    write_folder(tmp_path / "x", {"cat/1.png": b"1", "dog/2.png": b"2"})
    for name in ("cat", "dog"):
        (tmp_path / "x" / name / "loop").symlink_to(tmp_path / "x")
    with pytest.raises(UsageError, match="lie deeper than CLASS/FILE .cat/loop/"):
        open_source("folder", path=str(tmp_path / "x"))


def test_names_of_classes_are_of_bounded_length(tmp_path):
    with pytest.raises(UsageError, match="names of up to 255 characters"):
        write_files(tmp_path / "x.zip", {"a" * 60_000 + "/1.png": picture_bytes(1)})


@pytest.mark.parametrize("at", range(6, 90, 7))
def test_a_flipped_bit_in_the_head_of_an_array_is_no_allocation(tmp_path, at):
    np.save(tmp_path / "examples.npy", np.zeros((3, 8, 8, 3), np.uint8))
    np.save(tmp_path / "labels.npy", np.arange(3))
    data = (tmp_path / "examples.npy").read_bytes()
    for bit in range(8):
        changed = bytearray(data)
        changed[at] ^= 1 << bit
        (tmp_path / "examples.npy").write_bytes(changed)
        start = time.monotonic()
        with contextlib.suppress(UsageError):
            open_source("arrays", path=str(tmp_path))
        assert time.monotonic() - start < 5
