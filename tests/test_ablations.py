"""The papers' ablations: their counts, their modules against NumPy, and what does not compose."""

import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from dico_jax.configs import ablation_cifar10, ablation_digits, ablation_s256, default
from dico_jax.diffusion import create_diffusion, sample_loop
from dico_jax.errors import UsageError
from dico_jax.experiment import experiment_from_config, model_from_config
from dico_jax.models import abstract_params, count_parameters, create_model, forward_macs
from dico_jax.models.fcdm import FCDMBlock
from dico_jax.models.mixers import (
    Attention,
    ChannelSelfAttention,
    ResponseNorm,
    SqueezeExcite,
    attend,
    num_skips,
)
from dico_jax.parallel.sharding import DEFAULT_RULES
from dico_jax.planning import estimates, roofline
from dico_jax.pytorch.conversion import load_pytorch
from dico_jax.training.step import loss_fn
from tests.commands import call

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Tables 4 and 5: parameters (M), multiply-adds (G), FID and IS at 400K steps without guidance.
# Those of windows are not known to us: DiCo-S's.
PAPER = {
    "dit_isotropic": ("32.9", "6.06", "67.16", "20.41"),
    "dit_isotropic_skip": ("34.3", "6.44", "62.63", "22.08"),
    "dit_u": ("33.0", "4.23", "54.00", "28.52"),
    "dico_isotropic": ("33.7", "5.67", "60.58", "25.44"),
    "dico_isotropic_skip": ("35.1", "6.04", "56.95", "26.84"),
    "dico_u": ("33.1", "4.25", "49.97", "31.38"),
    "relu": ("33.1", "4.25", "51.26", "30.23"),
    "kernel_5": ("33.2", "4.29", "48.03", "32.51"),
    "kernel_7": ("33.4", "4.34", "47.49", "32.93"),
    "no_channel_attention": ("33.0", "4.24", "54.78", "28.40"),
    "squeeze_excite": ("32.9", "4.25", "50.89", "30.49"),
    "channel_self_attention": ("33.2", "4.26", "50.24", "30.85"),
    "window_attention": ("", "", "53.23", ""),
}
U = {"hidden_size": 8, "depth": (1, 1, 1, 1, 1), "num_classes": 3, "in_channels": 1}
ISO = {"hidden_size": 16, "depth": 3, "patch_size": 2, "num_classes": 3, "in_channels": 1}
DIT = ISO | {"num_heads": 2}
BLOCK = ISO | {"layout": "isotropic", "depth": 1, "mlp_ratio": 2.0}
# One of each kind, tiny.
KINDS = {
    "none": ("DiCo", BLOCK | {"channel_attention": "none", "activation": "relu"}),
    "squeeze_excite": (
        "DiCo",
        BLOCK | {"channel_attention": "squeeze_excite", "kernel_size": 5, "hidden_size": 64},
    ),
    "self_attention": ("DiCo", BLOCK | {"channel_attention": "self_attention"}),
    "response_norm": ("DiCo", BLOCK | {"channel_attention": "response_norm", "kernel_size": 7}),
    "attention": ("DiCo", U | {"mixer": "attention"}),
    "window_attention": ("DiCo", U | {"mixer": "window_attention", "window_size": 2}),
    "isotropic_skip": ("DiCo", BLOCK | {"layout": "isotropic_skip", "depth": 3}),
    "dit_skip": ("DiT", DIT | {"layout": "isotropic_skip", "activation": "relu"}),
    "dit_windows": ("DiT", DIT | {"mixer": "window_attention", "window_size": 2, "depth": 1}),
    "fcdm": ("FCDM", U | {"channel_attention": "compact", "kernel_size": 5}),
}


def kind(name, **options):
    family, own = KINDS[name]
    return create_model(family, **{**own, **options})


def row(name):
    return model_from_config(ablation_s256.get_config(name))


@functools.cache
def counts(name):
    model = row(name)
    return count_parameters(model), forward_macs(model, (32, 32, 4))


