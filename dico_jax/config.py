"""The fields of a config and what they may be: the one list of them is configs/default.py."""

import difflib
import json
import math
import numbers
import os
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from dico_jax.configs import default
from dico_jax.errors import UsageError, shown

DEFAULTS: dict[str, Any] = default.get_config().to_dict()

MOST = 2**31 - 1  # of whole numbers, which JAX keeps in 32 bits
RANGE = {field: bounds for bounds, fields in default.RANGES.items() for field in fields.split()}
SCHEMES = {name: kinds.split() for kinds, all_ in default.PATHS.items() for name in all_.split()}
_LONGEST = 4096  # characters of a text, as of a path
_KINDS = {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}
_KINDS[tuple] = "a tuple, such as () or ('a', 'b')"

# By family, the sizes that names of models stand for: paper table 1 (DiCo-H: table 5), the DiT
# paper's table 1, FCDM's release. For those told a text the paper gives none: these are table 1's.
_DICO: dict[str, dict[str, Any]] = {
    "DiCo-S": {"hidden_size": 128, "depth": (5, 4, 4, 4, 4), "mlp_ratio": 2.0},
    "DiCo-B": {"hidden_size": 256, "depth": (5, 4, 4, 4, 4), "mlp_ratio": 2.0},
    "DiCo-L": {"hidden_size": 352, "depth": (9, 8, 9, 8, 9), "mlp_ratio": 2.0},
    "DiCo-XL": {"hidden_size": 416, "depth": (9, 9, 10, 9, 9), "mlp_ratio": 2.0},
    "DiCo-H": {"hidden_size": 416, "depth": (14, 12, 10, 12, 14), "mlp_ratio": 4.0},
}
_DIT = {
    "DiT-S": {"hidden_size": 384, "depth": 12, "num_heads": 6},
    "DiT-B": {"hidden_size": 768, "depth": 12, "num_heads": 12},
    "DiT-L": {"hidden_size": 1024, "depth": 24, "num_heads": 16},
    "DiT-XL": {"hidden_size": 1152, "depth": 28, "num_heads": 16},
}
SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "DiCo": _DICO,
    "DiT": {f"{name}/{p}": sizes | {"patch_size": p} for name, sizes in _DIT.items()
            for p in (2, 4, 8)},
    "TextDiCo": {f"Text{name}": sizes for name, sizes in _DICO.items()},
    "FCDM": {
        "FCDM-S": {"hidden_size": 128, "depth": (2, 4, 8, 4, 2)},
        "FCDM-B": {"hidden_size": 256, "depth": (2, 4, 8, 4, 2)},
        "FCDM-L": {"hidden_size": 512, "depth": (2, 4, 8, 4, 2)},
        "FCDM-XL": {"hidden_size": 512, "depth": (3, 6, 12, 6, 3)},
    },
}  # fmt: skip


