"""Dense 3x3 convolution with 16 multiplications for 4 results, not 36: Winograd's F(2x2, 3x3).

A tile of 2x2 results needs 4x4 inputs. With the matrices of Lavin and Gray (arXiv 1509.09308,
section 4.1) it is A' [(G g G') * (B' d B)] A, for kernel g and inputs d; the product * of all tiles
and channels is 16 matrix products. The matrices have no entry but 0, 1, -1 and 1/2, so that little
is lost: in float32 results differ from those of a sum of 9 products by 1e-6 of their peak.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dico_jax.ops.apart import apart
from dico_jax.ops.direct import direct_kernel_gradient, zero_padded

# The matrices of inputs, kernels and results; for gradients, their transposes.
_INPUT = np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]])
_KERNEL = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
_RESULT = np.array([[1, 1, 1, 0], [0, 1, -1, -1]])
# The rows of _KERNEL for a kernel turned round: the first and the last change places.
_TURNED = [4 * a + b for a in (3, 1, 2, 0) for b in (3, 1, 2, 0)]


def pays(x: jax.Array, kernel: jax.Array) -> bool:
    """Whether this is the faster way on CPU for x (N, H, W, C) and kernel (3, 3, C, D)."""
    n, height, width, _ = x.shape
    even = height % 2 == 0 and width % 2 == 0
    # Fewer positions do not outweigh the change of the kernel, fewer channels that of x.
    large = n * height * width >= 512 and min(kernel.shape[2:]) >= 64
    return even and large and jnp.finfo(x.dtype).bits >= 32


@jax.custom_vjp
def conv3x3(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """3x3 convolution with zero padding 1 and stride 1.

    Args:
      x: (N, H, W, C) activations, H and W even, float32 or better.
      kernel: (3, 3, C, D), dtype of x.

    Returns:
      (N, H, W, D) of x's dtype.
    """
    return _forward(x, kernel)[0]


def _forward(x, kernel):
    kernels = apart(_of_kernel, kernel)
    products = [v @ u for v, u in zip(_inputs(x), kernels, strict=True)]
    return _joined(apart(_of_products, *products)), (x, kernel, kernels)


def _backward(residuals, dy):
    x, kernel, kernels = residuals
    turned = [kernels[k] for k in _TURNED]
    tiles = dy.size // (4 * dy.shape[-1])
    gradient = _few_tiles_gradient if tiles <= dy.shape[-1] else _input_gradient
    return gradient(dy, turned), _kernel_gradient(x, kernel, dy)


conv3x3.defvjp(_forward, _backward)


def _transformed(matrix, parts):
    """Matrix @ parts @ matrix.T of arrays parts[i][j], as a tuple, row by row."""
    places = range(len(parts))

    def combined(row, column):
        terms = [
            (float(row[i] * column[j]), parts[i][j])
            for i in places
            for j in places
            if row[i] * column[j]
        ]
        total = terms[0][0] * terms[0][1]
        for factor, part in terms[1:]:
            total = total + factor * part
        return total

    return tuple(combined(row, column) for row in matrix for column in matrix)


def _square(arrays):
    side = round(len(arrays) ** 0.5)
    return [arrays[k : k + side] for k in range(0, len(arrays), side)]


def _of_kernel(kernel):
    return _transformed(_KERNEL, kernel)


def _of_products(*products):
    return _transformed(_RESULT, _square(products))


def _inputs(x):
    """The 4x4 inputs of every tile, transformed: 16 times (N, H/2, W/2, C)."""
    _, height, width, _ = x.shape

    def of_inputs(padded):
        parts = [
            [padded[:, i : i + height : 2, j : j + width : 2] for j in range(4)] for i in range(4)
        ]
        return _transformed(_INPUT, parts)

    return apart(of_inputs, zero_padded(x))


def _joined(quarters):
    """Results (N, H/2, W/2, D) of the four places in a tile, row by row, as (N, H, W, D)."""
    n, h, w, d = quarters[0].shape
    y = jnp.stack(quarters, axis=3).reshape(n, h, w, 2, 2, d)
    return y.transpose(0, 1, 3, 2, 4, 5).reshape(n, 2 * h, 2 * w, d)


def _input_gradient(dy, kernels):
    products = [
        lax.dot_general(v, u, (((3,), (1,)), ((), ())))
        for v, u in zip(_inputs(dy), kernels, strict=True)
    ]
    return _joined(apart(_of_products, *products))


def _few_tiles_gradient(dy, kernels):
    """The same where bringing dy and the results into another order costs less than kernels."""

    def products(*operands):
        return tuple(
            lax.dot_general(u, v, (((1,), (3,)), ((), ())))
            for u, v in zip(operands[:16], operands[16:], strict=True)
        )

    quarters = apart(_of_products, *apart(products, *kernels, *_inputs(dy)))
    return _joined([jnp.moveaxis(quarter, 0, -1) for quarter in quarters])


def _kernel_gradient(x, kernel, dy):
    tiles, channels = x.size // (4 * x.shape[-1]), min(kernel.shape[2:])
    if tiles < channels or channels < 128:  # 16 results would be larger, or change too much
        return direct_kernel_gradient(x, kernel, dy)

    def of_results(dy):
        return _transformed(_RESULT.T, [[dy[:, i::2, j::2] for j in range(2)] for i in range(2)])

    def product(v, w):
        v, w = v.reshape(-1, v.shape[-1]), w.reshape(-1, w.shape[-1])
        return lax.dot_general(v, w, (((0,), (0,)), ((), ())))

    def of_sums(*sums):
        return jnp.stack(_transformed(_KERNEL.T, _square(sums))).reshape(kernel.shape)

    sums = [product(v, w) for v, w in zip(_inputs(x), apart(of_results, dy), strict=True)]
    return apart(of_sums, *sums)
