"""DiCo that is told a text: its definition, its start, what sampling computes once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dico_jax.diffusion import SamplingOptions, create_objective
from dico_jax.errors import UsageError
from dico_jax.models import count_parameters, create_model, forward_macs
from dico_jax.models.text_conditional import END_ID, Constants
from dico_jax.models.text_dico import FUSIONS
from dico_jax.sampling.programs import make_latents_fn

SIZES = {"hidden_size": 8, "depth": (1, 1, 2, 1, 1)}
TEXT = {"text_length": 77, "text_width": 12, "pooled_width": 10}
fusions = pytest.mark.parametrize("fusion", FUSIONS)


def make(fusion, **options):
    null = Constants(tokens=np.full((77, 12), 0.5, np.float16), pooled=np.zeros(10, np.float16))
    given = {**SIZES, **TEXT, "text_fusion": fusion, "null_text": null, **options}
    return create_model("TextDiCo", **given)


def random_like(tree, seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: (scale * rng.normal(size=a.shape)).astype(np.float32), tree)


def setup(model, n=2, side=8):
    """Inputs of a network, and parameters of which none are zero."""
    x, _, condition = model.example_inputs(n, side)
    told = condition if "label" in condition else random_like(condition, 2)
    inputs = random_like(x, 0), np.linspace(10, 900, n).astype(np.float32), told
    params = model.init(jax.random.key(0), *inputs)["params"]
    return inputs, jax.tree.map(np.add, params, random_like(params, 1, 0.1))


def apply(model, params, *inputs):
    return np.asarray(jax.jit(lambda p, *i: model.apply({"params": p}, *i))(params, *inputs))


def dense(x, p):
    return x @ p["kernel"] + p["bias"]


def gelu(x):
    from scipy.special import erf

    return x * (1 + erf(x / np.sqrt(2))) / 2


def stated(fusion, x, tokens, of_block, in_block):
    """What a fusion does to x, in NumPy: algorithm 1 of the paper, or attention."""
    if fusion == "dwc":
        kernel = dense(gelu(dense(tokens, of_block["0"])), of_block["2"])
        kernel = np.concatenate([kernel, np.repeat(kernel[:, -1:], 4, 1)], 1)
        kernel = kernel.reshape(len(x), 9, 9, -1)
        padded, y = np.pad(x, ((0, 0), (4, 4), (4, 4), (0, 0))), np.zeros_like(x)
        height, width = x.shape[1:3]
        for i in range(9):
            for j in range(9):
                y += padded[:, i : i + height, j : j + width] * kernel[:, i, j][:, None, None]
        return x + y
    n, height, width, c = x.shape
    q = dense(x.reshape(n, -1, c), in_block["q"])
    k, v = np.split(dense(tokens, of_block["kv"]), 2, axis=-1)
    head, out = np.gcd(32, c), np.zeros_like(q)
    for at in range(0, c, head):
        part = slice(at, at + head)
        scores = q[..., part] @ k[..., part].swapaxes(1, 2) / np.sqrt(head)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[..., part] = weights / weights.sum(-1, keepdims=True) @ v[..., part]
    return x + dense(out, in_block["proj"]).reshape(x.shape)


@fusions
@pytest.mark.parametrize(("dtype", "bar"), [(np.float32, 1e-5), (np.float64, 1e-11)])
def test_fusions_are_what_is_stated(fusion, dtype, bar):
    """Forward, and gradients by differences of the statement."""
    with jax.enable_x64(True):
        rng, width = np.random.default_rng(0), 64
        of_text, of_x = FUSIONS[fusion]
        text, fuse = of_text(width, dtype), of_x(dtype)
        x, tokens = rng.normal(size=(2, 6, 8, width)), rng.normal(size=(2, 77, 12))
        given = text.init_with_output(jax.random.key(0), tokens)[0]
        shapes = (text.init(jax.random.key(0), tokens), fuse.init(jax.random.key(0), x, given))
        trees = [
            jax.tree.map(lambda a: rng.normal(size=a.shape) / np.sqrt(len(a)), s.get("params", {}))
            for s in shapes
        ]

        def run(trees, x, tokens):
            made = text.apply({"params": trees[0]}, tokens)
            return fuse.apply({"params": trees[1]}, x, made)

        args = jax.tree.map(lambda a: jnp.asarray(a, dtype), (trees, x, tokens))
        found, expected = run(*args), stated(fusion, x, tokens, *trees)
        assert found.dtype == dtype
        assert np.abs(found - expected).max() < bar * np.abs(expected).max()

        # The derivative along one direction of everything at once.
        dy = rng.normal(size=x.shape)
        direction = jax.tree.map(lambda a: rng.normal(size=np.shape(a)), (trees, x, tokens))
        gradient = jax.grad(lambda args: (run(*args) * jnp.asarray(dy, dtype)).sum())(args)
        along = sum(
            float((np.float64(g) * d).sum())
            for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True)
        )

        def at(h):
            moved = jax.tree.map(lambda a, d: a + h * d, (trees, x, tokens), direction)
            return (stated(fusion, *moved[1:], *moved[0]) * dy).sum()

        h = 1e-3  # differences of fourth order
        exact = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)
        assert along == pytest.approx(exact, rel=max(bar, 1e-6))


@fusions
def test_it_starts_as_the_class_conditional_network(fusion):
    """With DiCo's parameters, its label tables zero, and its own as they are made."""
    model, plain = make(fusion), create_model("DiCo", **SIZES, num_classes=3)
    (x, t, condition), _ = setup(model)
    own = model.init(jax.random.key(0), x, t, condition)["params"]
    _, params = setup(plain)
    tables = jax.tree.map(np.zeros_like, params["y_embedder"])

    def merged(own, other):
        return {
            k: merged(v, other[k]) if isinstance(v, dict) and k in other else other.get(k, v)
            for k, v in own.items()
        }

    expected = apply(plain, params | {"y_embedder": tables}, x, t, np.zeros(2, np.int32))
    found = apply(model, merged(own, params), x, t, condition)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    assert params.keys() - own.keys() == {"y_embedder"}


