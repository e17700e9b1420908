"""Pictures of a dataset that TensorFlow Datasets has prepared, read without TensorFlow."""

import contextlib
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import read_only_builder, registered

from dico_jax.data.array_records import check_label, count_records, record_errors
from dico_jax.data.paths import required_path
from dico_jax.data.pictures import BadExample, one_line
from dico_jax.errors import UsageError

_MAX_REASON = 200


class TfdsSource:
    """The examples of a split. Ids are the feature file_name, or SPLIT/POSITION without one.

    Examples have the dataset's further features, too, as TFDS gives them, but for texts, which are
    strings, and pictures, which stay encoded.

    Attributes:
      class_names: of the label's feature.
      skipped: empty.
    """

    kind = "pictures"

    def __init__(self, name: str | None, path: str | None, split: str):
        """Opens a dataset on this disk; nothing is downloaded.

        Args:
          name: such as "cifar10" or "imagenet2012:5.1.0"; None if `path` is one version's folder.
          path: the data_dir; None for TFDS's own, ~/tensorflow_datasets.
          split: such as "train" or "train[:90%]".

        Raises:
          UsageError: it is not there or not prepared as ArrayRecord (or Parquet) files, has no such
            split, or has not one image and one label.
        """
        builder = _find_builder(name, path)
        self._folder, self._split = os.fspath(builder.data_dir), split
        features = builder.info.features
        images = _names(features, _is_picture) or _names(features, _is_pixels)
        labels = _names(features, lambda f: isinstance(f, tfds.features.ClassLabel))
        self._image = _pick_feature(builder, "image", images)
        self._label = _pick_feature(builder, "label", labels)
        self._texts = _names(features, lambda f: isinstance(f, tfds.features.Text))
        self._named = "file_name" in self._texts
        encoded = _names(features, lambda f: isinstance(f, tfds.features.Image))
        self._decoders = {key: tfds.decode.SkipDecoding() for key in encoded}
        self.class_names = list(features[self._label].names)
        self.skipped: dict[str, str] = {}
        self._open(builder)
        _check_files(builder, split)
        with contextlib.suppress(BadExample):
            if self._example(0)[self._label] < 0:
                raise UsageError(
                    f"data.split={split!r} of {self._folder} has no labels (they are -1)"
                )

    def _open(self, builder: tfds.core.DatasetBuilder) -> None:
        split = _find_split(builder, self._split)
        try:
            self._records = builder.as_data_source(self._split, decoders=self._decoders)
        except NotImplementedError as error:
            raise UsageError(
                f"{_place(builder)}: its files ({builder.info.file_format.value}) cannot be read "
                "in any order: prepare it with tfds build --file_format=array_record, or convert "
                "it with tfds convert_format"
            ) from error
        if len(self._records) != split.num_examples:  # Parquet is never cut
            raise UsageError(
                f"data.split={self._split!r}: {self._folder} gives {len(self._records)} examples "
                f"instead of {split.num_examples}, because Parquet files cannot be read in part: "
                "prepare it with tfds build --file_format=array_record"
            )

    def _example(self, index) -> dict[str, Any]:
        index = range(len(self))[index]
        with record_errors():
            example = dict(self._records[index])
        if example[self._image] is None or example[self._label] is None:
            raise BadExample(f"its record has no {self._image} or no {self._label}")
        for name in self._texts:
            if isinstance(example[name], bytes):
                example[name] = example[name].decode(errors="backslashreplace")
        return example

    def __len__(self):
        return len(self._records)

    def __getitem__(self, index) -> dict[str, Any]:
        example = self._example(index)
        image, label = example.pop(self._image), int(example.pop(self._label))
        check_label(label, self.class_names)
        if self._named:
            del example["file_name"]
        return example | {"image": image, "label": label}

    def example_id(self, index) -> str:
        """The file_name of an example, else SPLIT/POSITION."""
        if self._named:
            with contextlib.suppress(BadExample):
                return self._example(index)["file_name"]
        return f"{self._split}/{range(len(self))[index]}"

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "_records"}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._open(tfds.builder_from_directory(self._folder))

    def __repr__(self):
        return f"TfdsSource({self._folder!r}, {self._split!r})"


