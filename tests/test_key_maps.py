"""Names, layouts and order of parameters against the published state dicts."""

import json
import re
import time

import flax
import jax
import numpy as np
import pytest

from dico_jax.errors import UsageError
from dico_jax.models import abstract_params, create_model
from dico_jax.pytorch.key_maps import KEY_MAPS, KeyMap, check_tensors, entries, known_names
from dico_jax.pytorch.torch_files import open_tensors
from tests import golden
from tests.pytorch_files import assert_same
from tests.state_dicts import from_state_dict, state_dict_shapes, to_state_dict

SMALL = {
    "DiCo": {"hidden_size": 8, "depth": (1, 2, 1, 1, 1), "num_classes": 3},
    "DiT": {"hidden_size": 12, "depth": 2, "num_heads": 3, "num_classes": 3},
}
BITS = np.random.default_rng(0)


def arrays(shapes):
    """Arrays of any bits, NaN of all kinds among them: what is only moved must not change."""
    return {
        key: BITS.integers(0, 1 << 32, shape, dtype=np.uint32).view(np.float32)
        for key, shape in shapes.items()
    }


@golden.requires_golden
@pytest.mark.parametrize("name", ["DiCo-S", "DiCo-B", "DiCo-L", "DiCo-XL", "DiCo-H"])
def test_published_dico_in_names_order_and_shapes(name):
    recorded = json.loads((golden.FOLDER / "state_dict_keys.json").read_text())[name]
    params = abstract_params(create_model(name))
    shapes = state_dict_shapes(params, KEY_MAPS["DiCo"])
    assert [(k, list(s)) for k, s in shapes.items()] == list(recorded.items())
    assert_round_trip_of_shapes(params, KEY_MAPS["DiCo"])


@pytest.mark.parametrize("name", ["DiT-S/8", "DiT-XL/2"])
def test_published_dit_there_and_back(name):
    assert_round_trip_of_shapes(abstract_params(create_model(name)), KEY_MAPS["DiT"])


def assert_round_trip_of_shapes(params, key_map):
    """There and back without an array: every leaf's axes come back where they were."""
    found = entries(params, key_map)
    assert len({e.key for e in found}) == len({e.path for e in found})
    assert len(found) == len(jax.tree.leaves(params))
    for entry in found:
        tensor = np.broadcast_to(np.float32(0), entry.torch_shape)
        assert entry.to_jax(tensor).shape == entry.shape
        leaf = np.broadcast_to(np.float32(0), entry.shape)
        assert entry.layout.to_torch(leaf).shape == entry.torch_shape


@golden.requires_golden
@pytest.mark.parametrize("name", ["dico_tiny.pt", "dit_tiny.pt"])
def test_keys_shapes_and_order_of_files(name):
    options = {
        "dico_tiny.pt": ("DiCo", golden.TINY),
        "dit_tiny.pt": ("DiT", {"hidden_size": 64, "depth": 3, "num_heads": 4, "num_classes": 10}),
    }
    family, sizes = options[name]
    shapes = state_dict_shapes(abstract_params(create_model(family, **sizes)), KEY_MAPS[family])
    with open_tensors(golden.FOLDER / name) as file:
        found = {k: ref.shape for k, ref in file.tensors.items() if k != "pos_embed"}
        assert list(found.items()) == list(shapes.items())


@pytest.mark.parametrize("family", SMALL)
def test_round_trip_of_values(family):
    params, key_map = abstract_params(create_model(family, **SMALL[family])), KEY_MAPS[family]
    state_dict = arrays(state_dict_shapes(params, key_map))
    tree = from_state_dict(state_dict, params, key_map)
    back = to_state_dict(tree, key_map)
    assert list(back) == list(state_dict)
    for key, value in state_dict.items():
        assert_same(back[key], value)
        assert back[key].flags.c_contiguous
    again = from_state_dict(back, params, key_map)
    jax.tree.map(assert_same, again, tree)


def test_every_layout_by_hand():
    rng = np.random.default_rng(0)
    conv, linear, one = (rng.normal(size=s) for s in ((5, 3, 2, 4), (5, 3), (5, 3, 1, 1)))
    tree = from_state_dict(
        {"a.weight": conv, "b.weight": linear, "mix.weight": one},
        {
            "a": {"kernel": np.empty((2, 4, 3, 5))},
            "b": {"kernel": np.empty((3, 5))},
            "mix": {"kernel": np.empty((3, 5))},
        },
        KeyMap(conv1x1=re.compile("^mix$")),
    )
    for o, i, y, x in np.ndindex(5, 3, 2, 4):
        assert tree["a"]["kernel"][y, x, i, o] == conv[o, i, y, x]
    assert_same(tree["b"]["kernel"], linear.T)
    assert_same(tree["mix"]["kernel"], one[:, :, 0, 0].T)


# Networks to come, by tables alone.