def drawn(tree, seed=0, scale=0.3):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: rng.normal(scale=scale, size=a.shape).astype(np.float32), tree)


@pytest.mark.parametrize("name", PAPER)
def test_rows_have_the_papers_counts(name):
    parameters, macs, *_ = PAPER[name]
    found = counts(name)
    assert found[0] == pytest.approx(float(parameters or "33.1") * 1e6, rel=0.01)
    assert found[1] == pytest.approx(float(macs or "4.25") * 1e9, rel=0.01)


def test_every_row_is_documented():
    assert list(ablation_s256.ROWS) == list(PAPER)
    text = (ROOT / "docs" / "ablations.md").read_text()
    for name, (parameters, macs, fid, score) in PAPER.items():
        ours = counts(name)
        cells = f"{ours[0] / 1e6:.2f}", parameters, f"{ours[1] / 1e9:.3f}", macs, fid, score
        line = " *\\| *".join(re.escape(cell) for cell in cells)
        assert re.search(rf"`{name}`[^|]*\| *{line} *\|", text), (name, cells)


@pytest.mark.parametrize(("sweep", "side"), [(ablation_digits, 8), (ablation_cifar10, 32)])
def test_sweeps_compare_channel_attention_at_equal_cost(sweep, side):
    found = []
    for name in ("compact", "squeeze_excite", "none"):
        config = sweep.get_config()
        with config.ignore_type():
            config.update_from_flattened_dict(sweep.get_sweep()["variants"][name])
        model = model_from_config(config)
        macs = forward_macs(model, (side, side, config.model.in_channels))
        found.append((count_parameters(model), macs))
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=0.04)


def test_fcdm_has_the_papers_multiply_adds():
    model = create_model("FCDM-XL")
    assert forward_macs(model, (32, 32, 4)) == pytest.approx(64.6e9, rel=0.002)
    assert count_parameters(model) == 698_754_056


def test_blocks_of_fcdm_are_identities_at_first():
    x, c = features(1, 4, 4, 8), features(1, 8)
    block = FCDMBlock(8, 3.0, jnp.dtype("float32"), kernel_size=3)
    out, variables = jax.jit(block.init_with_output)(jax.random.key(0), x, c)
    np.testing.assert_array_equal(out, x)
    assert not np.any(variables["params"]["grn"]["gamma"])
    assert np.any(variables["params"]["pwconv2"]["kernel"])


def test_isotropic_layouts_are_names_of_one_network():
    own = ISO | {"mlp_ratio": 2.0}
    assert create_model("DiCo", layout="isotropic", **own) == create_model("IsoDiCo", **own)
    assert create_model("DiCo", layout="u", **U) == create_model("DiCo", **U)


# Modules against NumPy.


