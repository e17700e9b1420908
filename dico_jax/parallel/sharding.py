"""How the state of a run lies on the mesh, by rules (pattern, axes).

The first rule whose pattern is in a parameter's path says which axes split it, where it divides.
"""

import contextlib
import re
import sys
from collections.abc import Sequence
from typing import Any

import jax
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dico_jax.configs.default import RULES as DEFAULT_RULES
from dico_jax.errors import UsageError
from dico_jax.parallel.mesh import AXES

Rule = tuple[str, tuple[str | None, ...]]


def parse_rules(rules: Sequence) -> tuple[Rule, ...]:
    parsed = []
    for rule in rules:
        with contextlib.suppress(TypeError, ValueError, re.error):
            pattern, axes = rule
            used = [axis for axis in axes if axis is not None]
            if re.compile(pattern) and set(used) <= set(AXES) and len(set(used)) == len(used):
                parsed.append((pattern, tuple(axes)))
                continue
        needs = f"(regular expression, axes), each of {', '.join(AXES)} at most once, or None"
        raise UsageError(f"mesh.rules: {rule!r} is not {needs}")
    return tuple(parsed)


def partition_spec(path: str, shape: tuple[int, ...], mesh: Mesh, rules: Sequence[Rule]):
    """How a parameter lies on the mesh, a PartitionSpec."""
    pattern, axes = next((rule for rule in rules if re.search(rule[0], path)), ("", ()))
    if len(axes) > len(shape):
        raise UsageError(f"mesh.rules: {pattern!r} has {len(axes)} axes, {path} has shape {shape}")
    sizes, pairs = dict(mesh.shape) | {None: 1}, zip(axes, shape, strict=False)
    return PartitionSpec(*(a if sizes[a] > 1 and n % sizes[a] == 0 else None for a, n in pairs))


def state_sharding(state: Any, mesh: Mesh, rules: Sequence[Rule] = DEFAULT_RULES) -> Any:
    """The NamedSharding of every leaf of a state, or of parameters alone, as the same tree."""

    def sharding(path, leaf):
        keys = [str(entry.key) for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        return NamedSharding(mesh, partition_spec("/".join(keys), leaf.shape, mesh, rules))

    return jax.tree_util.tree_map_with_path(sharding, state)


def say_unmet(params: Any, mesh: Mesh, rules: Sequence[Rule] = ()) -> None:
    """Prints which rules of `config.mesh.rules` find no parameter, and which matrices no rule."""
    if jax.process_index() or not (rules or mesh.shape["fsdp"] * mesh.shape["tensor"] > 1):
        return
    shapes = {path: leaf.shape for path, leaf in flatten_dict(params, sep="/").items()}
    for pattern, _ in rules:
        if not any(re.search(pattern, path) for path in shapes):
            print(f"mesh.rules: {pattern!r} finds no parameter", file=sys.stderr)
    for path, shape in shapes.items():
        if len(shape) > 1 and not any(re.search(p, path) for p, _ in rules or DEFAULT_RULES):
            text = f"no rule is for {path} {shape}: every device has all of it"
            print(f"mesh.rules: {text}", file=sys.stderr)
