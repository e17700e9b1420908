"""What every network has: its arguments, its condition, the shape of its output."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dico_jax.configs.default import CHOICES
from dico_jax.errors import UsageError
from dico_jax.models.block_stacks import REMAT_POLICIES
from dico_jax.models.class_names import ClassNames
from dico_jax.models.layers import NUM_TIME_FEATURES, LabelEmbedder
from dico_jax.ops.plain import accumulation_dtype, check_float64, plain_ops

Condition = Any  # a tree (dict) of arrays with the examples first


class Denoiser(nn.Module):
    """Base of the networks, called as `model.apply({"params": params}, x, t, condition)`.

    Arguments of the call:
      x: (N, H, W, in_channels) noisy latents; H and W divide by `size_divisor`.
      t: (N,) times in the units of the objective, of the published one 0..999, also fractional;
        with two_times (N, 2), where a step begins and where it ends.
      condition: what the network is told of every example, a tree like that of `example_inputs`.

    It returns (N, H, W, out_channels) in float32 or better: the prediction, then, with learn_sigma,
    the variance interpolation. It raises UsageError where H or W do not divide.

    A network has `forward`, `zero_condition` and a row in `MODELS`; the rest has defaults.

    Attributes:
      in_channels: channels of the input, 4 for Stable Diffusion latents.
      learn_sigma: whether the output also has the variance interpolation, in [-1, 1] by training.
      dtype: dtype of activations and matrix products; parameters are float32.
      scan_blocks: whether equal blocks run as one loop, which compiles as fast whatever the depth.
      remat: what the backward pass computes again to save memory: "none", "blocks" (all inside the
        blocks) or "dots" (that, except matrix products with parameters).
      plain_ops: whether `jax.jvp` and `jax.hessian` work, see `dico_jax.ops.plain.plain_ops`.
      two_times: whether it is told two times of every example.
    """

    in_channels: int = 4
    learn_sigma: bool = True
    dtype: jnp.dtype = jnp.dtype("float32")
    scan_blocks: bool = False
    remat: str = "none"
    plain_ops: bool = False
    two_times: bool = False

    stages: ClassVar[tuple[str, ...]] = ()  # parts whose parameters are those of equal blocks
    size_divisor = 1  # what height and width of the input must divide by
    condition_tables: ClassVar[tuple[str, ...]] = ()  # parts with a row per value of the condition
    condition_parts: ClassVar[tuple[str, ...]] = ()  # which networks told something else lack
    condition_dropout = 0.0  # the probability with which training replaces a condition by the null
    asked_by = "classes"  # the flag that asks for conditions, see `parse_conditions`
    variants: ClassVar[tuple[str, ...]] = ()  # options of which published weights have the default
    windows = 0  # side of the windows that it cuts each of its resolutions into; 0 for none
    may_be_zero: ClassVar[tuple[str, ...]] = ()  # of the whole numbers among the options

    def __post_init__(self):
        for field, good, fix in self.checks():
            if not good:
                raise UsageError(f"model.{field}", getattr(self, field), fix)
        super().__post_init__()

    def checks(self) -> Iterator[tuple[str, bool, str]]:
        """Per check of an option its name, whether its value is right, and what else to use."""
        for field in (field.name for field in dataclasses.fields(self) if field.type is int):
            least = int(field not in self.may_be_zero)
            good = isinstance(value := getattr(self, field), int) and value >= least
            yield field, good, f"must be at least {least}"
        choices = {f.partition(".")[2]: c for f, c in CHOICES.items() if f.startswith("model.")}
        for name, known in {"remat": tuple(REMAT_POLICIES), **choices}.items():
            fix = f"is unknown: use one of {', '.join(map(str, known))}"
            yield name, getattr(self, name, known[0]) in known, fix

    def without_effect(self, idle: Mapping[str, bool], because: str):
        """Checks of options that have none with the value of another, where they are set."""
        fix = f"has no effect with model.{because}={getattr(self, because)!r}: leave it unset"
        for name, is_idle in idle.items():
            yield name, not is_idle or name not in self.changed, fix

    @property
    def changed(self) -> tuple[str, ...]:
        """The options whose values are not the defaults of this kind of network."""
        options = (f for f in dataclasses.fields(self) if f.name not in ("parent", "name"))
        return tuple(f.name for f in options if getattr(self, f.name) != f.default)

    @property
    def variant(self) -> str:
        """The first of its `variants` that is no default; "" for a network as it was published."""
        return next((name for name in self.variants if name in self.changed), "")

    def __call__(self, x, t, condition):
        self.check_input(x.shape)
        check_float64("dtype", self.dtype)
        with plain_ops(self.plain_ops):
            return self.forward(x, t, self.from_read(self.as_condition(condition)))

    def forward(self, x, t, condition):
        """What a network computes."""
        raise NotImplementedError

    def macs(self, positions: int) -> int | None:
        """Multiply-adds of one example with so many positions (H * W); None for no formula."""
        return None

    def time_macs(self, width: int) -> int:
        """Those of the embedders of an example's times."""
        return (1 + self.two_times) * (NUM_TIME_FEATURES * width + width**2)

    def check_input(self, shape: Sequence[int]) -> None:
        """Raises UsageError where height or width of (..., H, W, C) do not divide."""
        height, width = shape[-3:-1]
        if height % self.size_divisor or width % self.size_divisor or not height * width:
            fix = f"multiples of {self.size_divisor}, {self.size_reason}"
            raise UsageError(f"input of {height}x{width} positions: both must be {fix}")

    @property
    def size_reason(self) -> str:
        """Why height and width of the input must divide."""
        if not self.windows:
            return "which the network shrinks them by"
        return f"{self.size_divisor // self.windows} times model.window_size={self.windows}"

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

    def example_inputs(self, n: int = 1, side: int | None = None) -> tuple[Any, Any, Condition]:
        """Zeros as arguments of a call, in NumPy: n inputs of side x side positions."""
        side = side or self.size_divisor
        x = np.zeros((n, side, side, self.in_channels), np.float32)
        times = np.zeros((n, 2) if self.two_times else n, np.float32)
        return x, times, self.zero_condition(n)

    def zero_condition(self, n: int) -> Condition:
        """The condition of `example_inputs`, a dict of at least one array."""
        raise NotImplementedError

    def as_condition(self, condition: Any) -> Condition:
        """The tree of what a caller gave as condition."""
        return condition

    def from_read(self, conditions: Condition) -> Condition:
        """What the network is told, on the devices, of a batch of what `read_condition` gave."""
        return conditions

    def null_condition(self, n: int) -> Condition | None:
        """The condition of n examples that says nothing; None if training has not shown one."""
        return None

    def encode_condition(self, params: Any, condition: Condition) -> Condition:
        """What follows from parameters and condition alone, to be given in the condition's place.

        Sampling does it once, not at every step.
        """
        return condition

    def mixed_conditions(self, start: Condition, end: Condition, shares: Any) -> Condition:
        """Encoded conditions between two, such as (N, ...): `shares` (N,) from 0 to 1 of the end.

        A condition of one, as the null one, is mixed as if it were N.
        """

        def mixed(a, b):
            share = jnp.reshape(shares, (-1, *[1] * (a.ndim - 1))).astype(a.dtype)
            return (1 - share) * a + share * b

        return jax.tree.map(mixed, start, end)

    def read_condition(self, example: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The condition of one example of a source, without a batch axis; or UsageError."""
        condition = {}
        for name, zeros in self.zero_condition(1).items():
            told, shape = f"{type(self).__name__} is told {name!r}", zeros.shape[1:]
            if name not in example:
                raise UsageError(f"{told} of every example, and these have {', '.join(example)}")
            value = condition[name] = np.asarray(example[name], zeros.dtype)
            if value.shape != shape:
                fix = f"of shape {shape} of every example, and one has {value.shape}"
                raise UsageError(f"{told} {fix}")
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

    def num_choices(self, source: Any) -> int:
        """How many `default_conditions` there are."""
        return len(source)

    def grid_conditions(self, rows: int, source: Any) -> tuple[Condition, list[str]]:
        """At most `rows` conditions for the rows of a grid, spread over all, and their names."""
        choices = self.num_choices(source)
        indices = np.linspace(0, choices - 1, min(rows, choices)).round().astype(int)
        conditions = self.default_conditions(indices, source)
        return conditions, self.describe_conditions(conditions, source.class_names)

    def describe_conditions(self, conditions: Condition, class_names: Sequence[str]) -> list[str]:
        """Each of N conditions for a person to read."""
        return [""] * len(jax.tree.leaves(conditions)[0])

    def parse_conditions(
        self, asked: Any, num_images: int | None, seed: int, class_names: Sequence[str] = ()
    ) -> Condition:
        """The conditions of all images, (num_images, ...), that the flag `asked_by` asks for.

        `asked` is the text of --classes or a list of classes, or the list of texts of --prompts.
        Where `num_images` is None there is one of each that is asked for.
        """
        raise UsageError("--classes", asked, f": {type(self).__name__} has no parse_conditions")

    def class_labels(self, conditions: Condition) -> Any:
        """The classes (N,) that images of these conditions are of; None if they have none."""
        return None

    def named_arrays(self, conditions: Condition) -> dict[str, np.ndarray]:
        """Conditions as the arrays of an .npz file of images, by name."""
        return dict(conditions)


class ClassConditional(Denoiser):
    """Base of networks whose condition is {"label": int32 (N,)}, or the labels (N,) alone.

    Labels are 0..num_classes - 1, or `null_class`; all that is known of them is here.
    """

    num_classes: int = 1000
    class_dropout_prob: float = 0.1  # of the label in training; 0 for no null class

    condition_tables = condition_parts = ("y_embedder",)

    def checks(self):
        yield from super().checks()
        fix = "must be in [0, 1): the published models use 0.1"
        yield "class_dropout_prob", 0 <= self.class_dropout_prob < 1, fix

    def embed_labels(self, condition: Condition, tables: tuple[tuple[str, int], ...]):
        """A vector (N, width) of the labels from every table (name, width)."""
        embed = LabelEmbedder(self.num_rows, tables, self.wide_dtype, name="y_embedder")
        return embed(condition["label"])

    @property
    def num_rows(self) -> int:
        """Of the tables of labels: the classes, and the null class where there is one."""
        return self.num_classes + (self.class_dropout_prob > 0)

    @property
    def null_class(self) -> int | None:
        """The label that stands for no label, or None for a model trained without one."""
        return self.num_classes if self.class_dropout_prob > 0 else None

    @property
    def condition_dropout(self) -> float:  # type: ignore[override]
        return self.class_dropout_prob

    def as_condition(self, condition):
        labels = condition["label"] if isinstance(condition, Mapping) else condition
        if isinstance(labels, jax.core.Tracer) and labels.ndim == 2:  # of `mixed_conditions`
            return {"label": labels}
        if not isinstance(labels, jax.core.Tracer):  # a table has no row for others
            labels, last = np.asarray(labels), self.num_classes - (self.null_class is None)
            right = labels.ndim == 1 and labels.dtype.kind in "iu" and labels.size
            if not right or labels.min() < 0 or labels.max() > last:
                found = f"labels, {labels.dtype}{list(labels.shape)}, are {str(labels)[:100]}"
                raise UsageError(f"{found}: integers (N,) from 0 to {last} are expected")
        return {"label": labels.astype(np.int32)}

    def mixed_conditions(self, start, end, shares):
        """Weights of the rows of the tables, float (N, rows), in place of labels."""
        first, last = ({"label": jax.nn.one_hot(c["label"], self.num_rows)} for c in (start, end))
        return super().mixed_conditions(first, last, shares)

    def zero_condition(self, n):
        return {"label": np.zeros(n, np.int32)}

    def null_condition(self, n):
        null = self.null_class
        return None if null is None else {"label": np.full(n, null, np.int32)}

    @classmethod
    def complete_options(cls, options, source):
        known = options.get("num_classes") is not None or not source.class_names
        return options if known else options | {"num_classes": len(source.class_names)}

    def check_source(self, source):
        if (found := len(source.class_names)) > self.num_classes:
            fix = f"is too few for {source!r}: use {found}"
            raise UsageError("model.num_classes", self.num_classes, fix)

    def default_conditions(self, indices, source):
        return {"label": np.asarray(indices % self.num_classes, np.int32)}

    def num_choices(self, source):
        return self.num_classes

    def describe_conditions(self, conditions, class_names):
        """The names of classes, or their numbers where they have none."""
        title = ClassNames(self.num_classes, class_names).title
        return [title(int(label))[:80] for label in self.as_condition(conditions)["label"]]

    def parse_conditions(self, asked, num_images, seed, class_names=()):
        """Labels, int32 (num_images,), of "all" or some (in turn), or "random" by the seed.

        Some are a list, or a text with commas, of what `ClassNames` knows.
        """
        if asked == "random":
            # Philox's stream can be cut anywhere: more images leave the first labels as they were.
            generator = np.random.Generator(np.random.Philox(seed))
            return {"label": generator.integers(0, self.num_classes, num_images).astype(np.int32)}
        numbers: Iterable[int] = range(self.num_classes)
        if asked != "all":
            numbers = ClassNames(self.num_classes, class_names).numbers(asked)
        labels = np.array([*numbers], np.int32)
        return {"label": labels if num_images is None else np.resize(labels, num_images)}

    def class_labels(self, conditions):
        return np.asarray(self.as_condition(conditions)["label"], np.int64)

    def named_arrays(self, conditions):
        return {"arr_1": self.class_labels(conditions)}