def softmax(a):
    e = np.exp(a - a.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def applied(module, x, scale=0.1):
    """The result of a module with drawn parameters, and these, in float64."""
    params = drawn(jax.eval_shape(module.init, jax.random.key(0), x)["params"], scale=scale)
    wide = jax.tree.map(lambda a: a.astype(np.float64), params)
    return np.asarray(module.apply({"params": params}, x)), wide


def features(*shape):
    return np.random.default_rng(7).normal(size=shape).astype(np.float32)


def test_squeeze_excite_is_its_formula():
    mean = features(3, 64)
    found, p = applied(SqueezeExcite(jnp.float32), mean)
    assert p["1"]["kernel"].shape == (64, 4)
    few = np.maximum(mean @ p["1"]["kernel"] + p["1"]["bias"], 0)
    gates = 1 / (1 + np.exp(-(few @ p["3"]["kernel"] + p["3"]["bias"])))
    np.testing.assert_allclose(found, gates, atol=1e-5)


def test_response_norm_is_its_formula_and_differentiable_where_channels_are_dead():
    x = features(2, 4, 6, 8)
    x[..., 3] = 0
    module = ResponseNorm(jnp.float32)
    found, p = applied(module, x)
    norm = np.sqrt((x.astype(np.float64) ** 2).sum((1, 2), keepdims=True))
    share = norm / (norm.mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(found, p["gamma"] * (x * share) + p["beta"] + x, atol=1e-5)
    slope = jax.grad(lambda x: module.apply({"params": p}, x).sum())(x)
    assert np.isfinite(slope).all()


def test_channel_self_attention_is_its_formula():
    x = features(2, 3, 5, 64)
    found, p = applied(ChannelSelfAttention(jnp.float32), x)
    flat = x.reshape(2, 15, 64)
    q, k, v = np.split(flat @ p["qkv"]["kernel"] + p["qkv"]["bias"], 3, axis=-1)
    expected = np.zeros_like(v)
    assert p["temperature"].shape == (2,)
    for head in range(2):
        part = slice(32 * head, 32 * head + 32)
        a, b = (m[..., part] / np.linalg.norm(m[..., part], axis=1, keepdims=True) for m in (q, k))
        weights = softmax(np.einsum("ntc,ntd->ncd", a, b) * p["temperature"][head])
        expected[..., part] = np.einsum("ncd,ntd->ntc", weights, v[..., part])
    np.testing.assert_allclose(found, expected.reshape(x.shape), atol=1e-5)


@pytest.mark.parametrize("window", [0, 2])
def test_attention_of_windows_is_its_formula(window):
    x = features(2, 4, 6, 64)
    module = Attention(0, jnp.float32)
    _, p = applied(module, x.reshape(2, 24, 64))
    found = attend(lambda x: module.apply({"params": p}, x), jnp.asarray(x), window)
    expected = np.zeros(x.shape)
    rows, columns = (window, window) if window else (4, 6)
    for top in range(0, 4, rows):
        for left in range(0, 6, columns):
            at = np.s_[:, top : top + rows, left : left + columns]
            tokens = x[at].reshape(2, -1, 64)
            q, k, v = np.split(tokens @ p["qkv"]["kernel"] + p["qkv"]["bias"], 3, axis=-1)
            heads = []
            for part in (slice(0, 32), slice(32, 64)):
                logits = np.einsum("nqc,nkc->nqk", q[..., part], k[..., part]) / np.sqrt(32)
                heads.append(softmax(logits) @ v[..., part])
            out = np.concatenate(heads, -1) @ p["proj"]["kernel"] + p["proj"]["bias"]
            expected[at] = out.reshape(expected[at].shape)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_skips_that_pass_x_alone_leave_the_network_without_skips():
    name = "dit_skip"
    joined, plain = kind(name, depth=5), kind(name, depth=5, layout="isotropic")
    params = drawn(abstract_params(joined))
    own = {k: v for k, v in params.items() if not k.startswith("skip_linear_")}
    assert jax.tree.structure(own) == jax.tree.structure(abstract_params(plain))
    assert len(params) - len(own) == num_skips(5) == 2

    def output(model, params):
        x, t, y = features(2, 4, 4, 1), np.array([3, 800]), np.array([0, 2])
        return np.asarray(jax.jit(model.apply)({"params": params}, x, t, y))

    for of_x, of_skip in ((1, 0), (0, 1)):
        join = {
            "kernel": np.concatenate([of_x * np.eye(16), of_skip * np.eye(16)]).astype(np.float32),
            "bias": np.zeros(16, np.float32),
        }
        found = output(joined, own | {f"skip_linear_{i}": join for i in range(2)})
        if of_x:
            np.testing.assert_allclose(found, output(plain, own), atol=2e-5)
        else:  # before block 4 what block 0 gave: of the others nothing is left
            ends = own | {"blocks": {"0": own["blocks"]["0"], "1": own["blocks"]["4"]}}
            np.testing.assert_allclose(
                found, output(kind(name, depth=2, layout="isotropic"), ends), atol=2e-5
            )


# Every kind in use.


# Of the attentions in a U, which are slow to compile, windows stand for both.
@pytest.mark.parametrize(
    "name", [pytest.param(k, marks=[pytest.mark.slow] * (k == "attention")) for k in KINDS]
)
def test_every_kind_trains_and_samples(name):
    model = kind(name)
    diffusion = create_diffusion(timestep_respacing="2")
    tx = optax.adam(1e-3)
    x, y = jnp.asarray(features(2, 8, 8, 1)), np.array([0, 2])
    t, noise = np.array([5, 900]), jnp.asarray(features(2, 8, 8, 1))[::-1]
    params = jax.tree.map(lambda a: 0.1 * a, drawn(abstract_params(model), scale=1.0))
    full = create_diffusion()

    @jax.jit
    def step(params, state):
        batch = {"x": x, "condition": {"label": y}}
        (loss, _), slopes = jax.value_and_grad(loss_fn, has_aux=True)(
            params, model, full, batch, t, noise
        )
        updates, state = tx.update(slopes, state)
        return loss, slopes, optax.apply_updates(params, updates), state

    state, losses = tx.init(params), []
    for _ in range(2):
        loss, slopes, params, state = step(params, state)
        losses.append(loss)
    assert np.isfinite(losses).all()
    assert losses[0] != losses[1]
    still = [path for path, g in flatten_dict(slopes, sep="/").items() if not np.any(g)]
    assert not [path for path in still if "embedding" not in path]

    def model_fn(x, t):
        return model.apply({"params": params}, x, t, y)

    images = jax.jit(
        lambda x: sample_loop(diffusion, model_fn, x, lambda i: jnp.ones_like(x), sampler="ddpm")
    )(noise)
    assert images.shape == (2, 8, 8, 1)
    assert np.isfinite(images).all()


@pytest.mark.parametrize("name", [k for k in KINDS if "skip" not in k])
def test_kinds_run_as_loops_with_the_same_numbers(name):
    params = drawn(abstract_params(kind(name)), scale=0.1)
    x, t, y = features(1, 8, 8, 1), np.array([500]), np.array([1])
    out, looped = (
        jax.eval_shape(kind(name, scan_blocks=loops).apply, {"params": params}, x, t, y)
        for loops in (False, True)
    )
    assert out == looped


@pytest.mark.parametrize("name", KINDS)
def test_rules_and_plans_know_every_kind(name):
    model = kind(name)
    paths = flatten_dict(abstract_params(model), sep="/").items()
    for path, leaf in paths:
        if len(leaf.shape) > 1 and not path.startswith("x_embedder"):
            axes = next((axes for pattern, axes in DEFAULT_RULES if re.search(pattern, path)), None)
            assert axes is not None, path
            assert len(axes) <= len(leaf.shape), path
    kept = 1.0
    if KINDS[name][1]["hidden_size"] > 8:  # a U is slow to trace
        kept = sum(estimates.kept_activations(model, (8, 8, 1)).values())
    assert kept > 0
    stages = roofline.stages_of(model, 8, 100, kept)
    assert [stage.macs for stage in stages] == [
        100
    ]  # of the published networks alone more is known


# What makes no sense.

WRONG = [
    ({"kernel_size": 4}, "config.model.kernel_size=4: use 3 or 5 or 7"),
    ({"channel_attention": "cca"}, "config.model.channel_attention='cca': use 'compact' or "),
    ({"activation": "tanh"}, "config.model.activation='tanh': use 'gelu' or 'relu'"),
    ({"mixer": "mlp"}, "config.model.mixer='mlp': use 'conv' or 'attention' or 'window_attention'"),
    ({"layout": "v"}, "config.model.layout='v': use 'u' or 'isotropic' or 'isotropic_skip'"),
    (
        {"mixer": "attention", "kernel_size": 5},
        "config.model.kernel_size=5 has no effect with model.mixer='attention': leave it unset",
    ),
    (
        {"mixer": "window_attention", "channel_attention": "none"},
        "config.model.channel_attention='none' has no effect with model.mixer='window_attention'",
    ),
    ({"window_size": 4}, "config.model.window_size=4 has no effect with model.mixer='conv'"),
    ({"attention": "xla"}, "config.model.attention='xla' has no effect with model.mixer='conv'"),
    (
        {"mixer": "window_attention", "window_size": 5},
        r"config.data.image_size=256 must be a multiple of 160 \(.* divide by 20, 4 times "
        r"model.window_size=5\): use 160 or 320",
    ),
    ({"layout": "isotropic"}, "config.model.layout='isotropic' is not that of model.name='DiCo-S'"),
    (
        {"name": "DiCo", "layout": "isotropic", "mixer": "attention"},
        "config.model.mixer='attention': model 'DiCo' of layout 'isotropic' has no such option",
    ),
    (
        {"name": "DiT-S/2", "channel_attention": "none"},
        "config.model.channel_attention='none': model 'DiT-S/2' has no such option",
    ),
    ({"name": "DiT-S/2", "kernel_size": 5}, "config.model.kernel_size=5: model 'DiT-S/2' has no"),
    ({"name": "DiT-S/2", "layout": "u"}, "config.model.layout='u' is DiCo's: use .*mixer='atten"),
    ({"name": "DiT-S/2", "mixer": "conv"}, "config.model.mixer='conv' is DiCo's: use model.name="),
    ({"name": "DiT-S/2", "window_size": 2}, "window_size=2 has no effect with model.mixer='atten"),
    (
        {"name": "DiT-S/2", "mixer": "window_attention", "window_size": 3},
        r"config.data.image_size=256 must be a multiple of 48 .* 2 times model.window_size=3\)",
    ),
    (
        {"name": "DiT-S/2", "layout": "isotropic_skip", "scan_blocks": True},
        "config.model.scan_blocks=True is for equal blocks, not those of model.layout=",
    ),
    ({"name": "FCDM-S", "mixer": "attention"}, "model.mixer='attention': model 'FCDM-S' has no"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG)
def test_what_makes_no_sense_is_refused_by_name(fields, message):
    config = default.get_config()
    config.model.update(fields)
    with pytest.raises(UsageError, match=message) as error:
        experiment_from_config(config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 4}, "model.kernel_size=4 is unknown: use one of 3, 5, 7"),
        ({"mixer": "none"}, "model.mixer='none' is unknown: use one of conv, attention"),
        ({"layout": "v"}, "model.layout='v' is unknown: use one of u, isotropic"),
    ],
)
def test_unknown_values_are_refused_without_a_config(options, message):
    with pytest.raises(UsageError, match=message):
        create_model("DiCo", **U, **options)


