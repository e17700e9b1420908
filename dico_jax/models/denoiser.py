"""What every network of this package has: its arguments, its condition, the shape of its output."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dico_jax.errors import UsageError
from dico_jax.models.layers import REMAT_POLICIES
from dico_jax.ops.plain import accumulation_dtype, plain_ops

Condition = Any  # a tree (dict) of arrays with the examples first


class Denoiser(nn.Module):
    """Base of the networks, called as `model.apply({"params": params}, x, t, condition)`.

    Arguments of the call:
      x: (N, H, W, in_channels) noisy latents; H and W divide by `size_divisor`.
      t: (N,) times in the units of the objective; of the published one the timesteps of the
        original process, 0..999, integer or fractional.
      condition: what the network is told of every example, a tree like that of `example_inputs`.

    It returns (N, H, W, out_channels) in float32 or better: the prediction, then, with learn_sigma,
    the variance interpolation. It raises UsageError where H or W do not divide.

    A network is a class with a method `forward` that takes these arguments, and `zero_condition`,
    and a row in `dico_jax.models.registry.MODELS`; the rest has defaults.

    Attributes:
      in_channels: channels of the input, 4 for Stable Diffusion latents.
      learn_sigma: whether the output also has the variance interpolation, in [-1, 1] by training.
      dtype: dtype of activations and matrix products; parameters are float32.
      scan_blocks: whether equal blocks run as one loop, so that compiling takes as long whatever
        the depth. Parameters and results are the same, up to rounding.
      remat: what the backward pass computes again to save memory: "none", "blocks" (all inside the
        blocks) or "dots" (that, except matrix products with parameters).
      plain_ops: whether operations take their plain forms, so that `jax.jvp` and `jax.hessian` work
        (`dico_jax.ops.plain`); gradients take more time and memory.
    """

    in_channels: int = 4
    learn_sigma: bool = True
    dtype: jnp.dtype = jnp.dtype("float32")
    scan_blocks: bool = False
    remat: str = "none"
    plain_ops: bool = False

    stages: ClassVar[
        tuple[str, ...]
    ] = ()  # names of the parts whose parameters are those of equal blocks
    size_divisor = 1  # what height and width of the input must divide by
    condition_tables: ClassVar[tuple[str, ...]] = ()  # parts with a row per value of the condition
    condition_dropout = 0.0  # the probability with which training replaces a condition by the null

    def __post_init__(self):
        self.check_positive("in_channels")
        if self.remat not in REMAT_POLICIES:
            fix = f"is unknown: use one of {', '.join(REMAT_POLICIES)}"
            raise UsageError("model.remat", self.remat, fix)
        super().__post_init__()

    def check_positive(self, *fields: str) -> None:
        """Raises UsageError for a field below 1."""
        for field in fields:
            if getattr(self, field) < 1:
                raise UsageError(f"model.{field}", getattr(self, field), "must be at least 1")

    def __call__(self, x, t, condition):
        """The network's output, see above."""
        self.check_input(x)
        with plain_ops(self.plain_ops):
            return self.forward(x, t, self.as_condition(condition))

    def forward(self, x, t, condition):
        """What a network computes."""
        raise NotImplementedError

    def check_input(self, x) -> None:
        """Raises UsageError where height or width of x (N, H, W, C) do not divide."""
        height, width = x.shape[1:3]
        if height % self.size_divisor or width % self.size_divisor or not height * width:
            raise UsageError(
                f"input of {height}x{width} positions: both must be multiples of "
                f"{self.size_divisor}, which the network shrinks them by"
            )

    # What the network is told.

    def example_inputs(self, n: int = 1, side: int | None = None) -> tuple[Any, Any, Condition]:
        """Zeros as arguments of a call, in NumPy: n inputs of side x side positions.

        They make parameters, and say which fields a condition has, with dtypes and shapes.
        """
        side = side or self.size_divisor
        x = np.zeros((n, side, side, self.in_channels), np.float32)
        return x, np.zeros(n, np.float32), self.zero_condition(n)

    def zero_condition(self, n: int) -> Condition:
        """The condition of `example_inputs`, a dict of at least one array."""
        raise NotImplementedError

    def as_condition(self, condition: Any) -> Condition:
        """The tree of what a caller gave as condition."""
        return condition

    def null_condition(self, n: int) -> Condition | None:
        """The condition of n examples that says nothing; None if training has not shown one."""
        return None

    def read_condition(self, example: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The condition of one example of a source, without a batch axis.

        Raises:
          UsageError: the example lacks a field, or has it in another shape.
        """
        condition = {}
        for name, zeros in self.zero_condition(1).items():
            if name not in example:
                raise UsageError(
                    f"{type(self).__name__} is told {name!r} of every example, and these have "
                    f"{', '.join(example)}"
                )
            condition[name] = np.asarray(example[name], zeros.dtype)
            if condition[name].shape != zeros.shape[1:]:
                raise UsageError(
                    f"{type(self).__name__} is told {name!r} of shape {zeros.shape[1:]} of every "
                    f"example, and one has {condition[name].shape}"
                )
        return condition

    @classmethod
    def complete_options(cls, options: dict[str, Any], source: Any) -> dict[str, Any]:
        """The options of `config.model`, with what is unset (None) and the source knows."""
        return options

    def check_source(self, source: Any) -> None:
        """Raises UsageError where the examples of a source cannot train this network."""

    def default_conditions(self, indices: np.ndarray, source: Any) -> Condition:
        """Conditions of images (N,) that nobody chose any for: those of the source's examples."""
        examples = [self.read_condition(source[int(i) % len(source)]) for i in indices]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *examples)

    def grid_conditions(self, rows: int, source: Any) -> tuple[Condition, list[str]]:
        """At most `rows` conditions for the rows of a grid, spread over the source, and names."""
        indices = np.linspace(0, len(source) - 1, min(rows, len(source))).round().astype(int)
        conditions = self.default_conditions(indices, source)
        return conditions, self.describe_conditions(conditions, source.class_names)

    def describe_conditions(self, conditions: Condition, class_names: Sequence[str]) -> list[str]:
        """Each of N conditions for a person to read."""
        return [""] * len(jax.tree.leaves(conditions)[0])

    def parse_conditions(
        self, text: str, num_images: int, seed: int, class_names: Sequence[str] = ()
    ) -> Condition:
        """The conditions of all images, (num_images, ...), that the flag --classes asks for.

        Raises:
          UsageError: there is no such class, or the network is not told classes.
        """
        raise UsageError("--classes", text, f": {type(self).__name__} is not told classes")

    def named_arrays(self, conditions: Condition) -> dict[str, np.ndarray]:
        """Conditions as the arrays of an .npz file of images, by name."""
        return dict(conditions)

    # Sizes.

    @property
    def stacked_stages(self) -> tuple[str, ...]:
        """The `stages` that run as loops, for `dico_jax.models.block_stacks`."""
        return self.stages if self.scan_blocks else ()

    @property
    def out_channels(self) -> int:
        """Channels of the output."""
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def wide_dtype(self) -> jnp.dtype:
        """The dtype of the conditioning vectors and of the output: float32 or better."""
        return accumulation_dtype(self.dtype)
