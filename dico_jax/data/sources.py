"""Sources of training examples by name; docs/data.md describes each for its users."""

import importlib
from collections.abc import Callable
from typing import Any, Protocol

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
        """{"image", "label", ...}: the label is an int, the position in `class_names`.

        Pictures are bytes of a picture file or uint8 (H, W, 1 or 3). Latents and moments are
        floats (H, W, C) or, with the mirrored picture's, (2, H, W, C). Further fields, such as
        "caption", are what the source has: text, numbers, bytes, arrays, or lists and dicts of
        these. A network's `read_condition` takes what it wants.

        Raises:
          BadExample: this one example cannot be read.
          OSError: the disk or the network fails.
        """
        ...

    def example_id(self, index: int) -> str:
        """What names an example to the user, such as CLASS/FILE; its image is not decoded."""
        ...


def _in_module(module: str, create: Callable[[Any, Any], Source]) -> Callable[[Any], Source]:
    """A row of `SOURCES`: what `create` makes of the module, imported when needed, and a config."""

    def open_source(config) -> Source:
        try:
            found = importlib.import_module(f"dico_jax.data.{module}")
        except ImportError as error:
            raise UsageError(
                f"data.source={config.source!r} needs tensorflow-datasets and array_record "
                f"({error}): pip install tensorflow-datasets array_record"
            ) from error
        return create(found, config)

    return open_source


SOURCES: dict[str, Callable[[Any], Source]] = {
    "latents": _in_module("latents", lambda m, c: m.PreparedLatents.from_config(c)),
    "folder": _in_module("class_files", lambda m, c: m.FolderSource(c.path)),
    "zip": _in_module("zips", lambda m, c: m.ZipSource(c.path)),
    "tfds": _in_module("tfds_source", lambda m, c: m.TfdsSource(c.name, c.path, c.split)),
    "array_record": _in_module("array_records", lambda m, c: m.ArrayRecordSource(c.path)),
    "arrays": _in_module("arrays", lambda m, c: m.ArraySource(c.path)),
    "digits": _in_module("arrays", lambda m, c: m.DigitsSource()),
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
