"""Which model a file holds, from names and shapes alone."""

import contextlib
import json
import random

import numpy as np
import pytest

from dico_jax.errors import UsageError
from dico_jax.models import abstract_params, create_model
from dico_jax.pytorch.detection import detect_model
from dico_jax.pytorch.key_maps import KEY_MAPS, check_tensors, entries
from tests import golden
from tests.state_dicts import state_dict_shapes

TINY = {"hidden_size": 8, "depth": (1, 2, 1, 3, 1), "mlp_ratio": 2.0}
TINY_DIT = {"hidden_size": 12, "depth": 2, "num_heads": 3, "patch_size": 4, "mlp_ratio": 4.0}


def shapes_of(name, **options):
    model = create_model(name, **options)
    return state_dict_shapes(abstract_params(model), KEY_MAPS[type(model).__name__])


def created(fields):
    options = {k: v for k, v in fields.items() if k != "name" and v is not None}
    return create_model(fields["name"], **options)


@golden.requires_golden
@pytest.mark.parametrize("name", ["DiCo-S", "DiCo-B", "DiCo-L", "DiCo-XL", "DiCo-H"])
def test_published_dico_is_found_in_recorded_keys(name):
    recorded = json.loads((golden.FOLDER / "state_dict_keys.json").read_text())[name]
    assert_found(name, {key: tuple(shape) for key, shape in recorded.items()})


@pytest.mark.parametrize("name", ["DiT-S/8", "DiT-B/4", "DiT-L/2", "DiT-XL/2"])
def test_published_dit_is_found(name):
    assert_found(name, shapes_of(name))


def assert_found(name, shapes):
    fields = detect_model(shapes)
    assert created(fields) == create_model(name)
    assert {k for k, v in fields.items() if v is None} == {
        "hidden_size", "depth", "mlp_ratio", "num_heads", "patch_size"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("DiCo-S", {"num_classes": 10}),
        ("DiCo", {**TINY, "in_channels": 1, "learn_sigma": False}),
        ("DiCo", {**TINY, "num_classes": 1000, "class_dropout_prob": 0.0}),
        ("DiCo", {**TINY, "num_classes": 1, "class_dropout_prob": 0.0}),
        ("DiT-S/4", {"num_classes": 7, "in_channels": 16, "learn_sigma": False}),
        ("DiCo", TINY),
        ("DiCo", {**TINY, "mlp_ratio": 2.7}),
        ("DiCo", {**TINY, "hidden_size": 96, "mlp_ratio": 8 / 3}),
        ("DiCo", {**TINY, "mlp_ratio": 0.3}),
        ("DiCo", {**TINY, "in_channels": 3, "num_classes": 1}),
    ],
)
def test_options_show_in_shapes(name, options):
    shapes = shapes_of(name, **options)
    fields = detect_model(shapes)
    assert fields["name"] == name
    found = created(fields)
    for option, value in options.items():
        if option != "mlp_ratio":  # one with fewer digits may give the same widths
            assert getattr(found, option) == value
    assert state_dict_shapes(abstract_params(found), KEY_MAPS[type(found).__name__]) == shapes


def test_no_null_class_where_the_number_of_classes_says_so():
    shapes = shapes_of("DiCo", **TINY, num_classes=10, class_dropout_prob=0.0)
    assert detect_model(shapes)["num_classes"] == 9  # the last row is taken for the null class
    fields = detect_model(shapes, num_classes=10)
    assert (fields["num_classes"], fields["class_dropout_prob"]) == (10, 0.0)
    assert detect_model(shapes, likely_classes=10) == fields
    assert detect_model(shapes, likely_classes=1000) == detect_model(shapes)
    with pytest.raises(UsageError, match="--num_classes=8 does not fit: .* 10 rows"):
        detect_model(shapes, num_classes=8)


def test_attention_heads_of_a_dit():
    shapes = shapes_of("DiT", **TINY_DIT, num_classes=10)
    with pytest.raises(UsageError, match="width 12 .* give --num_heads"):
        detect_model(shapes)
    assert created(detect_model(shapes, num_heads=3)) == create_model(
        "DiT", **TINY_DIT, num_classes=10
    )
    fields = detect_model(shapes_of("DiT-S/2"), num_heads=12)
    assert (fields["name"], fields["num_heads"], fields["depth"]) == ("DiT", 12, 12)
    for name, shapes in (("DiT-S/2", shapes_of("DiT-S/2")), (None, shapes_of("DiCo-S"))):
        with pytest.raises(UsageError, match="--num_heads=6 is for --model=DiT"):
            detect_model(shapes, name, num_heads=6)


