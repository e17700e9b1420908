"""Pictures in ArrayRecord files and in datasets of TFDS, without TensorFlow."""

import concurrent.futures
import contextlib
import glob
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_data_source, array_record_module
from google.protobuf.message import DecodeError
from tensorflow_datasets.core import read_only_builder, registered
from tensorflow_datasets.proto import tf_example_pb2

from dico_jax.data.captions import clean
from dico_jax.data.paths import MAX_CLASSES, path_errors, required_path, wrong_path
from dico_jax.data.pictures import BadExample
from dico_jax.errors import UsageError, one_line, shown
from dico_jax.terminal import Bar

_FILES = ("*.array_record*", "*.arrayrecord*")

# What an example needs, and what names it: features of TFDS, and of the TFRecord files of old.
_NEEDED = ((("image", "image/encoded"), bytes), (("label", "image/class/label"), int))
_ID = (("file_name", "id", "image/filename"), bytes)
_OPENERS = 16  # files at once
_TRIED = 200  # records, to find a good one, and labels of no class


class _Records:
    """A source of records, whose features go along with the examples."""

    kind = "pictures"
    class_names: list[str]
    _image: str  # these are names of features
    _label: str | None
    _captions: str | None = None  # has them itself, or in its part "text"
    _id: str | None
    _records: Any
    _example: Callable[[int], dict[str, Any]]  # the features of a record
    _position: Callable[[int], str]  # the id of one without a name

    def __init__(self):
        self.skipped: dict[str, str] = {}

    def __len__(self):
        return len(self._records)

    def __getitem__(self, index) -> dict[str, Any]:
        example = self._example(range(len(self))[index])
        image, label = example.pop(self._image, None), example.pop(self._label or "", None)
        example.pop(self._id or "", None)
        if not isinstance(image, bytes | np.ndarray):
            raise BadExample(f"its feature {self._image} is not one picture")
        if self._captions is not None:
            if not (captions := _texts_in(example.pop(self._captions, None))):
                raise BadExample("it has no caption")
            return example | {"image": image, "captions": captions}
        count = len(self.class_names)
        if not isinstance(label, int | np.integer) or not 0 <= label < count:
            if label == count:  # not one bad example: all others may have another class's name
                raise UsageError(f"{self!r} has a label {count}: count from 0, or name all classes")
            raise BadExample(f"its label is {shown(str(label))}, but there are {count} classes")
        return example | {"image": image, "label": int(label)}

    def example_id(self, index) -> str:
        """The name that an example has, else its file or split and its position there."""
        index = range(len(self))[index]
        name = None
        with contextlib.suppress(BadExample):
            name = self._example(index).get(self._id) if self._id else None
        if isinstance(name, bytes):
            name = name.decode(errors="backslashreplace")
        return name if isinstance(name, str) else self._position(index)


class ArrayRecordSource(_Records):
    """The tf.train.Examples of ArrayRecord files in the order of the files' names.

    Further features are a value (int, float or bytes), or a list where there are several or none.
    """

    def __init__(self, path: str | None):
        """Opens a folder, a file, or a pattern of files.

        Without a classes.txt beside them all records are read once for the largest label.
        """
        super().__init__()
        what = "a folder or pattern of ArrayRecord files"
        self.path = path = required_path(path, what, local="ArrayRecord files")
        is_folder = os.path.isdir(path)
        patterns = [os.path.join(glob.escape(path), p) for p in _FILES] if is_folder else [path]
        files = sorted({f for p in patterns for f in glob.glob(p) if os.path.isfile(f)})
        if not files:
            fix = f"give their folder ({' or '.join(_FILES)}) or a pattern"
            raise wrong_path(path, f"there are no ArrayRecord files: {fix}")
        folder = os.path.commonpath([os.path.dirname(file) or "." for file in files])
        self._names = [os.path.relpath(file, folder) for file in files]
        counts = _count_records(f"data.path={path}", files)
        self._ends = np.cumsum(counts)
        if not self._ends[-1]:
            raise wrong_path(path, f"its {len(files)} ArrayRecord files are empty")
        self._records = array_record_data_source.ArrayRecordDataSource(
            [f"{file}[0:{count}]" for file, count in zip(files, counts, strict=True) if count]
        )
        self._image, self._label, self._id = self._find_features()
        names = _read_class_names(path, os.path.join(folder, "classes.txt"))
        self.class_names = names or self._counted_classes()
        for index in np.linspace(0, len(self) - 1, min(len(self), _TRIED)).astype(int):
            with contextlib.suppress(BadExample, RuntimeError):
                self[index]

    def _find_features(self) -> tuple[str, str, str | None]:
        """The names of the features of image, label and id, of the first good record of a few."""
        found = "no tf.train.Example"
        for index in range(min(len(self), _TRIED)):
            with contextlib.suppress(BadExample, RuntimeError):
                features = self._example(index)
                image, label, name = (
                    next((name for name in names if isinstance(features.get(name), kind)), None)
                    for names, kind in (*_NEEDED, _ID)
                )
                if image is not None and label is not None:
                    return image, label, name
                found = ", ".join(map(repr, sorted(features))) or "none"
        wanted = " and ".join(f"{' or '.join(names)} ({kind.__name__})" for names, kind in _NEEDED)
        raise wrong_path(self.path, f"records need the features {wanted}, but have {found}")

    def _counted_classes(self) -> list[str]:
        labels = []
        for index in Bar(range(len(self)), "labels", delay=2):
            with contextlib.suppress(BadExample):  # found again when it is to be trained on
                labels.append(self._example(index).get(self._label))
        labels = [label for label in labels if isinstance(label, int) and label >= 0] or [0]
        if min(labels) == 1 or max(labels) >= MAX_CLASSES:
            what = f"its labels are {min(labels)} to {max(labels)}: count from 0 to at most"
            raise wrong_path(self.path, f"{what} {MAX_CLASSES - 1}, or name all in classes.txt")
        return [str(i) for i in range(max(labels) + 1)]

    def _example(self, index):
        with _record_errors():
            example = tf_example_pb2.Example.FromString(self._records[index])
            features = {}
            for name, feature in example.features.feature.items():
                values = getattr(feature, feature.WhichOneof("kind") or "bytes_list").value
                features[name] = values[0] if len(values) == 1 else list(values)
            return features

    def _position(self, index):
        file = int(np.searchsorted(self._ends, index, side="right"))
        return f"{self._names[file]}/{index - (self._ends[file - 1] if file else 0)}"

    def __repr__(self):
        return f"ArrayRecordSource({self.path!r})"