@fusions
def test_gradients_reach_every_parameter_of_the_text(fusion):
    """After a step from the start, for a network whose gates and last layer are trained."""
    model = make(fusion)
    inputs, trained = setup(model)
    fresh = model.init(jax.random.key(0), *inputs)["params"]

    def is_text(path):
        return any(name.key.startswith("text") for name in path)

    start = jax.tree_util.tree_map_with_path(
        lambda path, f, t: f if is_text(path) else t, fresh, trained
    )

    @jax.jit
    def gradient(params):
        return jax.grad(lambda p: (model.apply({"params": p}, *inputs) ** 2).mean())(params)

    first = gradient(start)
    moved = jax.tree.map(lambda p, g: p - 1e-2 * np.sign(g), start, first)
    missing = [
        jax.tree_util.keystr(path)
        for path, g in jax.tree_util.tree_leaves_with_path(gradient(moved))
        if is_text(path) and not np.abs(g).max() > 0
    ]
    # A bias of all keys alike changes no weight of attention.
    assert not missing


@fusions
@pytest.mark.parametrize(
    "options", [{"scan_blocks": True}, {"remat": "blocks"}, {"plain_ops": True}]
)
def test_every_way_to_run_it_gives_the_same(fusion, options):
    model = make(fusion)
    (x, t, condition), params = setup(model)
    expected = apply(model, params, x, t, condition)
    other = make(fusion, **options)
    encoded = other.encode_condition(params, condition)
    assert "tokens" not in encoded
    for told in (condition, encoded):
        found = apply(other, params, x, t, told)
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@fusions
def test_sampling_computes_what_follows_from_the_text_once(fusion):
    model = make(fusion, learn_sigma=False)
    (_, _, condition), params = setup(model)
    process = {"objective": "noise", "noise_schedule": "linear", "diffusion_steps": 1000}
    objective = create_objective(process, learn_sigma=False, num_steps=3)
    options = SamplingOptions(0, "ddpm", cfg_scale=2.0)
    latents = make_latents_fn(model, objective, (8, 8, 4), options)
    program = jax.make_jaxpr(latents)(params, np.arange(2), condition)
    of_steps, all_shapes = (set(shapes(program.jaxpr, inside)) for inside in (False, True))
    assert (2, 77, 12) in all_shapes
    assert not {shape for shape in of_steps if shape[1:] == (77, 12)}
    images = jax.jit(latents)(params, np.arange(2), condition)
    assert np.isfinite(images).all()


def shapes(jaxpr, inside):
    """Of all that a program computes; or of what its loops do."""
    for equation in jaxpr.eqns:
        found = inside or equation.primitive.name == "scan"
        if inside:
            yield from (v.aval.shape for v in (*equation.invars, *equation.outvars))
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from shapes(inner, found)


def test_parameters_and_multiply_adds():
    for fusion, parameters, (per_prompt, per_step) in (
        ("dwc", 39_281_928, (0.488, 0.191)),
        ("cross_attention", 45_634_056, (0.681, 1.471)),
    ):
        model = create_model("TextDiCo-S", text_fusion=fusion)
        assert count_parameters(model) == parameters
        found = model.fusion_macs(32 * 32)
        assert [n / 1e9 for n in found] == pytest.approx([per_prompt, per_step], abs=1e-3)
        plain = forward_macs(create_model("DiCo-S"), (32, 32, 4))
        assert forward_macs(model, (32, 32, 4)) - plain == sum(found) + 768 * 7 * 128


def test_wrong_options():
    with pytest.raises(UsageError, match=r"text_fusion='magic' is unknown: use one of dwc, cross"):
        make("magic")
    with pytest.raises(UsageError, match="text_length=100 must be at most 81"):
        make("dwc", text_length=100)
    assert make("dwc", null_text=None).null_condition(2) is None
    assert make("dwc", pooled_width=0).zero_condition(2).keys() == {"tokens"}
    assert hash(make("dwc")) == hash(make("dwc"))
    null = make("dwc").null_condition(3)
    assert {k: v.shape for k, v in null.items()} == {"tokens": (3, 77, 12), "pooled": (3, 10)}


def test_pooled_features_are_of_the_words_alone():
    model = make("dwc", vocab_size=9, pooled_width=TEXT["text_width"])
    encoder, length = model._text_encoder(parent=None), model.text_length
    ids = np.full((3, length), END_ID, np.int32)
    ids[0, :4] = 0, 5, 6, 7
    ids[1, : length - 1] = 4  # as long as it may be
    ids[2, 0] = 0  # no word
    params = random_like(jax.eval_shape(encoder.init, jax.random.key(0), ids)["params"], 5)
    found = encoder.apply({"params": params}, ids)
    for row, count in enumerate((5, length, 2)):  # the first end among them
        mean = np.asarray(found["tokens"])[row, :count].mean(axis=0)
        np.testing.assert_allclose(found["pooled"][row], mean, atol=1e-5)
