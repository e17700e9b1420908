"""The config of a run, from its config.json: --config=WORKDIR/config.json starts one like it."""

import json
import pathlib

from dico_jax.config import flatten, with_defaults
from dico_jax.configs import default


def get_config(path):
    config = default.get_config()
    for field, value in flatten(with_defaults(json.loads(pathlib.Path(path).read_text()))).items():
        section, _, name = field.rpartition(".")
        part = config[section] if section else config
        part[name] = tuple(value) if isinstance(part[name], tuple) else value
    return config