def flatten(tree: Mapping) -> dict[str, Any]:
    """Nested dicts as one, with keys such as "model.name"."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= {f"{key}.{name}": part for name, part in flatten(value).items()}
        else:
            found[key] = value
    return found


def check_fields(config: ConfigDict) -> None:
    """Raises UsageError unless the config has the fields of default.py; expands its paths."""
    if not isinstance(config, ConfigDict):
        raise UsageError(f"--config: get_config() gives {type(config).__name__}, no ConfigDict")
    fields = flatten(config.to_dict())
    for field in sorted(flatten(DEFAULTS).keys() - fields.keys()):
        raise UsageError(f"config.{field} is missing: start from configs/default.py")
    for field in sorted(fields):
        check_name(field)
    check_values(config)
    keep, every = config.training.keep_every_steps, config.training.checkpoint_every_steps
    if keep % every:
        fix = f"must be a multiple of config.training.checkpoint_every_steps={every}"
        raise UsageError("config.training.keep_every_steps", keep, fix)
    for field, value in fields.items():
        if value and field in SCHEMES:
            section, name = field.split(".")
            config[section][name] = expanded(f"config.{field}", field, value)


def check_name(field: str) -> None:
    """Raises UsageError for a field, such as "data.batchsize", that there is not."""
    if field not in (known := flatten(DEFAULTS)):
        close = difflib.get_close_matches(field, known, n=1)
        hint = f"did you mean config.{close[0]}?" if close else "configs/default.py has the fields"
        raise UsageError(f"config.{field}: no such field; {hint}")


def check_values(config: ConfigDict, *sections: str) -> None:
    """Raises UsageError for a field, in some sections or all, whose value is none of its kind."""
    presets = default.get_config()
    for field, value in flatten(config.to_dict()).items():
        section, _, name = field.rpartition(".")
        known = presets.get(section, presets)
        if name in known and (not sections or section in sections):
            _check_value(field, value, known[name], known.get_type(name))


def _check_value(field: str, value: Any, preset: Any, kind: type) -> None:
    said, items = f"config.{field}", [value]
    if value is None and (preset is None or field == "model.num_classes"):
        return
    if isinstance(value, list | tuple) and (kind is object or (kind is tuple and preset)):
        items, kind = list(value), str if preset else int  # eval.metrics, model.depth
    kind = int if kind is object else kind
    known = {int: numbers.Integral, float: numbers.Real, tuple: list | tuple}.get(kind, kind)
    if not all(isinstance(v, known) and isinstance(v, bool) == (kind is bool) for v in items):
        raise UsageError(said, value, f"must be {_KINDS[kind]}{' or None' * (preset is None)}")
    if value not in (choices := default.CHOICES.get(field, [value])):
        raise UsageError(said, value, f": use {' or '.join(map(repr, choices))}")
    highest = MOST if kind is int else 1e38
    for item in items if kind in (int, float, str) else ():
        check_item(said, item, *RANGE.get(field, (0, highest)))


def check_item(said: str, value: Any, low: float | None = None, high: float = MOST) -> None:
    """Raises UsageError for a number out of a range, or a text that can be no name."""
    if isinstance(value, str):
        if len(value) > _LONGEST or shown(value) != value:
            raise UsageError(said, value, f"must be up to {_LONGEST} characters, none for control")
    elif value is not None and not (-high if low is None else low) <= value <= high:  # as NaN
        fix = f"at least {low}" if low is not None and value < low else f"at most {high}"
        fix = f"in [{low}, 1{']' if high == 1 else ')'}" if high <= 1 else fix
        raise UsageError(said, value, f"must be {fix if abs(value) < math.inf else 'finite'}")


def check_whole(said: str, value: Any, low: int, high: int) -> None:
    """Raises UsageError for what is no whole number, or one out of a range."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise UsageError(said, value, f"must be {_KINDS[int]}")
    check_item(said, value, low, high)


def expanded(said: str, name: str, path: str) -> str:
    """The path that field or flag `name` has, with "~" and environment variables replaced.

    Raises:
      UsageError: it is empty, of no user, or where this one cannot be; `said` is its name there.
    """
    if not path:
        raise UsageError(said, path, "is empty: name a file or a folder")
    scheme, found, _ = path.partition("://")
    if found and scheme in SCHEMES[name]:
        return path
    if found:
        kinds = " or ".join(["a disk", *(f"{kind}://" for kind in SCHEMES[name])])
        raise UsageError(said, path, f": only {kinds} works here: copy it there, or mount it")
    path = os.path.expandvars(os.path.expanduser(path))
    if path[0] == "~" and "/" in path:
        raise UsageError(said, path, ": there is no such user")
    return path


def without_gone(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of an older run, flat, without the fields that are `GONE`; or ValueError."""
    if not isinstance(config, Mapping):
        raise ValueError("it is no config")
    return {k: v for k, v in flatten(config).items() if k not in default.GONE}


def with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of an older checkpoint with the fields of now; older runs did as defaults say."""
    from flax.traverse_util import unflatten_dict

    return unflatten_dict(flatten(DEFAULTS) | without_gone(config), sep=".")


def config_to_dict(config: ConfigDict) -> dict[str, Any]:
    """The config as plain JSON values (tuples become lists)."""
    return json.loads(config.to_json_best_effort())
