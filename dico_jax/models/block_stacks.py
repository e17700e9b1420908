"""Parameters of equal blocks as one array each, for a loop over the blocks.

Blocks lie apart in parameters as everybody sees them, {"latent": {"0": block, "1": block}}: in
checkpoints, for optimizers of one's own, in sampling. While a run trains with `scan_blocks`, its
state has {"latent": {"stack": blocks}} instead, where every array has a new first axis, so that
neither the network nor the optimizer has an operation per block.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

STACK = "stack"


def map_stacks(function: Callable[..., Any], tree: Any, stages: Sequence[str]) -> Any:
    """Joins the blocks of all parameters in a tree, leaf by leaf.

    Args:
      function: makes one leaf of the leaves of all blocks of a stage.
      tree: anything that has parameter trees inside, such as an optimizer's state.
      stages: names of the subtrees with blocks, see `Denoiser.stages`; none joins nothing.
    """

    def is_parameters(node):
        return isinstance(node, dict) and bool(stages) and set(stages) <= node.keys()

    def joined(node):
        if not is_parameters(node):
            return node
        return {
            name: {STACK: _joined(function, part)} if name in stages else part
            for name, part in node.items()
        }

    return jax.tree.map(joined, tree, is_leaf=is_parameters)


def _joined(function: Callable[..., Any], stage: dict[str, Any]) -> Any:
    return jax.tree.map(function, *(stage[str(i)] for i in range(len(stage))))


def stack_blocks(tree: Any, stages: Sequence[str], consume: bool = False) -> Any:
    """A tree of arrays whose blocks lie apart, as one with stacks.

    Args:
      tree, stages: see `map_stacks`.
      consume: delete the arrays that are stacked, one after the other, to save their memory.
    """

    def stack(*leaves):
        stacked = _stack_as(_stacked_sharding(leaves[0].sharding))(*leaves)
        for leaf in leaves if consume else ():
            leaf.delete()
        return stacked

    return map_stacks(stack, tree, stages)


def stack_shardings(tree: Any, stages: Sequence[str]) -> Any:
    """The shardings of a tree with stacks: every block lies on the devices as the first one did."""
    return map_stacks(lambda first, *_: _stacked_sharding(first), tree, stages)


def unstack_blocks(tree: Any) -> Any:
    """A tree of arrays with stacks, as one whose blocks lie apart."""

    def is_stack(node):
        return isinstance(node, dict) and node.keys() == {STACK}

    def apart(node):
        if not is_stack(node):
            return node
        leaves, structure = jax.tree.flatten(node[STACK])
        blocks = zip(*map(_unstack, leaves), strict=True)
        return {str(i): jax.tree.unflatten(structure, b) for i, b in enumerate(blocks)}

    return jax.tree.map(apart, tree, is_leaf=is_stack)


def _unstack(leaf: jax.Array) -> tuple[jax.Array, ...]:
    return _unstack_as(_block_sharding(leaf.sharding))(leaf)


# One small program for every shape and sharding, instead of a large one for all parameters.


@functools.lru_cache
def _stack_as(sharding: Any) -> Callable[..., jax.Array]:
    return jax.jit(lambda *leaves: jnp.stack(leaves), out_shardings=sharding)


@functools.lru_cache
def _unstack_as(sharding: Any) -> Callable[[jax.Array], tuple[jax.Array, ...]]:
    return jax.jit(jnp.unstack, out_shardings=sharding)


def _stacked_sharding(sharding: Any) -> Any:
    if not isinstance(sharding, NamedSharding):  # a single device
        return sharding
    return NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))


def _block_sharding(sharding: Any) -> Any:
    if not isinstance(sharding, NamedSharding):
        return sharding
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
