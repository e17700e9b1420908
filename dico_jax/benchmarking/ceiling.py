"""What the devices can do at best: large matrix products, measured."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from dico_jax.benchmarking.timing import Times, measure

# Sides of the square matrices, and products per run, so that starting a run does not count.
_SIZES = {"cpu": (1024, 2048, 4096), "gpu": (4096, 8192, 16384), "tpu": (4096, 8192)}
_PRODUCTS = {"cpu": 1, "gpu": 8, "tpu": 8}


@dataclasses.dataclass(frozen=True)
class Ceiling:
    """The arithmetic that one device has been seen to do while all of them were at work.

    Attributes:
      flops_per_second: of one device, at the best size.
      dtype: of the matrices.
      times: of the runs, by the side of the matrices.
      products: matrix products per run.
    """

    flops_per_second: float
    dtype: str
    times: dict[int, Times]
    products: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON, with units in the names."""
        return {
            "flops_per_second_per_device": self.flops_per_second,
            "dtype": self.dtype,
            "products_per_run": self.products,
            "sizes": [
                {
                    "size": size,
                    "flops_per_second_per_device": _flops(size, self.products) / times.median,
                    **times.to_dict(),
                }
                for size, times in self.times.items()
            ],
        }


def default_sizes(platform: str) -> tuple[int, ...]:
    """Sides of the matrices that are tried on a platform such as "cpu"."""
    return _SIZES.get(platform, _SIZES["gpu"])


def measure_ceiling(
    mesh: Mesh, dtype: str, sizes: Sequence[int] | None = None, seconds: float = 1.0
) -> Ceiling:
    """Times products of square matrices, a product on every device at the same time.

    Products follow one another, each of the result of the one before. The best of the sizes'
    medians counts.

    Args:
      mesh: the devices.
      dtype: of the matrices and of the product; "float32" or "bfloat16".
      sizes: sides of the matrices; those of `default_sizes` if None.
      seconds: at least this long for every size, and at least five runs.
    """
    platform = mesh.devices.flat[0].platform
    sizes = default_sizes(platform) if sizes is None else sizes
    products = _PRODUCTS.get(platform, _PRODUCTS["gpu"])
    # One size after the other: matrices of all sizes at once would only need memory.
    times = {size: _times(mesh, dtype, size, products, seconds) for size in sizes}
    best = max(_flops(size, products) / found.median for size, found in times.items())
    return Ceiling(best, dtype, times, products)


def _flops(size: int, products: int) -> int:
    return 2 * size**3 * products


def _times(mesh: Mesh, dtype: str, size: int, products: int, seconds: float) -> Times:
    split = PartitionSpec(mesh.axis_names)

    def multiply(a, b):
        for _ in range(products):
            a = a @ b
        return a

    def draw(key):
        index = jax.lax.axis_index(mesh.axis_names)
        keys = jax.random.split(jax.random.fold_in(key, index))
        # b keeps the size of numbers: products of products neither overflow nor vanish.
        a, b = (jax.random.normal(k, (size, size)) for k in keys)
        return a.astype(dtype), (b / jnp.sqrt(size)).astype(dtype)

    key = jax.random.key(0, impl="rbg")
    a, b = jax.jit(
        jax.shard_map(draw, mesh=mesh, in_specs=PartitionSpec(), out_specs=(split, split))
    )(key)
    product = jax.jit(jax.shard_map(multiply, mesh=mesh, in_specs=(split, split), out_specs=split))
    run = {"product": lambda: jax.block_until_ready(product(a, b))}
    return measure(run, warmup=1, repeats=5, seconds=seconds)["product"]
