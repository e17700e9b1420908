"""Classifier-free guidance (arXiv 2207.12598), and the published code's form of it.

The published models are sampled, and their scores measured, with guidance on the first three of the
four latent channels only. That is `cfg_channels="first_three"`; "all" is the paper's formula.
"""

import numbers
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dico_jax.diffusion.gaussian import as_float
from dico_jax.errors import UsageError

# How many of C noise channels are guided.
CFG_CHANNELS: dict[str, Callable[[int], int]] = {
    "first_three": lambda num_channels: min(3, num_channels),
    "all": lambda num_channels: num_channels,
}


def classifier_free_guidance(
    cond, uncond, scale, num_channels: int, cfg_channels: str = "first_three"
) -> jax.Array:
    """The guided output: uncond + scale * (cond - uncond) in the guided channels, cond elsewhere.

    Variance channels are never guided.

    Args:
      cond: the model's output with the condition, (N, ..., C) or (N, ..., 2C): the prediction's
        channels, then the variance's.
      uncond: its output with the null condition, of the same shape.
      scale: the guidance scale, a number or an array (); 1 is no guidance, 0 the null condition.
      num_channels: C, the channels of the data.
      cfg_channels: a key of `CFG_CHANNELS`. "first_three" guides min(3, C) channels of the
        prediction, as the published code does; "all" guides all C.

    Returns:
      The shape of cond, in float32 or better.

    Raises:
      UsageError: an unknown cfg_channels, or outputs whose channels are neither C nor 2C.
    """
    check_cfg_channels(cfg_channels)
    guided = CFG_CHANNELS[cfg_channels](num_channels)
    cond, uncond = as_float(cond, uncond)
    if cond.shape != uncond.shape or cond.shape[-1] not in (num_channels, 2 * num_channels):
        what = f"guidance of outputs {cond.shape} (condition) and {uncond.shape} (null)"
        fix = f"both must have {num_channels} or {2 * num_channels} channels and one shape"
        raise UsageError(f"{what} for num_channels={num_channels}: {fix}")
    scale = jnp.asarray(scale, cond.dtype)
    mixed = uncond[..., :guided] + scale * (cond[..., :guided] - uncond[..., :guided])
    return jnp.concatenate([mixed, cond[..., guided:]], axis=-1)


def rescaled(guided, cond, share: float) -> jax.Array:
    """The channels that are guided (N, ..., C), with a deviation nearer to that without guidance.

    Each example is scaled to the deviation of `cond`, by a `share` from 0 (not at all) to 1 (arXiv
    2305.08891, equations 15 and 16).
    """
    axes = tuple(range(1, guided.ndim))
    before, after = (jnp.std(x, axes, keepdims=True) for x in as_float(cond, guided))
    ratio = before / jnp.where(after > 0, after, 1.0)  # that of a fresh network's zeros is 0
    return guided * (share * ratio + (1.0 - share))


def guided_model_fn(
    model_fn: Callable,
    condition,
    null,
    scale,
    num_channels: int,
    cfg_channels="first_three",
    *,
    rescale: float = 0.0,
    weak_fn: Callable | None = None,
    always: bool = True,
) -> Callable[..., jax.Array]:
    """A model of (x, t), (N, ..., C) and (N,), that is guided to the condition, for `sample_loop`.

    It takes a scale as a third argument, in place of the one here.

    Args:
      model_fn: model_fn(x, t, condition) is the model's output.
      condition: a tree of arrays (N, ...), such as labels (N,).
      null: the condition that says nothing, a tree like it of arrays that broadcast to its own.
      scale: the guidance scale. The Python number 1 runs the model on N examples, without
        guidance; every other number, and every array (traced or not), on 2N.
      num_channels: C, the channels of the data.
      cfg_channels: a key of `CFG_CHANNELS`, see `classifier_free_guidance`.
      rescale: see `rescaled`.
      weak_fn: weak_fn(x, t), a weaker model, which the model is guided away from, in place of the
        null condition (autoguidance, arXiv 2406.02507).
      always: False looks at the scale at every step, and where it is 1 runs on N examples.
    """
    check_cfg_channels(cfg_channels)

    def plain(x, t, _=None):
        return model_fn(x, t, condition)

    if isinstance(scale, numbers.Number) and scale == 1:
        return plain

    def pair(a, n):
        return _interleave(a := jnp.asarray(a), jnp.broadcast_to(jnp.asarray(n, a.dtype), a.shape))

    pairs = None if weak_fn is not None else jax.tree.map(pair, condition, null)

    def both(x, t):
        if weak_fn is None:
            output = model_fn(_interleave(x, x), _interleave(t, t), pairs)
            return output[0::2], output[1::2]
        cond = plain(x, t)
        weak = weak_fn(x, t)[..., :num_channels]
        return cond, jnp.concatenate([weak, cond[..., num_channels:]], axis=-1)

    def guided(x, t, scale=scale):
        cond, against = both(x, t)
        mixed = classifier_free_guidance(cond, against, scale, num_channels, cfg_channels)
        if not rescale:
            return mixed
        count = CFG_CHANNELS[cfg_channels](num_channels)
        mixed, others = jnp.split(mixed, [count], axis=-1)
        return jnp.concatenate([rescaled(mixed, cond[..., :count], rescale), others], axis=-1)

    def sometimes(x, t, scale=scale):
        wide = as_float(x)[0].dtype  # of what guidance gives

        def alone():
            return plain(x, t).astype(wide)

        return jax.lax.cond(scale == 1, alone, lambda: guided(x, t, scale).astype(wide))

    return guided if always else sometimes


def _interleave(a, b) -> jax.Array:
    """a[0], b[0], a[1], b[1], ...: a batch of 2N."""
    # One half after the other would send half of a batch to other devices at every step.
    return jnp.stack([a, b], axis=1).reshape(2 * a.shape[0], *a.shape[1:])


def check_cfg_channels(name: str, field: str = "cfg_channels") -> None:
    """Raises UsageError for a name that is no key of `CFG_CHANNELS`."""
    if name not in CFG_CHANNELS:
        raise UsageError(field, name, f"is unknown: use {' or '.join(map(repr, CFG_CHANNELS))}")
