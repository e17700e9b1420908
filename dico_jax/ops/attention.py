"""Attention: of positions to each other (arXiv 2212.09748, section 3.2), or to tokens of text."""

import math
from typing import Literal

import jax
import jax.numpy as jnp

from dico_jax.errors import UsageError
from dico_jax.ops.plain import accumulation_dtype, wants_plain

# "xla" is two products with the (N, heads, T, T) weights between them in memory, "cudnn" cuDNN's
# flash attention, which never stores them, and "auto" the second where it can be had.
Implementation = Literal["auto", "xla", "cudnn"]


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mask: jax.Array | None = None,
    implementation: Implementation = "auto",
) -> jax.Array:
    """Softmax of q k / sqrt(head) over the keys, times v: (N, Q, heads, head).

    The queries q are (N, Q, heads, head), keys and values (N, K, heads, head). A `mask`, bool of a
    shape that broadcasts to (N, heads, Q, K), is false where a query is not to look.
    """
    missing = _cudnn_lacks(q.dtype, q.shape[-1])
    if implementation == "cudnn" and missing:
        raise UsageError(f'model.attention="cudnn" needs {missing}: use "auto"')
    if implementation == "xla" or missing or wants_plain():
        return _two_products(q, k, v, mask)
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")


def _cudnn_lacks(dtype, head: int) -> str:
    """What cuDNN's attention needs and does not have, "" where it can be used."""
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"float16 or bfloat16, not {jnp.dtype(dtype)}"
    if head % 8 or head > 128:
        return f"a head of up to 128 channels, divisible by 8, not {head}"
    if jax.default_backend() != "gpu":
        return f"a GPU, not {jax.default_backend()}"
    name, capability = _gpu()
    if not capability or capability < (8, 0):
        return f"an NVIDIA GPU of compute capability 8.0 or later, not {name}"
    return ""


def _gpu() -> tuple[str, tuple[int, ...]]:
    """Name and compute capability of this process's first GPU, () where it is not NVIDIA's."""
    device = jax.local_devices(backend="gpu")[0]
    numbers = str(getattr(device, "compute_capability", "")).split(".")
    return device.device_kind, tuple(map(int, numbers)) if all(map(str.isdigit, numbers)) else ()


def _two_products(q, k, v, mask):
    wide, scaled = accumulation_dtype(q.dtype), q / math.sqrt(q.shape[-1])
    logits = jnp.einsum("nqhd,nkhd->nhqk", scaled, k, preferred_element_type=wide)
    if mask is not None:
        logits = jnp.where(mask, logits, -jnp.inf)
    return jnp.einsum("nhqk,nkhd->nqhd", jax.nn.softmax(logits).astype(v.dtype), v)
