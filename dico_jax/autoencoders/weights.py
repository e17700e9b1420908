"""Weights of Stable Diffusion's autoencoder, from files.

What is read: a .safetensors that `convert vae` wrote; a .safetensors, .bin, .pt, .pth or .ckpt with
the names of diffusers' AutoencoderKL, of today or from before 2023; a folder with such a file and
its config.json; hf://OWNER/REPO/FILE. Widths and depths show in names and shapes. The number of
groups and the scaling factor do not: they come from a config.json beside the file, or are those
of Stable Diffusion 1 and 2 (see `dico_jax.autoencoders.kl_detection`).
"""

import contextlib
import dataclasses
import functools
import hashlib
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import flax
import jax
import numpy as np

from dico_jax.autoencoders.kl import KLConfig, abstract_params
from dico_jax.autoencoders.kl_detection import detect_config, parse_options, read_options
from dico_jax.errors import UsageError
from dico_jax.pytorch.hub import file_beside, is_remote, local_file
from dico_jax.pytorch.key_maps import KEY_MAPS, entries, known_names
from dico_jax.pytorch.lazy_trees import Health, deferred_tree
from dico_jax.pytorch.tensors import about
from dico_jax.pytorch.torch_files import Deferred, TensorFile, open_tensors, select_weights

KEY_MAP = KEY_MAPS["AutoencoderKL"]
FORMAT = "dico_jax.AutoencoderKL"  # of a file that `convert vae` wrote

# The sizes of these are known; they need no config.json, and are fetched only when needed.
RELEASED = re.compile(r"hf://stabilityai/sd-vae-ft-(ema|mse)/.")

_CONFIG = "config.json"
_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
# Prefixes of what belongs to each half.
_PARTS = {
    "encoder": ("encoder.", "quant_conv."),
    "decoder": ("decoder.", "post_quant_conv."),
}


@dataclasses.dataclass(frozen=True)
class Weights:
    """Parameters, and what identifies them.

    Attributes:
      params: tree of float32 NumPy arrays, {} where there are none.
      encoder_digest: sha256 (hex) over encoder and quant_conv, names and numbers of a state dict:
        latents with the same one are of one kind. None where there is no encoder.
      decoder_digest: the same over decoder and post_quant_conv.
    """

    params: Any
    encoder_digest: str | None = None
    decoder_digest: str | None = None


@dataclasses.dataclass(frozen=True)
class KLFile:
    """An open file of an autoencoder whose names, shapes and dtypes were checked; nothing is read.

    Attributes:
      path: the file with the weights.
      config: the sizes.
      leaves: tree of the parameters, leaves unread (`Deferred`).
      health: looks at what is read.
      digests: of encoder and decoder, as the file's metadata have them, or None.
    """

    path: str
    config: KLConfig
    leaves: Any
    health: Health
    digests: tuple[str, ...] | None

    def read(self) -> Weights:
        """The weights; NaN and infinite ones are told of on stderr.

        Raises:
          UsageError: the file is damaged.
        """
        params = jax.tree.map(lambda leaf: np.ascontiguousarray(leaf.read()), self.leaves)
        digests = tuple(_digest(params, prefixes) for prefixes in _PARTS.values())
        if self.digests not in (None, digests):
            raise UsageError("it is damaged, or was changed after its conversion: convert it again")
        self.health.warn()
        return Weights(params, *digests)


def naming(field: str, source: str | os.PathLike) -> contextlib.AbstractContextManager[None]:
    """Starts a UsageError's message with "field=source", unless it is about another flag."""
    return about(f"{field}={os.fspath(source)}", os.fspath(source))


def _digest(params: Any, prefixes: tuple[str, ...]) -> str:
    """sha256 over names and float32 numbers of a state dict's tensors, in the order of names."""
    digest, flat = hashlib.sha256(), flax.traverse_util.flatten_dict(params)
    for entry in sorted(entries(params, KEY_MAP), key=lambda entry: entry.key):
        if entry.key.startswith(prefixes):
            digest.update(entry.key.encode())
            digest.update(entry.to_torch(flat[entry.path]).astype("<f4", copy=False).data)
    return digest.hexdigest()


@contextlib.contextmanager
def open_kl(
    source: str | os.PathLike,
    *,
    norm_num_groups: int | None = None,
    scaling_factor: float | None = None,
) -> Iterator[KLFile]:
    """Opens the file of an autoencoder; a context manager.

    Args:
      source: file, folder or address, as the module says.
      norm_num_groups: in place of what config.json says, or 32.
      scaling_factor: in place of what config.json says, or 0.18215.

    Raises:
      UsageError: it cannot be read, is no autoencoder or one that this network is not; all
        missing, unexpected and misshapen tensors are listed.
    """
    path, config_path = _locate(os.fspath(source))
    with open_tensors(path) as file:
        digests = None
        if file.metadata.get("format", "").startswith(FORMAT):
            tensors, options = _converted_tensors(file), _converted_options(file)
            digests = tuple(file.metadata.get(f"{part}_sha256", "") for part in _PARTS)
        else:
            tensors = known_names(select_weights(file).tensors, KEY_MAP)
            options = read_options(config_path) if config_path else {}
        given = {"norm_num_groups": norm_num_groups, "scaling_factor": scaling_factor}
        options |= {name: value for name, value in given.items() if value is not None}
        config = detect_config({k: tuple(t.shape) for k, t in tensors.items()}, options)
        health = Health()
        wanted = entries(abstract_params(config), KEY_MAP)
        leaves = deferred_tree(tensors, wanted, KEY_MAP, health)
        yield KLFile(path, config, leaves, health, digests)


def _locate(source: str) -> tuple[str, str | None]:
    """The file with the weights, and the config.json beside it or None."""
    path = pathlib.Path(source)
    if path.suffix == ".json" and not path.is_dir():
        raise UsageError("this holds no weights: give the file with the weights, or its folder")
    if is_remote(source):
        known = RELEASED.match(source)
        return local_file(source), None if known else file_beside(source, _CONFIG)
    if path.is_dir():
        found = [path / name for name in _WEIGHTS if (path / name).exists()]
        if not found:
            inner = path / "vae"
            hint = f": give {inner}" if inner.is_dir() else ""
            raise UsageError(f"the folder {source} has no {' or '.join(_WEIGHTS)}{hint}")
        path = found[0]
    config = path.parent / _CONFIG
    return str(path), str(config) if config.is_file() else None


# Files that `convert vae` wrote.


def _converted_tensors(file: TensorFile) -> dict[str, Deferred]:
    """The tensors as a state dict has them."""
    refs = {tuple(name.split("/")): ref for name, ref in file.tensors.items()}
    try:
        found = entries(flax.traverse_util.unflatten_dict(refs), KEY_MAP)
    except (KeyError, ValueError, TypeError) as error:
        raise UsageError(f"its tensors are not those that convert vae writes: {error}") from error

    def read(entry):
        return entry.to_torch(refs[entry.path].read())

    return {
        entry.key: Deferred(
            refs[entry.path].dtype, entry.torch_shape, functools.partial(read, entry)
        )
        for entry in found
    }


def _converted_options(file: TensorFile) -> dict[str, Any]:
    if file.metadata["format"] != FORMAT:
        raise UsageError(f"its format {file.metadata['format']} is not {FORMAT}: convert it again")
    return parse_options(file.metadata.get("config", ""), "its metadata 'config'")
