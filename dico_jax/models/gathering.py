"""Parameters that devices share, whole where a network uses them.

Every device keeps its part of a parameter and gets the other parts where a module asks for it. So
inside a network the axes "data" and "fsdp" split nothing but the batch, both of them and in this
order, and the partitioner never has to bring two orders of the same devices together. XLA's gets
that wrong in silence (seen with jax 0.10 to 0.12): with x split as (("data", "fsdp"), "tensor") and
a kernel as ("tensor", "fsdp"), x @ kernel split as x is has its rows in the order of ("fsdp",
"data") where the kernel is the larger one, data > 1 and fsdp = tensor > 1.
"""

from typing import Any

import flax.linen as nn
import jax
from flax import struct
from jax.sharding import Mesh, NamedSharding, Sharding

from dico_jax.models.block_stacks import STACK
from dico_jax.models.denoiser import Denoiser
from dico_jax.parallel.mesh import BATCH_AXES


class _Shared(nn.Partitioned):
    """A parameter that lies as `names` says, and comes whole along the batch's axes."""

    dtype: Any = struct.field(default=None, pytree_node=False)  # in which it is used, if known

    def unbox(self, apply_constraint=True):
        value = self.value if self.dtype is None else self.value.astype(self.dtype)
        whole = tuple(None if axis in BATCH_AXES else axis for axis in self.names)
        for names in (self.names, whole):  # the first, so that it travels in the dtype of its use
            value = nn.Partitioned(value, names, self.mesh).unbox()
        return value


def whole_where_used(params: Any, model: Denoiser, sharding: Any) -> Any:
    """Parameters for `model.apply`, each whole along the batch's axes for the module that reads it.

    What "tensor" splits stays split. Nothing is gathered here: blocks that run as one loop get
    theirs inside the loop, one block at a time, and with `remat` once more in the backward pass.
    Gradients with respect to `params` are what they would be without this.

    Args:
      params: a parameter tree, blocks apart or as stacks (`dico_jax.models.block_stacks`).
      model: the network they are for.
      sharding: a tree of their shardings, or one for all of them.

    Returns:
      The same tree with boxes of flax around the parameters that such an axis splits.
    """
    if isinstance(sharding, Sharding):
        sharding = jax.tree.map(lambda _: sharding, params)
    for name in model.stacked_stages:  # one loop over blocks cannot treat them differently
        if STACK not in sharding[name]:
            first = dict.fromkeys(sharding[name], sharding[name]["0"])
            sharding = sharding | {name: first}

    def box(path, leaf, place):
        if not isinstance(place, NamedSharding) or not set(BATCH_AXES) & set(place.spec):
            return leaf
        assert isinstance(place.mesh, Mesh)
        stacked = jax.tree_util.DictKey(STACK) in path  # a module sees one block of it
        axes = tuple(place.spec)[1:] if stacked else tuple(place.spec)
        dtype = model.dtype if path[0].key in model.stages else None
        return _Shared(leaf, axes, place.mesh, dtype)

    return jax.tree_util.tree_map_with_path(box, params, sharding)
