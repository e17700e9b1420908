"""A network, an objective, a solver and a source that the package does not know: a row each."""

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits
from dico_jax.data.sources import SOURCES, create_source
from dico_jax.diffusion import (
    OBJECTIVES,
    SOLVERS,
    Estimate,
    Objective,
    Solver,
    Trajectory,
    create_objective,
    sample_loop,
)
from dico_jax.diffusion.gaussian import table_at
from dico_jax.errors import UsageError
from dico_jax.evaluation import networks
from dico_jax.experiment import experiment_from_config, reader_from_config
from dico_jax.models import MODELS, create_model
from dico_jax.models.denoiser import Denoiser
from dico_jax.parallel import mesh
from dico_jax.sampling import checkpoint_sampler, pretrained
from dico_jax.training import program, run
from dico_jax.training.loop import train
from dico_jax.training.step import drop_conditions

TOKENS = (3, 4)


class Captioned:
    """The digits, told by tokens: a source without classes."""

    kind, class_names, skipped = "pictures", [], {}

    def __init__(self, config):
        self._digits = create_source(digits.get_config().data)

    def __len__(self):
        return 64

    def __getitem__(self, index):
        example = self._digits[index]
        caption = np.random.default_rng(example["label"]).normal(size=TOKENS)
        return {"image": example["image"], "tokens": caption, "caption": f"a {example['label']}"}

    def __repr__(self):
        return "Captioned()"

    def example_id(self, index):
        return str(index)


class Toy(Denoiser):
    """Told tokens (N, L, E); with no formula of its arithmetic, and no stages."""

    width: int = 8

    condition_dropout = 0.5

    def zero_condition(self, n):
        return {"tokens": np.zeros((n, *TOKENS), np.float32)}

    def null_condition(self, n):
        return {"tokens": np.full((n, *TOKENS), -1, np.float32)}

    @nn.compact
    def forward(self, x, t, condition):
        told = nn.Dense(self.width)(condition["tokens"].reshape(len(x), -1))
        told += nn.Dense(self.width)(t[:, None])
        h = nn.Conv(self.width, (3, 3))(x) + told[:, None, None]
        return nn.Conv(self.in_channels, (3, 3))(nn.silu(h))


@dataclasses.dataclass(frozen=True)
class LinearPath(Objective):
    """x_t = (1 - t) x_0 + t noise with t in [0, 1); the network predicts noise - x_0."""

    steps: int

    quartered = ("velocity",)

    @classmethod
    def from_options(cls, options, *, learn_sigma, num_steps=None, spacing="linear"):
        if learn_sigma:
            raise UsageError("learn_sigma", True, "is not for this objective: set it to False")
        return cls(num_steps or 1)

    def draw(self, key, x0):
        t_key, noise_key, _ = jax.random.split(key, 3)
        return jax.random.uniform(t_key, x0.shape[:1]), jax.random.normal(noise_key, x0.shape)

    def loss_terms(self, model_fn, x0, t, noise):
        s = t[:, None, None, None]
        output = model_fn((1 - s) * x0 + s * noise, t)
        error = jnp.mean((output - (noise - x0)) ** 2, axis=(1, 2, 3))
        return {"loss": error, "velocity": error}

    def progress(self, t):
        return t

    @property
    def times(self):
        return np.linspace(0, 1, self.steps + 1)

    def alpha_sigma(self, t):
        return 1 - t, t

    def estimate(self, output, x, t, clip_denoised=False):
        return Estimate(x - t * output, x + (1 - t) * output)


def at_points(path, i, x):
    """The factors of x_0 and noise where step i begins, and where it ends."""
    return [table_at(table, point, x) for point in (i + 1, i) for table in path.tables]


class Heun(Solver):
    """Two evaluations a step, but for the last."""

    def step(self, path, carry, i, noise):
        assert noise is None
        alpha, sigma, next_alpha, next_sigma = at_points(path, i, carry)

        def move(e):
            return carry + (next_alpha - alpha) * e.x0 + (next_sigma - sigma) * e.noise

        first = path.estimate(carry, i + 1)
        second = path.estimate(move(first), i)
        mean = jax.tree.map(lambda a, b: (a + b) / 2, first, second)
        x = jnp.where(i > 0, move(mean), move(first))
        return x, Trajectory(x, first.x0)


