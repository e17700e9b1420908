"""Weights in a file of PyTorch's, read as if they had been converted."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from dico_jax.errors import UsageError
from dico_jax.files import file_digest
from dico_jax.parallel.mesh import from_same
from dico_jax.pytorch import run_config
from dico_jax.pytorch.key_maps import KEY_MAPS
from dico_jax.pytorch.lazy_trees import Health, deferred_tree
from dico_jax.pytorch.safetensors_files import files_of
from dico_jax.pytorch.tensors import about
from dico_jax.pytorch.torch_files import open_tensors, select_weights

_SETS = {"ema": "auto", "params": "model"}


class FileWeights:
    """The weights of a .pt, .pth or .safetensors file, or an index: what `SavedWeights` offers.

    The network is found as `convert from_pytorch` finds it; nothing is written. "ema" are the
    averaged weights where there are some, else the only ones; "params" those that were trained.
    """

    step, text_digest = 0, None

    def __init__(self, file: str, flag: str = "--ckpt"):
        """Finds the network; no weights are read."""
        self.folder, self._about = file, f"{flag}={file}"
        self.class_names: list[str] = []
        with open_tensors(file) as opened, about(self._about):
            self._arguments = run_config.read_arguments(opened.tree, opened.metadata)
            tensors = select_weights(opened, "auto").tensors
            network = run_config.network_of(tensors, self._arguments)
            config = run_config.converted_config(network, self._arguments)
        self.config: dict[str, Any] = json.loads(json.dumps(config))
        self._network = network

    def read(self, weights: str, target: Any) -> Any:
        """The tree of "ema" or "params", as a tree of ShapeDtypeStruct with shardings says."""
        if weights not in _SETS:
            raise UsageError("--weights", weights, f": use one of {', '.join(_SETS)}")
        health, key_map = Health(), KEY_MAPS[type(self._network.model).__name__]
        with open_tensors(self.folder) as opened, about(self._about):
            tensors: Mapping[str, Any] = select_weights(opened, _SETS[weights]).tensors
            tree = deferred_tree(tensors, self._network.wanted, key_map, health)

            def put(leaf: Any, wanted: Any) -> jax.Array:
                return from_same(np.ascontiguousarray(leaf.read()), wanted.sharding)

            params = jax.tree.map(put, tree, target)
        health.warn()
        return params

    def digest(self, weights: str) -> str:
        """sha256 (hex) of the file, of an index also of its files, and of which weights."""
        text = json.dumps([weights, *map(file_digest, files_of(self.folder))])
        return hashlib.sha256(text.encode()).hexdigest()
