"""Pictures in ArrayRecord files of tf.train.Examples."""

import concurrent.futures
import contextlib
import glob
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tqdm
from array_record.python import array_record_data_source, array_record_module
from google.protobuf.message import DecodeError
from tensorflow_datasets.proto import tf_example_pb2

from dico_jax.data.paths import path_errors, required_path, wrong_path
from dico_jax.data.pictures import BadExample, one_line
from dico_jax.errors import UsageError

_FILES = ("*.array_record*", "*.arrayrecord*")

# What an example needs, and what names it: features of TFDS, and of the TFRecord files of old.
_IMAGE = (("image", "image/encoded"), bytes)
_LABEL = (("label", "image/class/label"), int)
_ID = (("file_name", "id", "image/filename"), bytes)

_OPENERS = 16  # files at once
_TRIED = 10  # records, to find a good one


class ArrayRecordSource:
    """The records of ArrayRecord files in the order of the files' names.

    Examples have the records' further features, too: a value (int, float or bytes), or a list
    where there are several or none.

    Attributes:
      path: a folder, a file, or a pattern of files.
      class_names: the lines of classes.txt beside the files, else the numbers up to the largest
        label, for which all records are read once.
      skipped: empty.
    """

    kind = "pictures"

    def __init__(self, path: str | None):
        """Opens the files.

        Raises:
          UsageError: there are none, one is damaged, or the records have other features.
        """
        self.path = path = required_path(
            path, "a folder or pattern of ArrayRecord files", local="ArrayRecord files"
        )
        files = _find_files(path)
        self._folder = os.path.commonpath([os.path.dirname(file) or "." for file in files])
        self._names = [os.path.relpath(file, self._folder) for file in files]
        counts = count_records(f"data.path={path}", files)
        self._ends = np.cumsum(counts)
        if not self._ends[-1]:
            raise wrong_path(path, f"its {len(files)} ArrayRecord files are empty")
        self._records = array_record_data_source.ArrayRecordDataSource(
            [f"{file}[0:{count}]" for file, count in zip(files, counts, strict=True) if count]
        )
        self._image, self._label, self._id = self._find_features()
        self.skipped: dict[str, str] = {}
        names = _read_class_names(path, os.path.join(self._folder, "classes.txt"))
        self.class_names = names or [str(i) for i in range(self._largest_label() + 1)]

    def _find_features(self) -> tuple[str, str, str | None]:
        """The names of the features of image, label and id, of the first good record of a few."""
        reasons = []
        for index in range(min(len(self), _TRIED)):
            try:
                features = self._features(index)
            except (BadExample, RuntimeError) as error:
                reasons.append(f"the first record is no tf.train.Example: {error}")
                continue
            image, label = _find(features, *_IMAGE), _find(features, *_LABEL)
            if image is not None and label is not None:
                return image, label, _find(features, *_ID)
            reasons.append(
                "records need the features 'image' or 'image/encoded' (bytes) and 'label' or "
                "'image/class/label' (an int64), but the first has "
                f"{', '.join(map(repr, sorted(features))) or 'none'}"
            )
        raise wrong_path(self.path, reasons[0])

    def _largest_label(self) -> int:
        largest = 0
        for index in tqdm.tqdm(range(len(self)), desc="labels", dynamic_ncols=True, delay=2):
            with contextlib.suppress(BadExample):  # found again when it is to be trained on
                largest = max(largest, self._label_of(self._features(index)))
        return largest

    def _features(self, index: int) -> dict[str, Any]:
        """The features of a record, those of one value as this value."""
        with record_errors():
            example = tf_example_pb2.Example.FromString(self._records[index])
            features = {}
            for name, feature in example.features.feature.items():
                values = getattr(feature, feature.WhichOneof("kind") or "bytes_list").value
                features[name] = values[0] if len(values) == 1 else list(values)
            return features

    def _label_of(self, features: dict[str, Any]) -> int:
        label = features.get(self._label)
        if not isinstance(label, int) or label < 0:
            raise BadExample(f"its feature {self._label} is {label}, not one label from 0")
        return label

    def __len__(self):
        return int(self._ends[-1])

    def __getitem__(self, index) -> dict[str, Any]:
        features = self._features(range(len(self))[index])
        label, image = self._label_of(features), features.get(self._image)
        check_label(label, self.class_names)
        if not isinstance(image, bytes):
            raise BadExample(f"its feature {self._image} is not one encoded picture")
        used = (self._image, self._label, self._id)
        others = {name: value for name, value in features.items() if name not in used}
        return others | {"image": image, "label": label}

    def example_id(self, index) -> str:
        """The id in a record, else FILE/POSITION."""
        index = range(len(self))[index]
        if self._id is not None:
            with contextlib.suppress(BadExample):
                name = self._features(index).get(self._id)
                if isinstance(name, bytes):
                    return name.decode(errors="backslashreplace")
        file = int(np.searchsorted(self._ends, index, side="right"))
        return f"{self._names[file]}/{index - (self._ends[file - 1] if file else 0)}"

    def __repr__(self):
        return f"ArrayRecordSource({self.path!r})"


@contextlib.contextmanager
def record_errors() -> Iterator[None]:
    """Turns the errors of reading a damaged record into BadExample.

    ArrayRecord has one class for all errors; those of the disk say which function failed.
    """
    try:
        yield
    except RuntimeError as error:
        if not re.match("Corrupted|Invalid", str(error)):
            raise
        raise BadExample(f"its record is damaged: {one_line(error)}") from error
    except (DecodeError, ValueError, KeyError, AttributeError) as error:
        raise BadExample(f"its record cannot be parsed: {one_line(error)}") from error


def check_label(label: int, class_names: Sequence[str]) -> None:
    """Raises BadExample for a label that has no class."""
    if not 0 <= label < len(class_names):
        raise BadExample(f"its label is {label}, but there are {len(class_names)} classes")


def _find(features: dict[str, Any], names: tuple[str, ...], kind: type) -> str | None:
    """The first of `names` that is a feature of one value of this kind."""
    return next((name for name in names if isinstance(features.get(name), kind)), None)


def _find_files(path: str) -> list[str]:
    if os.path.isdir(path):
        patterns = [os.path.join(glob.escape(path), pattern) for pattern in _FILES]
    else:
        patterns = [path]
    files = sorted({f for p in patterns for f in glob.glob(p) if os.path.isfile(f)})
    if not files:
        raise wrong_path(
            path,
            f"there are no ArrayRecord files: give their folder ({' or '.join(_FILES)}) or a "
            "pattern",
        )
    return files


def count_records(field: str, files: list[str]) -> list[int]:
    """The number of records in each of some files, whose two ends are checked with it.

    Raises:
      UsageError: one is damaged; the message starts with `field`.
    """

    def count(file: str) -> int:
        try:
            with contextlib.closing(array_record_module.ArrayRecordReader(file)) as reader:
                return reader.num_records()
        except (RuntimeError, ValueError) as error:
            raise UsageError(f"{field}: {file} cannot be read: {one_line(error)}") from error

    with concurrent.futures.ThreadPoolExecutor(_OPENERS) as pool:
        return list(pool.map(count, files))


def _read_class_names(path: str, file: str) -> list[str]:
    """The lines of classes.txt, none if there is no such file."""
    if not os.path.exists(file):
        return []
    with path_errors(path), open(file, encoding="utf-8") as stream:
        names = [line.strip() for line in stream.read().strip().split("\n")]
    if not all(names):
        raise wrong_path(path, f"{file} has empty lines: write one class name per line")
    return names
