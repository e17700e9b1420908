"""An autoencoder's file in this project's names and layouts, from one in those of diffusers."""

import dataclasses
import hashlib
import json
import math
import os
import pathlib

import flax
import jax

from dico_jax.autoencoders.weights import FORMAT, naming, open_kl
from dico_jax.errors import UsageError
from dico_jax.files import check_new
from dico_jax.pytorch.progress import ByteProgress
from dico_jax.pytorch.torch_files import write_safetensors

_SLACK = 1.02  # of the size of what is written over the size of its tensors


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
    was made of "source_name" and "source_sha256".

    Args:
      source: file, folder or address, see `dico_jax.autoencoders.weights`.
      out: the file to make.
      norm_num_groups: in place of what a config.json says, or 32.
      scaling_factor: in place of what a config.json says, or 0.18215.

    Returns:
      What was found and done, in two lines.

    Raises:
      UsageError: something cannot be read, is no such autoencoder, or may not be written; nothing
        is left.
    """
    source, out = os.fspath(source), os.fspath(out)
    if pathlib.PurePath(out).suffix != ".safetensors":
        raise UsageError(f"--out={out}: name a .safetensors file")
    check_new(out, 0)  # before a download
    bar = ByteProgress()
    opened = open_kl(source, norm_num_groups=norm_num_groups, scaling_factor=scaling_factor)
    with naming("--input", source), opened as file:
        leaves = jax.tree.leaves(file.leaves)
        nbytes = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
        check_new(out, int(_SLACK * nbytes))
        weights, config = file.read(), file.config
        with open(file.path, "rb") as stream:
            source_digest = hashlib.file_digest(stream, "sha256").hexdigest()
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
