"""The folder of a run, and the rule that it belongs to one config."""

import json
import os
import pathlib
from typing import Any

from ml_collections import ConfigDict

from dico_jax.build import flatten
from dico_jax.errors import UsageError

# Fields that may change between two runs in one workdir: they decide how long a run goes on and
# what it reports, not what it computes.
MUTABLE_FIELDS = (
    "data.source",
    "data.name",
    "data.split",
    "data.path",
    "data.max_bad_fraction",
    "data.num_workers",
    "data.verify_checksums",
    "data.cache_dir",
    "autoencoder.path",
    "autoencoder.tile_size",
    "training.num_steps",
    "training.log_every_steps",
    "training.checkpoint_every_steps",
    "training.keep_checkpoints",
    "sampling.",
    "eval.",
)


def config_to_dict(config: ConfigDict) -> dict[str, Any]:
    """The config as plain JSON values (tuples become lists)."""
    return json.loads(config.to_json_best_effort())


def open_workdir(workdir: str, config: ConfigDict) -> pathlib.Path:
    """Makes the folder of a run and writes config.json; a folder of the same run is used again.

    Raises:
      UsageError: the path is a file or not writable, holds something else, or holds a run whose
        config differs in a field that may not change. Nothing in it is touched then.
    """
    path, plain = pathlib.Path(workdir), config_to_dict(config)
    file = path / "config.json"
    if path.exists() and not path.is_dir():
        raise UsageError(f"--workdir={workdir} is a file: give a folder")
    if file.exists():
        _check_same_run(workdir, _read(file), plain)
    elif path.is_dir() and (path / "checkpoints").exists():
        raise UsageError(
            f"--workdir={workdir} has checkpoints but no config.json: give another folder"
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(".json.tmp")
        temporary.write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n")
        os.replace(temporary, file)
    except OSError as error:
        raise UsageError(f"--workdir={workdir} cannot be written: {error}") from error
    return path


def _read(file: pathlib.Path) -> dict:
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise UsageError(
            f"{file} is not JSON ({error}): give another --workdir, or restore the file"
        ) from error


def _check_same_run(workdir: str, old: dict, new: dict) -> None:
    old, new = flatten(old), flatten(new)
    differing = [
        f"config.{key} was {json.dumps(old.get(key))}, is {json.dumps(new.get(key))}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not key.startswith(MUTABLE_FIELDS)
    ]
    if differing:
        raise UsageError(
            f"--workdir={workdir} belongs to a run of another config ({'; '.join(differing)}): "
            "use these values again, or another --workdir"
        )
