"""What every network of this package has: the shape of its input and output, and its labels."""

import flax.linen as nn
import jax.numpy as jnp

from dico_jax.errors import UsageError
from dico_jax.models.layers import REMAT_POLICIES
from dico_jax.ops.precision import accumulation_dtype


class Denoiser(nn.Module):
    """Base of the networks, called as `model.apply({"params": params}, x, t, y)`.

    Arguments of the call:
      x: (N, H, W, in_channels) noisy latents; H and W divide by `size_divisor`.
      t: (N,) timesteps of the original process, 0..999, integer or fractional.
      y: (N,) int labels, 0..num_classes - 1, or `null_class`.

    It returns (N, H, W, out_channels) in float32 or better: the predicted noise, then, with
    learn_sigma, the variance interpolation. It raises UsageError where H or W do not divide.

    Attributes:
      in_channels: channels of the input, 4 for Stable Diffusion latents.
      num_classes: number of classes.
      class_dropout_prob: probability of dropping the label in training; 0 for no null class.
      learn_sigma: whether the output also has the variance interpolation, in [-1, 1] by training.
      dtype: dtype of activations and matrix products; parameters are float32.
      scan_blocks: whether equal blocks run as one loop, so that compiling takes as long whatever
        the depth. Parameters and results are the same, up to rounding.
      remat: what the backward pass computes again to save memory: "none", "blocks" (all inside the
        blocks) or "dots" (that, except matrix products with parameters).
    """

    in_channels: int = 4
    num_classes: int = 1000
    class_dropout_prob: float = 0.1
    learn_sigma: bool = True
    dtype: jnp.dtype = jnp.dtype("float32")
    scan_blocks: bool = False
    remat: str = "none"

    def __post_init__(self):
        for field in ("in_channels", "num_classes", "hidden_size"):
            if getattr(self, field) < 1:
                raise UsageError(f"model.{field}={getattr(self, field)} must be at least 1")
        if not 0 <= self.class_dropout_prob < 1:
            raise UsageError(
                f"model.class_dropout_prob={self.class_dropout_prob} must be in [0, 1): "
                "the published models use 0.1"
            )
        if int(self.mlp_ratio * self.hidden_size) < 1:
            raise UsageError(
                f"model.mlp_ratio={self.mlp_ratio} leaves the feed-forward no channels"
            )
        if self.remat not in REMAT_POLICIES:
            raise UsageError(
                f"model.remat={self.remat!r} is unknown: use one of {', '.join(REMAT_POLICIES)}"
            )
        super().__post_init__()

    @property
    def size_divisor(self) -> int:
        """What height and width of the input must divide by."""
        raise AttributeError("a network says what its input's size must divide by")

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the parts whose parameters are those of equal blocks."""
        raise AttributeError("a network says where its blocks are")

    @property
    def stacked_stages(self) -> tuple[str, ...]:
        """The `stages` that run as loops, for `dico_jax.models.block_stacks`."""
        return self.stages if self.scan_blocks else ()

    @property
    def null_class(self) -> int | None:
        """The label that stands for no label, or None for a model trained without one."""
        return self.num_classes if self.class_dropout_prob > 0 else None

    @property
    def num_label_rows(self) -> int:
        """Rows of a label table: the classes, and the null class where there is one."""
        return self.num_classes + (self.class_dropout_prob > 0)

    @property
    def out_channels(self) -> int:
        """Channels of the output."""
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def wide_dtype(self) -> jnp.dtype:
        """The dtype of the conditioning vectors and of the output: float32 or better."""
        return accumulation_dtype(self.dtype)

    def check_input(self, x) -> None:
        """Raises UsageError where height or width of x (N, H, W, C) do not divide."""
        height, width = x.shape[1:3]
        if height % self.size_divisor or width % self.size_divisor or not height * width:
            raise UsageError(
                f"input of {height}x{width} positions: both must be multiples of "
                f"{self.size_divisor}, which the network shrinks them by"
            )