def _names(features: tfds.features.FeaturesDict, wanted: Callable[[Any], bool]) -> list[str]:
    return [name for name, feature in features.items() if wanted(feature)]


def _is_picture(feature: Any) -> bool:
    # TFDS stores images of other dtypes as the bytes of their numbers.
    return isinstance(feature, tfds.features.Image) and feature.np_dtype in (np.uint8, np.uint16)


def _is_pixels(feature: Any) -> bool:
    plain = type(feature) is tfds.features.Tensor and feature.np_dtype == np.uint8
    return plain and len(feature.shape) == 3 and feature.shape[2] in (1, 3)


def _find_builder(name: str | None, path: str | None) -> tfds.core.DatasetBuilder:
    if name is None and path is None:
        raise UsageError(
            "data.name is not set: give a dataset such as 'cifar10', or the folder of a prepared "
            "version as config.data.path"
        )
    default = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    folder = required_path(path or default, "", local="datasets of TFDS")
    field = f"data.path={path}" if name is None else f"data.name={name!r}"
    try:
        if name is None:
            return tfds.builder_from_directory(folder)
        # This looks at the disk alone; tfds.builder asks Google's buckets for what is not there.
        return read_only_builder.builder_from_files(name, data_dir=folder)
    except registered.DatasetNotFoundError as error:
        plain = str(name).partition(":")[0]
        there = os.path.join(folder, plain)
        versions = ", ".join(sorted(os.listdir(there))) if os.path.isdir(there) else ""
        raise UsageError(
            f"{field} is not prepared in {folder}{f' (but {versions})' if versions else ''}: give "
            f"its data_dir as config.data.path, or prepare it with tfds build {plain} "
            f"--file_format=array_record --data_dir={folder}"
        ) from error
    except (ValueError, OSError) as error:
        hint = ": give the folder that has dataset_info.json, or set config.data.name too"
        raise UsageError(
            f"{field} cannot be opened ({one_line(error)[:_MAX_REASON]}){'' if name else hint}"
        ) from error


def _pick_feature(builder: tfds.core.DatasetBuilder, what: str, names: list[str]) -> str:
    """The one of `names`, or of several the one that the dataset declares as its input or label."""
    if len(names) > 1:
        names = [name for name in names if name in (builder.info.supervised_keys or ())] or names
    if len(names) != 1:
        have = ", ".join(sorted(names)) or "none"
        raise UsageError(
            f"{_place(builder)}: examples need one {what}, but have {have}: the features are "
            f"{', '.join(sorted(builder.info.features))}"
        )
    return names[0]


def _find_split(builder: tfds.core.DatasetBuilder, split: str) -> Any:
    """What TFDS knows of a split, once it is found to have examples and files."""
    field = f"data.split={split!r}"
    names = ", ".join(builder.info.splits)
    try:
        found = builder.info.splits[split]
        count, files = found.num_examples, found.filepaths
    except (ValueError, KeyError, AssertionError) as error:
        raise UsageError(
            f"{field} is not a split of {builder.data_dir} ({one_line(error)[:_MAX_REASON]}): use "
            f"one of {names}, or a part such as 'train[:90%]'"
        ) from error
    if not count:
        raise UsageError(f"{field} of {builder.data_dir} has no examples: use one of {names}")
    for file in files:
        if not os.path.exists(file):
            raise UsageError(f"{field}: {file} is missing: copy the dataset again")
    return found


def _check_files(builder: tfds.core.DatasetBuilder, split: str) -> None:
    """Raises UsageError unless the files of a split have their records."""
    if builder.info.file_format.value != "array_record":
        return
    shards = builder.info.splits[split].file_instructions
    counts = count_records(f"data.split={split!r}", [shard.filename for shard in shards])
    for shard, count in zip(shards, counts, strict=True):
        if count != shard.examples_in_shard:
            raise UsageError(
                f"data.split={split!r}: {shard.filename} has {count} records instead of "
                f"{shard.examples_in_shard}: copy the dataset again"
            )


def _place(builder: tfds.core.DatasetBuilder) -> str:
    return f"data.source='tfds' in {builder.data_dir}"
