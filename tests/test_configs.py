"""Every experiment builds, and every field of a config is known and used."""

import importlib
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from dico_jax.config import DEFAULTS, check_fields, expanded, flatten, with_defaults
from dico_jax.configs import default, digits, folder
from dico_jax.errors import UsageError
from dico_jax.experiment import (
    experiment_from_config,
    model_from_config,
    reader_from_config,
    sampling_from_config,
    source_from_config,
    with_source_options,
)
from dico_jax.models import abstract_params, count_parameters
from dico_jax.training.optimizer import create_optimizer
from dico_jax.training.step import loss_fn

FIELDS = frozenset(flatten(DEFAULTS))
NUMBERS = {"model.hidden_size", "model.depth", "model.mlp_ratio", "model.num_heads"}
NUMBERS |= {"model.patch_size", "model.text_length", "model.text_width", "model.pooled_width"}
NUMBERS |= {"model.text_layers", "model.text_dropout_prob", "autoencoder.scaling_factor"}
NUMBERS |= {"data.cache_gb", "model.kernel_size", "model.window_size"}

ROOT = pathlib.Path(__file__).resolve().parents[1]
NAMES = sorted(p.stem for p in (ROOT / "configs").glob("*.py") if p.stem[0] != "_")
PARAMETERS = {
    "s256": 33_137_672,
    "b256": 129_992_712,
    "l256": 463_897_992,
    "xl256": 701_151_368,
    "h256": 1_037_408_328,
    "xl512": 701_151_368,
    "xl256_flow": 701_121_412,
}


def test_the_published_sizes_have_configs():
    told_texts = {"worded_digits", "coco256", "coco256_flow", "coco256_uvit"}
    others = {"digits_flow", "digits_mean_flow", "iso_flow"}
    others |= {"ablation_s256", "ablation_digits", "ablation_cifar10"}
    known = {"default", "digits", "cifar10", "folder", *told_texts, *others, *PARAMETERS}
    assert set(NAMES) == known


@pytest.mark.parametrize("name", NAMES)
def test_config_builds(name):
    module = importlib.import_module(f"configs.{name}")
    config = module.get_config()
    assert config.is_locked
    if name != "default":
        assert f"--config=configs/{name}.py --workdir=" in module.__doc__
        assert "Hardware: " in module.__doc__
        assert "Expected: " in module.__doc__
    check_fields(config)
    create_optimizer(config.optimizer, config.training.num_steps)
    if config.model.num_classes is None:  # counted when the data are opened
        config.model.num_classes = 3
    process, _ = sampling_from_config(config)
    assert process.num_steps == config.sampling.num_steps

    if name.startswith("coco"):  # its text encoder has to be there
        assert model_from_config(config).text_dropout_prob == 0.1
        return
    experiment = experiment_from_config(config)
    if name in PARAMETERS:
        assert count_parameters(experiment.model) == PARAMETERS[name]
        assert experiment.latent_shape[:2] == ((64, 64) if name == "xl512" else (32, 32))


