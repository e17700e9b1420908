"""Equal blocks, one by one or as one loop, and how their parameters lie and come to them.

Blocks lie apart in parameters as everybody sees them, {"latent": {"0": block, "1": block}}. While a
run trains with `scan_blocks`, its state has {"latent": {"stack": blocks}} instead, where every
array has a new first axis, so that neither network nor optimizer has an operation per block.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from dico_jax.parallel.mesh import BATCH_AXES

STACK = "stack"

# Of each block the backward pass computes again: nothing, everything, or all but matrix products.
# Products of two activations (attention) are computed again too: their results are the largest.
REMAT_POLICIES = {
    "none": jax.checkpoint_policies.everything_saveable,
    "blocks": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Stage(nn.Module):
    """`depth` equal blocks one after the other, named "0", "1", ..., made by `block(name=...)`.

    A block maps (x, c) to the next x, and has nothing but parameters, which it uses in `dtype`; c
    is a tree of arrays. Where `own` is given, a tree for each block, it maps (x, c, that tree).
    X passes `enter`, if it is given, before each block, and then blocks run one by one.
    With `scan` one `jax.lax.scan` runs all, and stacked parameters are taken, too. What blocks
    compute inside can be captured only with `scan` off and `remat` "none".
    """

    depth: int
    block: Callable[..., nn.Module]
    dtype: jnp.dtype
    scan: bool = False
    remat: str = "none"

    @nn.compact
    def __call__(self, x, c, own=None, enter=lambda x: x):
        names = [str(i) for i in range(self.depth)]
        owns = [()] * self.depth if own is None else [(tree,) for tree in own]
        captured = self.is_mutable_collection("intermediates")
        if self.is_initializing() or (captured and not self.scan and self.remat == "none"):
            for name, more in zip(names, owns, strict=True):
                x = self.block(name=name)(enter(x), c, *more)
            return x
        params, run = self.variables["params"], self._pure_block()
        if self.scan:
            each = self._stacked(params, names), jax.tree.map(lambda *a: jnp.stack(a), *owns)
            return jax.lax.scan(lambda x, e: (run(e[0], x, c, *e[1]), None), x, each)[0]
        run = jax.jit(run)  # traced once for all of them
        for name, more in zip(names, owns, strict=True):
            x = run(params[name], enter(x), c, *more)
        return x

    def _stacked(self, params, names):
        """The parameters of all blocks, cast first, so that what is copied is small."""
        if STACK in params:
            return jax.tree.map(lambda leaf: leaf.astype(self.dtype), params[STACK])
        blocks = (params[name] for name in names)
        return jax.tree.map(lambda *b: jnp.stack([x.astype(self.dtype) for x in b]), *blocks)

    def _pure_block(self):
        def run(params, *args):
            return self.block(parent=None).apply({"params": params}, *args)

        if self.remat == "none":
            return run
        # A scan keeps the two passes apart by itself: barriers against merging them only cost.
        policy = REMAT_POLICIES[self.remat]
        return jax.checkpoint(run, policy=policy, prevent_cse=not self.scan)


def map_stacks(function: Callable[..., Any], tree: Any, stages: Sequence[str]) -> Any:
    """A tree with parameters inside, such as a state, its blocks joined leaf by leaf."""

    def is_parameters(node):
        return isinstance(node, dict) and bool(stages) and set(stages) <= node.keys()

    def joined(stage):
        return {STACK: jax.tree.map(function, *(stage[str(i)] for i in range(len(stage))))}

    def join_all(node):
        if not is_parameters(node):
            return node
        return {name: joined(part) if name in stages else part for name, part in node.items()}

    return jax.tree.map(join_all, tree, is_leaf=is_parameters)


def stack_blocks(tree: Any, stages: Sequence[str], consume: bool = False) -> Any:
    """Blocks that lie apart as stacks; with `consume` each array is deleted once it is stacked."""

    def stack(*leaves):
        stacked = jax.jit(_stack, out_shardings=_of_stack(leaves[0].sharding))(*leaves)
        for leaf in leaves if consume else ():
            leaf.delete()
        return stacked

    return map_stacks(stack, tree, stages)


def stack_shardings(tree: Any, stages: Sequence[str]) -> Any:
    """The shardings of a tree with stacks: every block lies on the devices as the first one did."""
    return map_stacks(lambda first, *_: _of_stack(first), tree, stages)


def unstack_blocks(tree: Any) -> Any:
    def is_stack(node):
        return isinstance(node, dict) and node.keys() == {STACK}

    def apart(node):
        if not is_stack(node):
            return node
        leaves, structure = jax.tree.flatten(node[STACK])
        blocks = zip(*map(_unstacked, leaves), strict=True)
        return {str(i): jax.tree.unflatten(structure, b) for i, b in enumerate(blocks)}

    return jax.tree.map(apart, tree, is_leaf=is_stack)


def _stack(*leaves):
    # A small program for every shape and sharding, which JAX keeps, not a large one for all.
    return jnp.stack(leaves)


def _unstacked(leaf):
    return jax.jit(jnp.unstack, out_shardings=_with_axes(leaf.sharding, lambda a: a[1:]))(leaf)


def _of_stack(place):
    return _with_axes(place, lambda axes: (None, *axes))


def _with_axes(place, change):
    known = isinstance(place, NamedSharding)  # else a single device
    return NamedSharding(place.mesh, PartitionSpec(*change(place.spec))) if known else place


class _Shared(nn.Partitioned):
    """A parameter that lies as `names` says, and comes whole along the batch's axes."""

    dtype: Any = struct.field(default=None, pytree_node=False)  # in which it is used, if known

    def unbox(self, apply_constraint=True):
        value = self.value if self.dtype is None else self.value.astype(self.dtype)
        whole = tuple(None if axis in BATCH_AXES else axis for axis in self.names)
        for names in (self.names, whole):  # the first, so that it travels in the dtype of its use
            value = nn.Partitioned(value, names, self.mesh).unbox()
        return value


def whole_where_used(params: Any, model: Any, sharding: Any) -> Any:
    """Parameters for `model.apply`, each whole along the batch's axes for the module that reads it.

    A loop over blocks gets one block at a time. What "tensor" splits stays so, as do gradients.
    Blocks lie apart or as stacks; `sharding` is a tree like `params`, or one for all of them. XLA's
    partitioner would bring two orders of devices together wrongly (docs/architecture.md).
    """
    if isinstance(sharding, Sharding):
        sharding = jax.tree.map(lambda _: sharding, params)
    for name in model.stacked_stages:  # one loop over blocks cannot treat them differently
        if STACK not in sharding[name]:
            sharding = sharding | {name: dict.fromkeys(sharding[name], sharding[name]["0"])}

    def box(path, leaf, place):
        if not isinstance(place, NamedSharding) or not set(BATCH_AXES) & set(place.spec):
            return leaf
        stacked = jax.tree_util.DictKey(STACK) in path  # a module sees one block of it
        axes = tuple(place.spec)[1:] if stacked else tuple(place.spec)
        dtype = model.dtype if path[0].key in model.stages else None
        return _Shared(leaf, axes, cast(Mesh, place.mesh), dtype)

    return jax.tree_util.tree_map_with_path(box, params, sharding)
