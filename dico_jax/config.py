"""The fields of a config: the one list of them is configs/default.py."""

import contextlib
import difflib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from dico_jax.configs import default
from dico_jax.errors import UsageError, within

# Fields that older runs wrote and that decide nothing any more: left out where they are read.
GONE = frozenset({"model.depthwise"})
DEFAULTS: dict[str, Any] = default.get_config().to_dict()


def flatten(tree: Mapping) -> dict[str, Any]:
    """Nested dicts as one, with keys such as "model.name"."""
    from flax.traverse_util import flatten_dict  # late: commands answer --help before JAX is there

    return flatten_dict(tree, sep=".")


def check_fields(config: ConfigDict) -> None:
    """Raises UsageError unless the config has exactly the fields of configs/default.py."""
    fields, known = flatten(config.to_dict()).keys(), flatten(DEFAULTS).keys()
    for field in sorted(known - fields):
        raise UsageError(f"config.{field} is missing: start from configs/default.py")
    for field in sorted(fields - known):
        close = difflib.get_close_matches(field, known, n=1)
        hint = (
            f"did you mean config.{close[0]}?" if close else "configs/default.py lists the fields"
        )
        raise UsageError(f"config.{field}: no such field; {hint}")


def check_at_least(config: ConfigDict, field: str, low: int) -> None:
    """Raises UsageError for a field, such as "training.num_steps", that is below `low`."""
    section, name = field.rsplit(".", 1)
    if (value := config[section][name]) < low:
        raise UsageError(field, value, f"must be at least {low}")


@contextlib.contextmanager
def config_errors(section: str = "") -> Iterator[None]:
    """Completes the name of the field that an error starts with: "config." and the section."""
    with within(f"config.{section}"):
        yield


def without_gone(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of an older run, without the fields that are `GONE`."""
    return _nested({k: v for k, v in flatten(config).items() if k not in GONE})


def with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of an older checkpoint with all fields of now, and without those that are `GONE`.

    Those it lacks have their defaults: what runs did before the field was there.
    """
    return _nested(flatten(DEFAULTS) | flatten(without_gone(config)))


def _nested(fields: Mapping[str, Any]) -> dict[str, Any]:
    from flax.traverse_util import unflatten_dict

    return unflatten_dict(fields, sep=".")


def config_to_dict(config: ConfigDict) -> dict[str, Any]:
    """The config as plain JSON values (tuples become lists)."""
    return json.loads(config.to_json_best_effort())