def test_inputs_that_windows_do_not_divide_are_refused():
    model = kind("window_attention")
    with pytest.raises(UsageError, match="multiples of 8, 4 times model.window_size=2"):
        forward_macs(model, (12, 12, 1))


def test_an_unknown_row_is_refused_in_one_line():
    done = call("dico_jax.plan", "--config=ablation_s256:kernel_9", "--topology=v5e:1x1")
    assert done.returncode == 2
    assert re.search(
        "--config=ablation_s256:kernel_9 is no row: use dit_iso.*kernel_7", done.stderr
    )
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("none", "channel_attention='none'"),
        ("squeeze_excite", "channel_attention='squeeze_excite'"),
        ("attention", "mixer='attention'"),
        ("isotropic_skip", "layout='isotropic_skip'"),
        ("dit_windows", "mixer='window_attention'"),
        ("fcdm", "channel_attention='compact'"),
        (create_model("FCDM-S"), "name='FCDM'"),
        (create_model("DiCo", **BLOCK), "layout='isotropic'"),
    ],
)
def test_weights_of_what_nobody_has_published_are_refused(name, field):
    with pytest.raises(UsageError, match=f"^model.{field} cannot be converted: no PyTorch code"):
        load_pytorch("nowhere.pt", kind(name) if isinstance(name, str) else name)
