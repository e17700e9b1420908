"""Arithmetic of the networks: counted from their sizes, or by XLA where there is no formula."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dico_jax.models.denoiser import Denoiser
from dico_jax.models.dico import DiCo
from dico_jax.models.dit import DiT
from dico_jax.models.layers import NUM_TIME_FEATURES
from dico_jax.models.registry import abstract_params

FLOPS_PER_MAC = 2
# The backward pass has two products, for inputs and for weights, to each one of the forward pass.
PASSES_PER_TRAINING_STEP = 3


def forward_macs(model: Denoiser, latent_shape: tuple[int, int, int]) -> int | None:
    """Multiply-adds of one forward pass of one example; None for a network without a formula.

    Those of convolutions (depthwise ones as well), linear layers and the two products of attention:
    what the papers' figures consist of, up to normalisation and pooling.

    Args:
      model: the network.
      latent_shape: (H, W, C) of its input.

    Raises:
      UsageError: H or W do not divide.
    """
    model.check_input(jax.ShapeDtypeStruct((1, *latent_shape), jnp.float32))
    formula = _FORMULAS.get(type(model))
    return None if formula is None else formula(model, latent_shape[0] * latent_shape[1])


def forward_flops(model: Denoiser, latent_shape: tuple[int, int, int]) -> int:
    """Floating-point operations of a forward pass of one example.

    Two for every multiply-add; where there is no formula, XLA's count of the program before it is
    optimised, operations element by element too, of a loop inside a network its body once.
    Arguments and errors are those of `forward_macs`.
    """
    macs = forward_macs(model, latent_shape)
    return _xla_count(model, latent_shape) if macs is None else FLOPS_PER_MAC * macs


def training_flops(model: Denoiser, latent_shape: tuple[int, int, int]) -> int:
    """Floating-point operations of one example in a training step, forward and backward.

    What is computed again to save memory does not count, nor do the optimizer and the autoencoder.
    Counted as `forward_flops` does, with its arguments and errors.
    """
    if forward_macs(model, latent_shape) is None:
        return _xla_count(model, latent_shape, backward=True)
    return PASSES_PER_TRAINING_STEP * forward_flops(model, latent_shape)


def _xla_count(model, latent_shape, backward=False):
    model = model.clone(scan_blocks=False, remat="none")  # blocks in a loop would count once
    _, t, condition = model.example_inputs()

    def total(params, x):
        return model.apply({"params": params}, x, t, condition).sum()

    x = jax.ShapeDtypeStruct((1, *latent_shape), jnp.float32)
    program = jax.jit(jax.value_and_grad(total) if backward else total)
    costs: Any = program.lower(abstract_params(model), x).cost_analysis()
    return int(costs["flops"])


def _timestep_embedder_macs(width: int) -> int:
    return NUM_TIME_FEATURES * width + width**2


def _dico_macs(model: DiCo, positions: int) -> int:
    """Of an input of `positions` = H * W."""
    d = model.hidden_size
    full, half, quarter = positions, positions // 4, positions // 16  # of the three resolutions
    embedders = sum(map(_timestep_embedder_macs, (d, 2 * d, 4 * d)))
    ends = full * 9 * (model.in_channels * d + 2 * d * model.out_channels)
    final_modulation = 2 * d * (2 * 2 * d)
    down = full * 9 * d * (d // 2) + half * 9 * (2 * d) * d
    up = quarter * 9 * (4 * d) * (8 * d) + half * 9 * (2 * d) * (4 * d)
    fuse = half * (4 * d) * (2 * d) + full * (2 * d) * (2 * d)
    stages = zip(
        model.depth, (full, half, quarter, half, full), (d, 2 * d, 4 * d, 2 * d, 2 * d), strict=True
    )
    blocks = sum(n * _dico_block_macs(size, width, model.mlp_ratio) for n, size, width in stages)
    return embedders + ends + final_modulation + down + up + fuse + blocks


def _dico_block_macs(positions: int, width: int, mlp_ratio: float) -> int:
    modulation_and_attention = 6 * width**2 + width**2  # of vectors, once per image
    conv_half = 2 * width**2 + 9 * width
    feed_forward = 2 * width * int(mlp_ratio * width)
    return modulation_and_attention + positions * (conv_half + feed_forward)


def _dit_macs(model: DiT, positions: int) -> int:
    tokens = positions // model.patch_size**2
    d = model.hidden_size
    patch = model.patch_size**2
    ends = tokens * patch * d * (model.in_channels + model.out_channels)
    final_modulation = 2 * d**2
    per_token = 4 * d**2 + 2 * d * int(model.mlp_ratio * d)  # query, key, value, output; MLP
    attention = 2 * tokens**2 * d  # query with key, weights with value
    blocks = model.depth * (6 * d**2 + tokens * per_token + attention)
    return _timestep_embedder_macs(d) + ends + final_modulation + blocks


_FORMULAS: dict[type[Denoiser], Callable[[Any, int], int]] = {DiCo: _dico_macs, DiT: _dit_macs}