class TwoSteps(Solver):
    """Has the estimate of the step before in its carry (Adams and Bashforth)."""

    def init(self, path, x):
        return x, path.estimate(x, path.objective.num_steps)

    def step(self, path, carry, i, noise):
        x, before = carry
        now = path.estimate(x, i + 1)
        ahead = jax.tree.map(lambda a, b: 1.5 * a - 0.5 * b, now, before)
        alpha, sigma, next_alpha, next_sigma = at_points(path, i, x)
        x = x + (next_alpha - alpha) * ahead.x0 + (next_sigma - sigma) * ahead.noise
        return (x, now), Trajectory(x, now.x0)

    def end(self, path, carry):
        return carry[0]


@pytest.fixture(autouse=True)
def _one_row_each(monkeypatch):
    monkeypatch.setitem(SOURCES, "captioned", Captioned)
    monkeypatch.setitem(MODELS, "Toy", (Toy, {}))
    monkeypatch.setitem(OBJECTIVES, "path", LinearPath)
    monkeypatch.setitem(SOLVERS, "heun", Heun)
    monkeypatch.setitem(SOLVERS, "two_steps", TwoSteps)


def config(**training):
    config = digits.get_config()
    config.data.source, config.data.batch_size = "captioned", 16
    config.model = {  # what other networks have stays as it is by default
        **config.model.to_dict(), "name": "Toy", "learn_sigma": False,
        "hidden_size": None, "depth": None, "mlp_ratio": None, "num_classes": 1000,
    }  # fmt: skip
    config.diffusion.objective = "path"
    config.sampling.update(sampler="heun", num_steps=4, batch_size=8, grid_every_steps=2)
    config.sampling.update(grid_rows=2, grid_columns=2)
    config.training.update(num_steps=4, checkpoint_every_steps=2, log_every_steps=1)
    config.training.update(**training)
    config.eval.update(class_agreement_samples=0, num_samples=12)
    return config


@pytest.fixture
def two_devices(monkeypatch):
    def create_mesh(devices=None, **axes):
        return mesh.create_mesh(jax.devices()[:2], **axes)

    monkeypatch.setattr(program, "create_mesh", create_mesh)
    monkeypatch.setattr(pretrained, "create_mesh", create_mesh)


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_it_trains_resumes_samples_and_is_evaluated(tmp_path, monkeypatch, two_devices):
    monkeypatch.setattr(networks, "_MIN_STEPS", 2)
    monkeypatch.setattr(networks, "_EPOCHS", 0)
    trained = networks.train_classifier(
        create_source(digits.get_config().data), lambda image, mirrored: image
    )
    trained.save(tmp_path / "features.npz")
    measured = config()
    measured.eval.update(every_steps=4, features=str(tmp_path / "features.npz"))
    train(measured, str(tmp_path / "whole"))
    train(config(num_steps=2), str(tmp_path / "parts"))
    train(config(), str(tmp_path / "parts"))

    whole, parts = (
        [row for row in lines(tmp_path / w) if "loss" in row] for w in ("whole", "parts")
    )
    assert [row["step"] for row in whole] == [row["step"] for row in parts] == [1, 2, 3, 4]
    assert [row["loss"] for row in whole] == [row["loss"] for row in parts]
    names = set().union(*whole)
    assert {"loss", "velocity"} < names
    assert {f"velocity_t{q}_{q + 25}" for q in (0, 25, 50, 75)} <= names
    assert not any("mse" in name for name in names)
    fid = [value for row in lines(tmp_path / "whole") for k, value in row.items() if "/fid" in k]
    assert np.isfinite(fid).all()
    assert len(fid) == 1
    assert (tmp_path / "whole" / "samples" / "step_0000004.png").exists()

    conditions = {"tokens": np.stack([Captioned(None)[i]["tokens"] for i in range(6)])}
    guided, plain = (
        np.concatenate(list(sampler.images(conditions)))
        for sampler in (
            checkpoint_sampler.CheckpointSampler(
                str(tmp_path / "whole"), weights="params", overrides={"cfg_scale": scale}
            )
            for scale in (8.0, 1.0)
        )
    )
    assert guided.shape == plain.shape == (6, 8, 8, 1)
    assert (guided != plain).any()


