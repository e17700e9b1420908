"""How the state of a run lies on the mesh: rules from parameter paths to mesh axes.

A rule is (pattern, axes): the first whose pattern is found in a parameter's path decides which axis
of the mesh, if any, splits each axis of the parameter. Averages and the optimizer's moments lie as
their parameter does. An axis that a dimension does not divide by leaves that dimension whole.
"""

import re
import sys
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dico_jax.errors import UsageError
from dico_jax.parallel.mesh import AXES

Rule = tuple[str, tuple[str | None, ...]]

# The first of two matrix products in a row is split by its output channels over "tensor", the
# second by its input channels, so that only the second's output is summed over devices. The other
# channels are split over "fsdp".
DEFAULT_RULES: tuple[Rule, ...] = (
    (r"/(conv[14]|ca/1|qkv|fc1|adaLN_modulation/1)/kernel$", ("fsdp", "tensor")),
    (r"/(conv[14]|ca/1|qkv|fc1|adaLN_modulation/1)/bias$", ("tensor",)),
    (r"/(conv[35]|proj|fc2)/kernel$", ("tensor", "fsdp")),
    (r"/conv2/kernel$", (None, None, None, "tensor")),
    (r"/conv2/bias$", ("tensor",)),
    (r"/body/0/kernel$", (None, None, "fsdp", "tensor")),
    (r"embedding_table[^/]*/embedding$", (None, "fsdp")),
    (r"(reduce_chan_level\d|mlp/[02]|linear)/kernel$", ("fsdp", "tensor")),
    (r"out_proj/kernel$", (None, None, "fsdp", None)),
)


def parse_rules(rules: Sequence) -> tuple[Rule, ...]:
    """The rules of `config.mesh.rules`, checked.

    Raises:
      UsageError: something else than (pattern, axes), a pattern that is no regular expression, or
        an axis that the mesh does not have.
    """
    parsed = []
    for rule in rules:
        try:
            pattern, axes = rule
            re.compile(pattern)
            axes = tuple(axes)
        except (TypeError, ValueError, re.error) as error:
            raise UsageError(
                f"mesh.rules: {rule!r} is not (regular expression, axes): {error}"
            ) from error
        used = [axis for axis in axes if axis is not None]
        if not set(used) <= set(AXES) or len(set(used)) < len(used):
            raise UsageError(
                f"mesh.rules: {rule!r} must name each of {', '.join(AXES)} or None, at most once"
            )
        parsed.append((pattern, axes))
    return tuple(parsed)


def partition_spec(
    path: str, shape: tuple[int, ...], mesh: Mesh, rules: Sequence[Rule]
) -> PartitionSpec:
    """How a parameter lies on the mesh.

    Raises:
      UsageError: the rule has another number of axes than the parameter.
    """
    for pattern, axes in rules:
        if re.search(pattern, path):
            if len(axes) > len(shape):
                raise UsageError(
                    f"mesh.rules: {pattern!r} has {len(axes)} axes, but {path} has shape {shape}"
                )
            return PartitionSpec(
                *(
                    axis if axis and mesh.shape[axis] > 1 and not size % mesh.shape[axis] else None
                    for axis, size in zip(axes, shape, strict=False)
                )
            )
    return PartitionSpec()


def state_sharding(state: Any, mesh: Mesh, rules: Sequence[Rule] = DEFAULT_RULES) -> Any:
    """The sharding of every leaf of a state (or of parameters alone).

    Args:
      state: a tree of arrays or ShapeDtypeStructs whose dicts are keyed by the parts of parameter
        paths. What is around these dicts (the optimizer's tuples, say) does not matter.
      mesh: the mesh.
      rules: see the module.

    Returns:
      The same tree with NamedShardings.
    """

    def sharding(path, leaf):
        keys = [str(entry.key) for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        return NamedSharding(mesh, partition_spec("/".join(keys), leaf.shape, mesh, rules))

    return jax.tree_util.tree_map_with_path(sharding, state)


def unmet(params: Any, mesh: Mesh, rules: Sequence[Rule] = ()) -> list[str]:
    """A line for every rule that finds no parameter, and for every parameter that no rule finds.

    Vectors are left out: they are small. Nothing is said where "fsdp" and "tensor" split nothing
    and nobody has given rules.

    Args:
      params: the parameter tree.
      mesh: the mesh.
      rules: those of `config.mesh.rules`; where there are none, `DEFAULT_RULES` are in force, which
        are for all published networks: some of them always find nothing.
    """
    if not rules and mesh.shape["fsdp"] * mesh.shape["tensor"] == 1:
        return []
    leaves = jax.tree_util.tree_leaves_with_path(params)
    shapes = {"/".join(str(entry.key) for entry in path): leaf.shape for path, leaf in leaves}
    lines = [
        f"mesh.rules: {pattern!r} finds no parameter"
        for pattern, _ in rules
        if not any(re.search(pattern, path) for path in shapes)
    ]
    patterns = [pattern for pattern, _ in rules or DEFAULT_RULES]
    return lines + [
        f"mesh.rules: no rule is for {path} {shape}: every device has all of it"
        for path, shape in shapes.items()
        if len(shape) > 1 and not any(re.search(pattern, path) for pattern in patterns)
    ]


def say_unmet(params: Any, mesh: Mesh, rules: Sequence[Rule] = ()) -> None:
    """Prints what `unmet` finds on the main process's stderr."""
    if jax.process_index() == 0:
        for line in unmet(params, mesh, rules):
            print(line, file=sys.stderr)