# Of the published sizes, which differ in their numbers alone, the smallest and one of the largest.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name in {"b256", "l256", "h256", "xl512"}))
        for name in NAMES
    ],
)
def test_loss_can_be_traced(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    if config.model.num_classes is None:
        config.model.num_classes = 3
    experiment = experiment_from_config(config, sizes_alone=True)
    model, (height, width, channels) = experiment.model, experiment.latent_shape
    x = jax.ShapeDtypeStruct((2, height, width, channels), jnp.float32)
    t = jax.eval_shape(lambda x: experiment.diffusion.draw(jax.random.key(0), x)[0], x)
    told = model.zero_condition(2)
    loss, terms = jax.eval_shape(
        lambda p, x, condition, t, noise: loss_fn(
            p, model, experiment.diffusion, {"x": x, "condition": condition}, t, noise
        ),
        abstract_params(model), x, told, t, x,
    )  # fmt: skip
    assert loss.shape == ()
    assert set(terms) == {"loss", "mse", "vb"} - ({"vb"} if "flow" in name else set())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtype_reaches_the_model(dtype):
    config = default.get_config()
    config.model.dtype = dtype
    assert experiment_from_config(config).model.dtype == dtype


def test_fields_are_those_of_the_default_config():
    assert flatten(default.get_config().to_dict()).keys() == FIELDS


def test_unknown_and_missing_fields():
    with pytest.raises(AttributeError, match="batch_size"):
        default.get_config().data.batchsize = 3
    config = ConfigDict(default.get_config().to_dict())
    config.data.batchsize = 3
    with pytest.raises(UsageError, match="config.data.batchsize: no such .* config.data.batch_si"):
        check_fields(config)
    del config.data["batchsize"]
    del config.training["ema_decay"]
    with pytest.raises(UsageError, match="config.training.ema_decay is missing"):
        check_fields(config)


def test_every_field_is_read_somewhere():
    """A field that nothing reads would be a promise without effect."""
    files = [p for p in (ROOT / "dico_jax").rglob("*.py") if p.name != "defaults.py"]
    code = "\n".join(p.read_text() for p in files)
    for field in FIELDS - {f for f in FIELDS if f.startswith("model.")}:
        section, _, name = field.rpartition(".")
        assert f".{name}" in code or f'"{name}"' in code, field
        assert not section or f"config.{section}" in code, section


def read(config):
    return reader_from_config(config, experiment_from_config(config), source_from_config(config))


def test_source_must_fit_the_model(tmp_path):
    config = digits.get_config()
    read(config)
    config.model.in_channels = 2
    with pytest.raises(UsageError, match="config.model.in_channels=2 does not fit pictures"):
        read(config)
    config = digits.get_config()
    config.data.max_bad_fraction = -0.5
    with pytest.raises(UsageError, match="config.data.max_bad_fraction=-0.5 must be in"):
        read(config)
    config = default.get_config()
    config.model.in_channels = 3
    with pytest.raises(UsageError, match="config.model.in_channels=3 does not fit config.autoenc"):
        experiment_from_config(config)
    config = default.get_config()
    config.data.source, config.autoencoder.name = "digits", "latent_preview"
    with pytest.raises(UsageError, match="config.autoencoder.name='latent_preview' cannot encode"):
        read(config)
    np.save(tmp_path / "examples.npy", np.zeros((4, 8, 8, 4), np.float32))
    np.save(tmp_path / "labels.npy", np.arange(4))
    config.data.source, config.data.path = "arrays", str(tmp_path)
    with pytest.raises(UsageError, match="config.data.image_size=256 with config.model.in_chann"):
        read(config)
    config.data.image_size = 64
    read(config)


def test_num_classes_are_counted_where_they_are_not_set():
    config = folder.get_config()
    assert config.model.num_classes is None
    source = source_from_config(digits.get_config())
    counted = with_source_options(config, source)
    assert counted.model.num_classes == 10
    assert counted.is_locked
    assert config.model.num_classes is None
    assert with_source_options(default.get_config(), source).model.num_classes == 1000


def test_configs_of_older_checkpoints_are_completed():
    older = {"seed": 3, "model": {"name": "DiT-S/2", "num_classes": 10}, "converted_from": "x.pt"}
    config = with_defaults(older)
    assert config["seed"] == 3
    assert config["converted_from"] == "x.pt"
    assert config["model"] == DEFAULTS["model"] | older["model"]
    assert config["mesh"] == DEFAULTS["mesh"]
    assert with_defaults(DEFAULTS) == DEFAULTS


def bad_values(field):
    """What a field cannot be: what none can, another kind's, what is out of every range."""
    preset = flatten(DEFAULTS)[field]
    none = [{}, b"x", object(), 10**400, math.nan, -math.inf, "a\0b", "\udcff", "x" * 5000]
    if isinstance(preset, bool):
        return [*none, 0, 1.5, None, "", (True,)]
    if isinstance(preset, int | float) or field in NUMBERS:
        kinds = ["", "1", True, ("a",), (-1, 2), [None], -(10**12)]
        return none + kinds + [None] * (field not in NUMBERS | {"model.num_classes"})
    if isinstance(preset, tuple):
        return [*none, 0, -1.5, True, None, "", "fid"]
    return none + [0, -1.5, True, (1, 2), []] + [None] * (preset is not None)


@pytest.mark.parametrize("field", sorted(FIELDS))
def test_a_value_of_another_kind_is_refused_by_name(field):
    section, _, name = field.rpartition(".")
    for value in bad_values(field):
        values = default.get_config().to_dict()
        (values[section] if section else values)[name] = value
        config = ConfigDict(values, type_safe=False)
        with pytest.raises(UsageError, match=rf"^config\.{re.escape(field)}[ =]") as error:
            check_fields(config)
        assert "\n" not in str(error.value)


def test_ranges_are_of_fields():
    ranged = {field for fields in default.RANGES.values() for field in fields.split()}
    assert ranged <= FIELDS
    paths = {name for names in default.PATHS.values() for name in names.split() if "." in name}
    commands = ("sample", "evaluate", "export", "app", "analyze")
    assert paths <= FIELDS | {"show.file", *(f"{name}.ckpt" for name in commands)}


def test_paths_are_expanded_everywhere(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DATA", "/disk")
    config = digits.get_config()
    config.data.path, config.training.init_from = "~/a", "$DATA/run"
    config.autoencoder.path, config.eval.features = "hf://o/r/f", "${DATA}/c.npz"
    check_fields(config)
    assert (config.data.path, config.training.init_from) == ("/home/me/a", "/disk/run")
    assert (config.autoencoder.path, config.eval.features) == ("hf://o/r/f", "/disk/c.npz")
    assert expanded("--guide", "guide", "hf://o/r") == "hf://o/r"
    for path, said in (
        ("az://b/x", "only a disk or gs:// or s3://"),
        ("~no_such/x", "no such user"),
    ):
        config.training.init_from = path
        with pytest.raises(UsageError, match=f"^config.training.init_from='{path}'.*{said}"):
            check_fields(config)


def test_float_examples_in_another_range_are_refused(tmp_path):
    config = digits.get_config()
    config.data.source, config.data.path, config.model.in_channels = "arrays", str(tmp_path), 4
    np.save(tmp_path / "labels.npy", np.arange(4))
    for name, scale, said in (
        ("identity", 255, r"takes uint8 or pixels in \[-1, 1\], but .* has 0 to 255"),
        ("latent_preview", 255, "takes uint8 or scaled latents, but .* has 0 to 255"),
        ("identity", math.nan, "has nan to nan"),
        ("identity", 1, r"takes uint8 or pixels in \[-1, 1\], but .* has 0 to 1"),
        ("identity", -1, None),
        ("latent_preview", -5, None),
    ):
        config.autoencoder.name = name
        config.data.image_size = 32 if name != "identity" else 8
        side = 8 if name == "identity" else 4
        examples = np.linspace(0, 1, 4 * side * side * 4, dtype=np.float32)
        np.save(tmp_path / "examples.npy", (scale * examples).reshape(4, side, side, 4))
        if said is None:
            read(config)
        else:
            with pytest.raises(UsageError, match=f"^config.autoencoder.name={name!r} .*{said}"):
                read(config)