class TfdsSource(_Records):
    """The examples of a split that is on this disk; nothing is downloaded.

    Further features are as TFDS gives them, but for texts, which are strings, and pictures, which
    stay encoded. The feature file_name is the id. Without a label an example has "captions".
    """

    def __init__(self, name: str | None, path: str | None, split: str):
        """Opens a dataset such as "cifar10" or "imagenet2012:5.1.0" in a data_dir.

        Without a name `path` is one version's folder, without a path it is TFDS's own data_dir.
        """
        super().__init__()
        builder = _find_builder(name, path)
        features = builder.info.features
        self._folder, self._split = os.fspath(builder.data_dir), split
        encoded = [n for n, f in features.items() if isinstance(f, tfds.features.Image)]
        self._decoders = {n: tfds.decode.SkipDecoding() for n in encoded}
        # TFDS stores images of other dtypes as the bytes of their numbers.
        images = [n for n in encoded if features[n].np_dtype in (np.uint8, np.uint16)]
        tensors = [n for n, f in features.items() if type(f) is tfds.features.Tensor]
        pixels = [n for n in tensors if features[n].shape[2:] in ((1,), (3,))]
        pixels = [n for n in pixels if features[n].np_dtype == np.uint8]
        self._image = _pick_feature(builder, "image", images or pixels)
        classes = [n for n, f in features.items() if isinstance(f, tfds.features.ClassLabel)]
        classes = [n for n in classes if (features[n].num_classes or 0) <= MAX_CLASSES]
        told = [n for n in ("captions", "caption") if n in features]
        self._captions = None if classes else next(iter(told), None)
        self._label = None if self._captions else _pick_feature(builder, "label", classes)
        self._texts = [n for n, f in features.items() if isinstance(f, tfds.features.Text)]
        names = ["file_name", *(["image/filename"] if self._captions else [])]  # that of COCO
        self._id = next((name for name in names if name in self._texts), None)
        self.class_names = list(features[self._label].names) if self._label else []
        count, kind = _check_split(builder, split), builder.info.file_format.value
        try:
            self._open(builder)
            can_be_read = len(self) == count  # Parquet is never cut
        except NotImplementedError:
            can_be_read = False
        if not can_be_read:
            what = f"of {self._folder} cannot be read: {kind} files are read as a whole or in order"
            fix = "prepare it with tfds build --file_format=array_record, or tfds convert_format"
            raise UsageError("data.split", split, f"{what}: {fix}")
        with contextlib.suppress(BadExample):
            if self._label and (self._example(0)[self._label] or 0) < 0:
                raise UsageError("data.split", split, f"of {self._folder} has no labels (but -1)")

    def _open(self, builder: tfds.core.DatasetBuilder) -> None:
        self._records = builder.as_data_source(self._split, decoders=self._decoders)

    def _example(self, index):
        with _record_errors():
            example = dict(self._records[index])
        for name in self._texts:
            if isinstance(example[name], bytes):
                example[name] = example[name].decode(errors="backslashreplace")
        return example

    def _position(self, index):
        return f"{self._split}/{index}"

    def __getstate__(self):
        return self.__dict__ | {"_records": None}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._open(tfds.builder_from_directory(self._folder))

    def __repr__(self):
        return f"TfdsSource({self._folder!r}, {self._split!r})"


