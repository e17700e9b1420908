"""Weights of Stable Diffusion's autoencoder, from files.

What is read: a .safetensors that `convert vae` wrote; a .safetensors, .bin, .pt, .pth or .ckpt with
the names of diffusers' AutoencoderKL, of today or from before 2023; a folder with such a file and
its config.json; hf://OWNER/REPO/FILE. Widths and depths show in names and shapes. The number of
groups and the scaling factor do not: they come from a config.json beside the file, or are those
of Stable Diffusion 1 and 2 (see `dico_jax.autoencoders.kl_detection`).
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import flax
import jax
import numpy as np

from dico_jax.autoencoders.kl import KLConfig, abstract_params
from dico_jax.autoencoders.kl_detection import detect_config, read_options
from dico_jax.errors import UsageError
from dico_jax.files import Deferred, check_new, file_digest, result_path
from dico_jax.pytorch.hub import file_beside, is_remote, local_file
from dico_jax.pytorch.key_maps import KEY_MAPS, Entry, entries, known_names
from dico_jax.pytorch.lazy_trees import ByteProgress, Health, deferred_tree
from dico_jax.pytorch.tensors import about, json_object, refusing
from dico_jax.pytorch.torch_files import TensorFile, open_tensors, select_weights, write_safetensors

KEY_MAP = KEY_MAPS["AutoencoderKL"]
FORMAT = "dico_jax.AutoencoderKL"  # of a file that `convert vae` wrote

# The sizes of these are known; they need no config.json, and are fetched only when needed.
RELEASED = re.compile(r"hf://stabilityai/sd-vae-ft-(ema|mse)/.")

_CONFIG = "config.json"
_KINDS = ("safetensors", "bin", "fp16.safetensors", "fp16.bin")
_WEIGHTS = [f"diffusion_pytorch_model.{kind}" for kind in _KINDS]
# Prefixes of what belongs to each half.
_PARTS = {"encoder": ("encoder.", "quant_conv."), "decoder": ("decoder.", "post_quant_conv.")}


@dataclasses.dataclass(frozen=True)
class Weights:
    """Parameters (a tree of float32 NumPy arrays, or {}), and what identifies them.

    Digests are sha256 (hex) over names and numbers, of encoder and quant_conv (latents with the
    same one are of one kind), and of decoder and post_quant_conv.
    """

    params: Any
    encoder_digest: str | None = None
    decoder_digest: str | None = None


@dataclasses.dataclass(frozen=True)
class KLFile:
    """An open file of an autoencoder whose names, shapes and dtypes were checked."""

    path: str
    config: KLConfig
    leaves: Any  # tree of the parameters, unread (`Deferred`)
    health: Health
    digests: tuple[str, ...] | None  # of encoder and decoder, where the file's metadata have them

    def read(self) -> Weights:
        """The weights; NaN and infinite ones are told of on stderr."""
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
    """Opens the file, folder or address of an autoencoder; a context manager.

    The options are in place of what config.json says, or 32 and 0.18215. UsageError: it is no such
    autoencoder; all missing, unexpected and misshapen tensors are listed.
    """
    path, config_path = _locate(os.fspath(source))
    with open_tensors(path) as file:
        digests = None
        if file.metadata.get("format", "").startswith(FORMAT):
            tensors, options = _converted_tensors(file), _converted_options(file)
            digests = tuple(file.metadata.get(f"{part}_sha256", "") for part in _PARTS)
        else:
            tensors = _forwards(select_weights(file, root=KEY_MAP.root).tensors)
            tensors = known_names(tensors, KEY_MAP)
            options = read_options(json_object(config_path), config_path) if config_path else {}
        given = {"norm_num_groups": norm_num_groups, "scaling_factor": scaling_factor}
        options |= {name: value for name, value in given.items() if value is not None}
        config = detect_config({k: tuple(t.shape) for k, t in tensors.items()}, options)
        health = Health()
        wanted = entries(abstract_params(config), KEY_MAP)
        leaves = deferred_tree(tensors, wanted, KEY_MAP, health)
        yield KLFile(path, config, leaves, health, digests)


def _forwards(tensors: dict[str, Any]) -> dict[str, Any]:
    """The original code counts the decoder's levels from full size on, and diffusers to it."""
    levels = [match for key in tensors if (match := re.match(r"decoder\.up\.(\d{1,4})\.", key))]
    last = max((int(match[1]) for match in levels), default=0)
    new = {m.string: f"decoder.up_blocks.{last - int(m[1])}.{m.string[m.end() :]}" for m in levels}
    return {new.get(key, key): tensor for key, tensor in tensors.items()}


