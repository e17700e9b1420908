"""The fields of a config: the one list of them is configs/default.py."""

import difflib
import json
from collections.abc import Mapping
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
        raise unknown_field(field)


def unknown_field(field: str) -> UsageError:
    """The error for a field, such as "data.batchsize", that there is not."""
    close = difflib.get_close_matches(field, flatten(DEFAULTS), n=1)
    hint = f"did you mean config.{close[0]}?" if close else "configs/default.py lists the fields"
    return UsageError(f"config.{field}: no such field; {hint}")


def check_at_least(config: ConfigDict, field: str, low: int) -> None:
    """Raises UsageError for a field, such as "training.num_steps", that is below `low`."""
    section, name = field.rsplit(".", 1)
    if (value := config[section][name]) < low:
        raise UsageError(field, value, f"must be at least {low}")


def config_errors(section: str = ""):
    """Completes the name of the field that an error starts with: "config." and the section."""
    return within(f"config.{section}")


def without_gone(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of an older run, flat, without the fields that are `GONE`."""
    return {k: v for k, v in flatten(config).items() if k not in GONE}


def with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of an older checkpoint with the fields of now; older runs did as defaults say."""
    from flax.traverse_util import unflatten_dict

    return unflatten_dict(flatten(DEFAULTS) | without_gone(config), sep=".")


def config_to_dict(config: ConfigDict) -> dict[str, Any]:
    """The config as plain JSON values (tuples become lists)."""
    return json.loads(config.to_json_best_effort())
