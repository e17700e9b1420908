import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dico_jax import create_model
from dico_jax.errors import UsageError
from dico_jax.ops import attention as attention_module
from dico_jax.ops.attention import attention


def operands(dtype, head=8):
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(key, (2, 6, 3, head)).astype(dtype) for key in keys]


def a_gpu(monkeypatch, name="NVIDIA H200", capability=(9, 0)):
    """Lets JAX and `attention` think that there is a GPU."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(attention_module, "_gpu", lambda: (name, capability))
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda version: version <= "9.0")


def lowered_for_cuda(function, *args):
    return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def test_attention_is_the_softmax_of_scaled_products():
    with jax.enable_x64(True):
        q, k, v = (np.asarray(a, np.float64) for a in operands(jnp.float32))
        weights = np.exp(np.einsum("nqhd,nkhd->nhqk", q, k) / np.sqrt(8))
        expected = np.einsum("nhqk,nkhd->nqhd", weights / weights.sum(-1, keepdims=True), v)
        out = jax.jit(attention)(q, k, v)
        np.testing.assert_allclose(out, expected, atol=1e-14)


def test_attention_in_bfloat16_takes_its_softmax_in_float32():
    q, k, v = operands(jnp.bfloat16)
    out = jax.jit(attention)(q, k, v)
    expected = jax.jit(attention)(*(a.astype(jnp.float32) for a in (q, k, v)))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=2e-2)


@pytest.mark.parametrize(
    ("dtype", "head", "message"),
    [
        (jnp.float32, 8, "float16 or bfloat16, not float32"),
        (jnp.bfloat16, 12, "divisible by 8, not 12"),
        (jnp.bfloat16, 136, "up to 128 channels, .* not 136"),
        (jnp.bfloat16, 8, "a GPU, not cpu"),
    ],
)
def test_cudnn_is_refused_where_it_cannot_be(dtype, head, message):
    with pytest.raises(
        UsageError, match=f'model.attention="cudnn" needs .*{message}.*: use "auto"'
    ):
        attention(*operands(dtype, head), implementation="cudnn")
    jax.eval_shape(attention, *operands(dtype, head))  # "auto" takes XLA


@pytest.mark.parametrize(("name", "capability"), [("Tesla V100", (7, 0)), ("AMD MI300X", ())])
def test_cudnn_is_refused_on_other_gpus(monkeypatch, name, capability):
    a_gpu(monkeypatch, name, capability)
    with pytest.raises(UsageError, match=f"NVIDIA GPU of compute capability 8.0.*not {name}"):
        attention(*operands(jnp.bfloat16), implementation="cudnn")


def test_unknown_implementations():
    with pytest.raises(UsageError, match="model.attention='flash' is unknown: use one of auto, xl"):
        create_model("DiT-XL/2", attention="flash")


@pytest.mark.parametrize("gradient", [False, True])
def test_dit_in_bfloat16_takes_cudnn_on_a_gpu(monkeypatch, gradient):
    a_gpu(monkeypatch)

    def kernels(dtype, choice):
        model = create_model(
            "DiT", hidden_size=32, depth=2, num_heads=4, dtype=dtype, attention=choice
        )
        inputs = jnp.zeros((2, 8, 8, 4)), jnp.zeros(2, jnp.int32), jnp.zeros(2, jnp.int32)
        params = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]

        def loss(params):
            return model.apply({"params": params}, *inputs).sum()

        return lowered_for_cuda(jax.grad(loss) if gradient else loss, params).count("__cudnn$fmha")

    # Equal blocks are one function, which has two on the way back: of the pass and its gradient.
    assert kernels("bfloat16", "auto") == kernels("bfloat16", "cudnn") == (2 if gradient else 1)
    assert kernels("bfloat16", "xla") == kernels("float32", "auto") == 0