def _texts_in(value: Any) -> list[str]:
    """The captions in a feature: a text, several, or the part "text" of what has more."""
    value = value.get("text") if isinstance(value, dict) else value
    texts = list(value) if isinstance(value, list | tuple | np.ndarray) else [value]
    return clean(
        t.decode(errors="replace") if isinstance(t, bytes) else str(t or "") for t in texts
    )


@contextlib.contextmanager
def _record_errors() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, DecodeError, ValueError, KeyError, AttributeError) as error:
        # ArrayRecord has one class for all errors; those of the disk say which function failed.
        if isinstance(error, RuntimeError) and not re.match("Corrupted|Invalid", str(error)):
            raise
        raise BadExample(f"its record is damaged: {one_line(error)}") from error


def _count_records(field: str, files: list[str]) -> list[int]:
    """The number of records in each file, whose two ends are checked with it."""

    def count(file: str) -> int:
        try:
            with contextlib.closing(array_record_module.ArrayRecordReader(file)) as reader:
                return reader.num_records()
        except (RuntimeError, ValueError) as error:
            raise UsageError(f"{field}: {file} cannot be read: {one_line(error)}") from error

    with concurrent.futures.ThreadPoolExecutor(_OPENERS) as pool:
        return list(pool.map(count, files))


def _read_class_names(path: str, file: str) -> list[str]:
    if not os.path.exists(file):
        return []
    with path_errors(path), open(file, encoding="utf-8") as stream:
        names = [line.strip() for line in stream.read().strip().split("\n")]
    if not all(names):
        raise wrong_path(path, f"{file} has empty lines: write one class name per line")
    return names


def _find_builder(name: str | None, path: str | None) -> tfds.core.DatasetBuilder:
    if name is None and path is None:
        fix = "give a dataset such as 'cifar10', or a prepared version's folder as config.data.path"
        raise UsageError(f"data.name is not set: {fix}")
    default = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    folder = required_path(path or default, "", local="datasets of TFDS")
    try:
        if name is None:
            return tfds.builder_from_directory(folder)
        # This looks at the disk alone; tfds.builder asks Google's buckets for what is not there.
        return read_only_builder.builder_from_files(name, data_dir=folder)
    except (registered.DatasetNotFoundError, ValueError, OSError) as error:
        plain = str(name).partition(":")[0]
        versions = ", ".join(sorted(glob.glob("*", root_dir=os.path.join(folder, plain))))
        found = f"has {versions}" if versions else one_line(error)
        fix = "or prepare it with tfds build NAME --file_format=array_record --data_dir=DATA_DIR"
        fix = f"give its data_dir or the folder of dataset_info.json as config.data.path, {fix}"
        what = f"is not prepared in {folder} ({found}): {fix}"
        raise UsageError("data.name", name, what) from error


def _pick_feature(builder: tfds.core.DatasetBuilder, what: str, names: list[str]) -> str:
    """The one of `names`, or of several the one that the dataset declares as its input or label."""
    if len(names) > 1:
        names = [name for name in names if name in (builder.info.supervised_keys or ())] or names
    if len(names) != 1:
        have = ", ".join(sorted(names)) or "none"
        features = ", ".join(sorted(builder.info.features))
        fix = f"examples need one {what}, but have {have}: the features are {features}"
        raise UsageError("data.source", "tfds", f"in {builder.data_dir}: {fix}")
    return names[0]


def _check_split(builder: tfds.core.DatasetBuilder, split: str) -> int:
    """The number of examples of a split, once its files are found to have them."""
    try:
        found = builder.info.splits[split]
        count, files = found.num_examples, found.filepaths
        if not count:
            raise ValueError("it has no examples")
    except (ValueError, KeyError, AssertionError) as error:
        what = f"is not a split of {builder.data_dir} ({one_line(error)})"
        fix = f"use one of {', '.join(builder.info.splits)}, or a part such as 'train[:90%]'"
        raise UsageError("data.split", split, f"{what}: {fix}") from error
    for file in files:
        if not os.path.exists(file):
            raise UsageError("data.split", split, f": {file} is missing: copy the dataset again")
    if builder.info.file_format.value == "array_record":
        shards = found.file_instructions
        counts = _count_records(f"data.split={split!r}", [shard.filename for shard in shards])
        for shard, has in zip(shards, counts, strict=True):
            if has != shard.examples_in_shard:
                what = f"{shard.filename} has {has} records instead of {shard.examples_in_shard}"
                raise UsageError("data.split", split, f": {what}: copy the dataset again")
    return count
