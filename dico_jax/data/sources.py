"""Sources of training examples by name; docs/data.md describes each for its users."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from dico_jax.data.arrays import ArraySource
from dico_jax.data.digits import DigitsSource
from dico_jax.data.folders import FolderSource
from dico_jax.data.zips import ZipSource
from dico_jax.errors import UsageError


class Source(Protocol):
    """An indexed sequence of examples.

    Sources pickle in little space, because worker processes get them, and may be read by several
    threads at once. Their repr tells what they read and is the same in every process.

    Attributes:
      kind: what the images are: "pictures", "latents" (float, scaled) or "moments" (of the
        autoencoder's posterior). The latter two also have `image_shape`, the (H, W, C) of one
        orientation.
      class_names: one name per class, in the order of the labels.
      skipped: id to reason, of what was found among the examples when listing them but is none,
        such as files of another kind.
    """

    kind: str
    class_names: list[str]
    skipped: dict[str, str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """{"image", "label"}: the label is an int, the position in `class_names`.

        Pictures are bytes of a picture file or uint8 (H, W, 1 or 3). Latents and moments are
        floats (H, W, C) or, with the mirrored picture's, (2, H, W, C).

        Raises:
          BadExample: this one example cannot be read.
          OSError: the disk or the network fails.
        """
        ...

    def example_id(self, index: int) -> str:
        """What names an example to the user, such as CLASS/FILE; its image is not decoded."""
        ...


# These import much, so they do it late.


def _latents(config) -> Source:
    from dico_jax.data.prepared_latents import PreparedLatents

    return PreparedLatents.from_config(config)


def _tfds(config) -> Source:
    with _needs_tfds(config.source):
        from dico_jax.data.tfds_source import TfdsSource
    return TfdsSource(config.name, config.path, config.split)


def _array_record(config) -> Source:
    with _needs_tfds(config.source):
        from dico_jax.data.array_records import ArrayRecordSource
    return ArrayRecordSource(config.path)


@contextlib.contextmanager
def _needs_tfds(name: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise UsageError(
            f"data.source={name!r} needs tensorflow-datasets and array_record ({error}): "
            "pip install tensorflow-datasets array_record"
        ) from error


SOURCES: dict[str, Callable[[Any], Source]] = {
    "latents": _latents,
    "folder": lambda config: FolderSource(config.path),
    "zip": lambda config: ZipSource(config.path),
    "tfds": _tfds,
    "array_record": _array_record,
    "arrays": lambda config: ArraySource(config.path),
    "digits": lambda config: DigitsSource(),
}


def create_source(config) -> Source:
    """The source of `config.data`.

    Raises:
      UsageError: an unknown name, or what the source itself refuses.
    """
    if config.source not in SOURCES:
        raise UsageError(
            f"data.source={config.source!r} is unknown: use one of {', '.join(SOURCES)}"
        )
    return SOURCES[config.source](config)