def test_batch_norm_collections_and_constants():
    """An Inception-like network: statistics in a collection of their own."""
    tree = {
        "params": {
            "conv": {"kernel": np.ones((3, 3, 2, 4))},
            "bn": {"scale": np.full(4, 2.0), "bias": np.full(4, 3.0)},
        },
        "batch_stats": {"bn": {"mean": np.full(4, 4.0), "var": np.full(4, 5.0)}},
    }
    key_map = KeyMap(
        declaration="conv bn",
        constants=re.compile(r"\.num_batches_tracked$"),
        renames=((r"^(params|batch_stats)\.", ""),),
    )
    state_dict = to_state_dict(tree, key_map)
    assert {k: v.flat[0] for k, v in state_dict.items()} == {
        "conv.weight": 1,
        "bn.weight": 2,
        "bn.bias": 3,
        "bn.running_mean": 4,
        "bn.running_var": 5,
    }
    statistics = ["bn.running_mean", "bn.running_var"]
    assert list(state_dict) == ["conv.weight", "bn.weight", "bn.bias", *statistics]
    state_dict["bn.num_batches_tracked"] = np.int64(7)
    jax.tree.map(assert_same, from_state_dict(state_dict, tree, key_map), tree)


def test_older_names_and_axes_of_one():
    """An attention of Stable Diffusion's autoencoder, whose files have older names and shapes."""
    key_map = KeyMap(
        aliases=((r"\.query\.", ".to_q."), (r"\.proj_attn\.", ".to_out.0.")), loose_ones=True
    )
    tree = {"mid": {"to_q": {"kernel": np.ones((2, 3))}, "to_out": {"0": {"bias": np.ones(3)}}}}
    old = {"mid.query.weight": np.ones((3, 2, 1, 1)), "mid.proj_attn.bias": np.ones((3, 1, 1))}
    jax.tree.map(assert_same, from_state_dict(old, tree, key_map), tree)
    new = to_state_dict(tree, key_map)
    assert new.keys() == {"mid.to_q.weight", "mid.to_out.0.bias"}
    jax.tree.map(assert_same, from_state_dict(new, tree, key_map), tree)
    with pytest.raises(UsageError, match=r"mid.to_q.weight is \(3, 2, 1\) instead of \(3, 2\)"):
        from_state_dict(
            {**new, "mid.to_q.weight": np.ones((3, 2, 1))}, tree, KeyMap(aliases=key_map.aliases)
        )
    with pytest.raises(UsageError, match=r"mid\.to_q\.weight twice, once of them as mid\.query"):
        known_names({**new, "mid.query.weight": np.ones((3, 2))}, key_map)


def tree_of(tensors, prefix=""):
    """A tree for a state dict without a network: leaves guessed from names and axes."""
    flat = {}
    for key, ref in tensors.items():
        *path, leaf = key.removeprefix(prefix).split(".")
        shape = ref.shape
        if leaf == "weight" and len(shape) == 1:
            leaf = "scale"
        elif leaf == "weight" and "embedding" in path[-1]:
            leaf = "embedding"
        elif leaf == "weight":
            leaf, shape = "kernel", (*shape[2:], shape[1], shape[0])
        flat[*path, leaf] = jax.ShapeDtypeStruct(shape, np.float32)
    return flax.traverse_util.unflatten_dict(flat)


@golden.requires_golden
@pytest.mark.parametrize(
    ("name", "key_map", "prefix"),
    [
        ("clip_text", KeyMap(renames=((r"^", "text_model."),)), "text_model."),
        ("vae_small", KeyMap(loose_ones=True), ""),
    ],
)
def test_tables_are_enough_for_clip_and_the_vae(name, key_map, prefix):
    with open_tensors(golden.FOLDER / f"{name}.safetensors") as file:
        state_dict = {key: ref.read() for key, ref in file.tensors.items()}
        back = to_state_dict(
            from_state_dict(state_dict, tree_of(file.tensors, prefix), key_map), key_map
        )
    assert back.keys() == state_dict.keys()
    for key, value in state_dict.items():
        assert_same(back[key], value)


# Errors.


def test_all_differences_are_listed_with_the_closest_names():
    params, key_map = abstract_params(create_model("DiCo", **SMALL["DiCo"])), KEY_MAPS["DiCo"]
    state_dict = arrays(state_dict_shapes(params, key_map))
    state_dict["latent.0.conv1.weights"] = state_dict.pop("latent.0.conv1.weight")
    del state_dict["final_layer.out_proj.bias"]
    state_dict["x_embedder.proj.bias"] = np.zeros(9)
    state_dict["zzz"] = np.zeros(1)
    with pytest.raises(UsageError) as caught:
        from_state_dict(state_dict, params, key_map)
    message = str(caught.value)
    assert "missing latent.0.conv1.weight (closest: latent.0.conv1.weights)" in message
    assert "missing final_layer.out_proj.bias" in message
    assert "x_embedder.proj.bias is (9,) instead of (8,)" in message
    assert "unexpected latent.0.conv1.weights (closest: latent.0.conv1.weight)" in message
    assert "unexpected zzz" in message
    assert message.count(";") == 4
    assert "\n" not in message


def test_a_list_of_everything_is_quick():
    """Weights of another network: hundreds of names on both sides."""
    large = entries(abstract_params(create_model("DiCo-S")), KEY_MAPS["DiCo"])
    start = time.process_time()
    with pytest.raises(UsageError) as caught:
        check_tensors({f"other.{e.key}": np.zeros(1) for e in large}, large, KEY_MAPS["DiCo"])
    assert str(caught.value).count("missing ") == str(caught.value).count("unexpected ") == 323
    assert time.process_time() - start < 10