def _locate(source: str) -> tuple[str, str | None]:
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
            raise UsageError(f"the folder {source} has no {' or '.join(_WEIGHTS[:2])}{hint}")
        path = found[0]
    config = path.parent / _CONFIG
    return str(path), str(config) if config.is_file() else None


def _converted_tensors(file: TensorFile) -> dict[str, Deferred]:
    refs = {tuple(name.split("/")): ref for name, ref in file.tensors.items()}
    with refusing("its tensors", "are not those that convert vae writes"):
        found = entries(flax.traverse_util.unflatten_dict(refs), KEY_MAP)

    def tensor(entry: Entry) -> Deferred:
        ref = refs[entry.path]
        return Deferred(ref.dtype, entry.torch_shape, lambda: entry.to_torch(ref.read()))

    return {entry.key: tensor(entry) for entry in found}


def _converted_options(file: TensorFile) -> dict[str, Any]:
    if file.metadata["format"] != FORMAT:
        raise UsageError(f"its format {file.metadata['format']} is not {FORMAT}: convert it again")
    with refusing("its metadata 'config'", "is not a JSON object"):
        options = {"_class_name": "AutoencoderKL", **json.loads(file.metadata.get("config", ""))}
    return read_options(options, "its metadata 'config'")


def convert_vae(
    source: str | os.PathLike,
    out: str | os.PathLike,
    *,
    norm_num_groups: int | None = None,
    scaling_factor: float | None = None,
) -> str:
    """Writes an autoencoder's weights as one float32 .safetensors, for `config.autoencoder.path`.

    Tensors are named by their paths in the tree ("encoder/conv_in/kernel"). The metadata say what
    it is: "format", "config" (JSON), "encoder_sha256", "decoder_sha256", and of the file that it
    was made of "source_name" and "source_sha256". Returns what was found and done, in two lines.
    """
    source, out = os.fspath(source), os.fspath(out)
    result_path(out, ".safetensors")  # before a download
    bar = ByteProgress()
    opened = open_kl(source, norm_num_groups=norm_num_groups, scaling_factor=scaling_factor)
    with naming("--input", source), opened as file:
        leaves = jax.tree.leaves(file.leaves)
        nbytes = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
        check_new(out, int(1.02 * nbytes))
        weights, config, source_digest = file.read(), file.config, file_digest(file.path)
    metadata = {
        "format": FORMAT,
        "config": json.dumps(dataclasses.asdict(config)),
        "encoder_sha256": str(weights.encoder_digest),
        "decoder_sha256": str(weights.decoder_digest),
        "source_name": pathlib.PurePath(source).name,
        "source_sha256": source_digest,
    }
    flat = flax.traverse_util.flatten_dict(weights.params, sep="/")
    with bar.running(nbytes, "writing"):
        write_safetensors(out, flat, metadata, on_bytes=bar.advance)
    count = sum(leaf.size for leaf in flat.values())
    return (
        f"an autoencoder of {len(config.block_out_channels)} levels, {count:,} parameters, "
        f"{config.latent_channels} latent channels, shrinks by {config.downsampling}, "
        f"norm_num_groups={config.norm_num_groups}, scaling_factor={config.scaling_factor}\n"
        f"{out} is written"
    )
