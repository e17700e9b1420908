"""Files with results: named once, written whole, never over another."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from dico_jax.errors import UsageError


def result_path(out: str, suffix: str) -> pathlib.Path:
    """The path of a file that can be written.

    Raises:
      UsageError: it is there already, has another suffix, or its folder is not there.
    """
    path = pathlib.Path(out)
    if path.suffix != suffix:
        raise UsageError(f"--out={out}: name a {suffix} file")
    if path.exists():
        raise UsageError(f"--out={out} exists: give another name")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"--out={out}: there is no folder {path.absolute().parent}")
    return path


def write_json(file: pathlib.Path, result: Mapping[str, Any]) -> None:
    """Writes a result; the file appears when it is complete."""
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(json.dumps(result, indent=2) + "\n")
    temporary.replace(file)