def test_a_source_that_lacks_a_field_is_refused_in_one_line():
    lacking = config()
    lacking.data.source = "digits"
    experiment = experiment_from_config(lacking)
    with pytest.raises(
        UsageError,
        match=r"^config.model.name='Toy' does not fit .*igits.*: Toy is told 'tokens' of every "
        r"example, and these have image, label$",
    ):
        reader_from_config(lacking, experiment, create_source(lacking.data))
    with pytest.raises(UsageError, match=r"'tokens' of shape \(3, 4\) .* one has \(2, 4\)"):
        create_model("Toy").read_condition({"tokens": np.zeros((2, 4))})


def test_a_judge_of_classes_needs_examples_that_have_one(tmp_path):
    wrong = config()
    wrong.eval.class_agreement_samples = 5
    with pytest.raises(
        UsageError, match=r"class_agreement_samples=5 is for examples that have a class"
    ):
        run.Run(wrong, str(tmp_path))


def test_options_of_other_networks_are_refused_where_they_are_set():
    wrong = config()
    wrong.model.hidden_size = 8
    with pytest.raises(UsageError, match=r"config.model.hidden_size=8: model 'Toy' has no such"):
        experiment_from_config(wrong)


def test_dropping_takes_whole_examples():
    n = 1000
    conditions = {"tokens": jnp.ones((n, *TOKENS)), "mask": jnp.ones((n, 3), jnp.int32)}
    null = {"tokens": np.full((n, *TOKENS), -1.0), "mask": np.zeros((n, 3), np.int32)}
    dropped = drop_conditions(jax.random.key(0), conditions, 0.25, null)
    gone = np.asarray(dropped["mask"][:, 0] == 0)
    assert 0.2 < gone.mean() < 0.3
    assert dropped["tokens"].dtype == jnp.float32
    np.testing.assert_array_equal(dropped["mask"], np.repeat(~gone[:, None], 3, axis=1))
    expected = np.broadcast_to(np.where(gone, -1, 1)[:, None, None], (n, *TOKENS))
    np.testing.assert_array_equal(dropped["tokens"], expected)


@pytest.mark.parametrize(
    ("sampler", "order"), [("ddim", 1), ("heun", 2), ("two_steps", 2), ("ddpm", None)]
)
@pytest.mark.parametrize("objective", ["path", "noise"])
def test_solvers_reach_normal_data_with_their_order(sampler, order, objective):
    """Data are normal with deviation 0.5, of which the exact network is known."""

    def error(num_steps):
        options = {"objective": objective, "noise_schedule": "linear", "diffusion_steps": 1000}
        o = create_objective(options, learn_sigma=False, num_steps=num_steps)
        full = create_objective(options, learn_sigma=False, num_steps=None)

        def model_fn(x, t):
            if objective == "path":
                s = t[0]
                return x * (s - (1 - s) * 0.25) / ((1 - s) ** 2 * 0.25 + s**2)
            a = jnp.asarray(full.schedule.alphas_cumprod)[t[0]]
            return x * jnp.sqrt(1 - a) / (a * 0.25 + 1 - a)

        x = jnp.asarray(np.random.default_rng(0).normal(size=(2000, 1, 1, 1)))
        noise = jnp.asarray(np.random.default_rng(1).normal(size=(num_steps, *x.shape)))
        samples = jax.jit(
            lambda x: sample_loop(o, model_fn, x, lambda i: noise[i], sampler=sampler)
        )
        if order is None:  # it draws: the deviation of the samples
            return abs(float(jnp.std(samples(x))) - 0.5)
        alpha, sigma = o.alpha_sigma(o.times[-1])
        first = np.sqrt(0.25 * alpha**2 + sigma**2)
        return float(jnp.abs(samples(x) - 0.5 * x / first).max())

    with jax.enable_x64(True):
        coarse, fine = (error(n) for n in (10, 40))
    if order is None:
        assert fine < 0.05
    elif objective == "path":
        assert 0.8 * 4**order < coarse / fine < 1.7 * 4**order
    else:  # the last step, from timestep 0, is as long whatever their number
        assert fine < coarse / 2


def test_unknown_objectives_are_refused():
    wrong = config()
    wrong.diffusion.objective = "energy"
    message = r"config.diffusion.objective='energy' is unknown: use one of noise, .*, path"
    with pytest.raises(UsageError, match=message):
        experiment_from_config(wrong)