def test_a_given_name_decides_the_sizes():
    shapes = shapes_of("DiCo-S", num_classes=10)
    assert detect_model(shapes, "DiCo-B")["name"] == "DiCo-B"  # the check of shapes says the rest
    assert detect_model(shapes, "DiCo")["name"] == "DiCo-S"
    with pytest.raises(UsageError, match="--model=DiT-S/2: these are the weights of a DiCo"):
        detect_model(shapes, "DiT-S/2")


def test_a_few_wrong_tensors_do_not_mislead():
    shapes = shapes_of("DiCo-S")
    wrong = dict(shapes)
    wrong["x_embedder.proj.weight"] = (127, 4, 3, 3)
    wrong["y_embedder.embedding_table_0.weight"] = (9, 128)
    wrong["latent.0.conv4.weight"] = (1000, 512, 1, 1)
    for key in ("x_embedder.proj.bias", "final_layer.out_proj.weight", "latent.3.conv4.weight"):
        del wrong[key]
    fields = detect_model(wrong)
    assert created(fields) == create_model("DiCo-S")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "not the weights of a DiCo or DiT: 0 tensors"),
        ({"conv.weight": (3, 3), "fc.bias": (3,)}, "2 tensors such as conv.weight, fc.bias"),
        ({"latent.0.conv1.weight": (4, 4, 1, 1)}, "cannot tell hidden_size .* x_embedder.proj"),
        ({"latent.1001.conv1.weight": (1,), "x_embedder.proj.bias": (8,)}, "1002 blocks"),
        ({"latent.0.a": (), "x_embedder.proj.bias": (0,)}, "hidden_size=0, .* no sense"),
        ({"latent.0.a": (), "x_embedder.proj.bias": (1 << 40,)}, "hidden_size=10995.* no sense"),
        ({"latent.0.a": (), "x_embedder.proj.bias": (8,)}, "cannot tell mlp_ratio"),
        (
            {"latent.0.conv4.weight": (64, 32), "x_embedder.proj.bias": (8,)},
            "cannot tell in_channels",
        ),
    ],
)
def test_files_of_something_else(tensors, message):
    with pytest.raises(UsageError, match=message):
        detect_model(tensors)


def outcome(shapes, name, check):
    """The fields found, or None where it ends in an error; `check` compares all shapes too."""
    try:
        fields = detect_model(shapes, name)
    except UsageError as error:
        return None if "\n" not in str(error) else pytest.fail(str(error))
    if check:  # building the tree takes a while
        wanted = entries(abstract_params(created(fields)), KEY_MAPS["DiCo"])
        refs = {key: np.broadcast_to(np.int8(0), shape) for key, shape in shapes.items()}
        with contextlib.suppress(UsageError):
            check_tensors(refs, wanted, KEY_MAPS["DiCo"])
    return fields


def test_mutated_shapes_give_an_error_or_a_model():
    """A thousand damaged lists of shapes: a clean error, or a model whose check lists the rest."""
    shapes = shapes_of("DiCo", **TINY) | {"blocks.0.attn.qkv.weight": (3, 3)}
    rng, checked = random.Random(0), 0
    for _ in range(1000):
        mutated = dict(shapes)
        for key in rng.sample(list(mutated), rng.choice([1, 2, 20, len(mutated) - 2])):
            shape = mutated.pop(key)
            action = rng.randrange(4)
            if action == 0:
                mutated[key] = tuple(rng.choice([0, 1, d, d + 1, 1 << 40]) for d in shape)
            elif action == 1:
                mutated[key] = shape[:-1]
            elif action == 2:
                mutated[key.replace("0", "3").replace("1", rng.choice("123"))] = shape
        found = outcome(mutated, rng.choice([None, None, "DiCo", "DiCo-S"]), checked < 8)
        checked += found is not None and checked < 8
    assert checked == 8
