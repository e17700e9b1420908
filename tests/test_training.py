"""The step on meshes, checkpoints, resuming, and the workdir."""

import functools
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import _saved, default, digits
from dico_jax.checkpoints.state import create_state, initializer, update_width_emas
from dico_jax.config import check_fields, config_to_dict
from dico_jax.data.class_files import FolderSource
from dico_jax.diffusion import create_diffusion, create_objective
from dico_jax.errors import UsageError
from dico_jax.models import create_model
from dico_jax.parallel.mesh import (
    batch_sharding,
    check_batch_size,
    create_mesh,
    replicated,
    to_global,
)
from dico_jax.parallel.sharding import state_sharding
from dico_jax.training.logging import Logger
from dico_jax.training.loop import train
from dico_jax.training.optimizer import create_optimizer
from dico_jax.training.step import drop_conditions, make_train_step
from dico_jax.training.workdir import check_workdir, data_of, open_workdir


def tiny_config(seed=0):
    """The digits experiment, as small as it gets."""
    config = digits.get_config()
    config.seed = seed
    config.data.batch_size = 16
    config.model.name = "DiT"  # one block compiles several times as fast as a DiCo
    config.model.hidden_size, config.model.depth = 8, 1
    config.model.num_heads, config.model.patch_size = 1, 4
    config.training.num_steps = 6
    config.training.log_every_steps = 2
    config.training.checkpoint_every_steps = 3
    config.sampling.num_steps = 2
    config.sampling.batch_size = 16
    config.sampling.grid_every_steps = 3
    config.sampling.grid_columns = 2
    config.eval.class_agreement_samples = 20
    config.logging.report = False  # it takes longer than all steps
    return config


WIDTHS = (0.1,)
NETWORKS = {
    "DiCo": {"hidden_size": 8, "depth": (1,) * 5},
    "DiT": {"hidden_size": 8, "depth": 1, "num_heads": 1},
}


OBJECTIVES = {
    "noise": {},
    "flow": {"learn_sigma": False},
    "mean_flow": {"learn_sigma": False, "two_times": True, "plain_ops": True},
}


def run_steps(
    devices,
    family,
    num_steps=3,
    accumulation_steps=1,
    learning_rate=2e-3,
    objective="noise",
    **axes,
):
    mesh = create_mesh(devices, **axes)
    options = NETWORKS[family] | OBJECTIVES[objective]
    model = create_model(family, **options, in_channels=1, num_classes=10)
    chosen = default.get_config().diffusion
    chosen.objective = objective
    diffusion = create_objective(chosen, learn_sigma=model.learn_sigma)
    config = digits.get_config().optimizer
    config.learning_rate = learning_rate
    optimizer = create_optimizer(config, num_steps)
    init = initializer(model, optimizer, (8, 8, 1))
    sharding = state_sharding(jax.eval_shape(init, jax.random.key(0)), mesh)
    state = create_state(init, 0, sharding)
    options = {"ema_decay": 0.9, "accumulation_steps": accumulation_steps}
    step = make_train_step(model, diffusion, optimizer, mesh=mesh, sharding=sharding, **options)
    rng, losses = np.random.default_rng(0), []
    for _ in range(num_steps):
        batch = {
            "x": rng.normal(size=(16, 8, 8, 1)).astype(np.float32),
            "condition": {"label": rng.integers(0, 10, 16).astype(np.int32)},
        }
        state, metrics = step(state, to_global(batch, batch_sharding(mesh)))
        losses.append([float(metrics[name]) for name in ("loss", "mse")])
    return losses, jax.device_get(state)


@pytest.mark.parametrize(
    "objective", ["noise", "flow", pytest.param("mean_flow", marks=pytest.mark.slow)]
)
def test_one_and_eight_devices_train_alike(objective):
    devices = jax.devices()
    assert len(devices) == 8
    losses, state = run_steps(devices[:1], "DiT", objective=objective)
    other_losses, other = run_steps(devices, "DiT", objective=objective)
    np.testing.assert_allclose(other_losses, losses, rtol=1e-5)
    # AdamW turns the rounding of a near-zero gradient into a step of up to the learning rate.
    differences = jax.tree.map(lambda a, b: np.square(a - b).mean(), other.params, state.params)
    assert np.sqrt(np.mean(jax.tree.leaves(differences))) < 0.02 * 1e-3


def test_examples_of_one_step_get_different_noise_and_timesteps():
    x = jnp.zeros((16, 8, 8, 1))
    mesh = create_mesh()
    draw = jax.jit(create_diffusion().draw, in_shardings=(replicated(mesh), batch_sharding(mesh)))
    t, noise = draw(jax.random.key(0), x)
    assert (draw(jax.random.key(1), x)[0] != t).any()
    assert len(np.unique(t)) > 10
    flat = np.asarray(noise).reshape(16, -1)
    assert np.abs(np.corrcoef(flat) - np.eye(16)).max() < 0.5


def test_labels_are_dropped_at_the_given_rate():
    dropped = drop_conditions(jax.random.key(0), jnp.full(20_000, 3), 0.1, jnp.full(20_000, 10))
    assert set(np.unique(dropped)) == {3, 10}
    assert abs(np.mean(dropped == 10) - 0.1) < 0.01


@functools.cache
def quick_step(dropout=0.0):
    """A compiled step of a network that compiles fast, and a function to its initial state."""
    config, mesh = tiny_config(), create_mesh()
    fields = {name: config.model[name] for name in ("hidden_size", "depth", "num_heads")}
    model = create_model("DiT", **fields, num_classes=10, in_channels=1, class_dropout_prob=dropout)
    optimizer = create_optimizer(config.optimizer, 1)
    options = {"ema_widths": WIDTHS, "skip_bad_steps": True}
    step = make_train_step(model, create_diffusion(), optimizer, mesh=mesh, **options)
    init = initializer(model, optimizer, (8, 8, 1), WIDTHS)
    return step, lambda: create_state(init, 0, replicated(mesh))


@pytest.mark.parametrize(("probability", "matters"), [(0.0, True), (1 - 1e-7, False)])
def test_the_step_drops_labels(probability, matters):
    step, new_state = quick_step(probability)
    found = []
    for label in (1, 2):
        state = new_state()  # whose gates are closed at first
        state = state.replace(params=jax.tree.map(lambda p: p + 0.1, state.params))
        batch = {"x": jnp.ones((16, 8, 8, 1)), "condition": {"label": jnp.full(16, label)}}
        state, metrics = step(state, batch)
        table = state.params["y_embedder"]["embedding_table"]["embedding"]
        found.append((float(metrics["grad_norm"]), np.asarray(table)))
    (norm, table), (other_norm, other_table) = found
    assert (norm != other_norm) == matters
    assert (table != other_table).any() == matters


def test_a_step_left_out_still_counts_in_averages_that_widen():
    step, new_state = quick_step()
    batch = {"x": jnp.ones((16, 8, 8, 1)), "condition": {"label": jnp.zeros(16, jnp.int32)}}
    state, metrics = step(new_state(), batch)
    state, metrics = step(state, batch)
    before = jax.device_get(state)
    state, metrics = step(state, batch | {"x": jnp.full((16, 8, 8, 1), jnp.nan)})
    assert not metrics["finite"]
    assert int(state.step) == 3
    for name in ("params", "ema_params", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(state, name), getattr(before, name))
    expected = update_width_emas(before.width_emas, before.params, 3, WIDTHS)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), state.width_emas, expected
    )


def test_a_run_in_parts_equals_a_run_in_one(tmp_path, capfd):
    config = tiny_config()
    result = train(config, str(tmp_path / "whole"))
    assert result.num_samples == 20
    printed = capfd.readouterr()
    said = printed.out.splitlines()
    names = ["model", "data", "devices", "training", "workdir"]
    assert [line.split()[0] for line in said[:5]] == names
    for part in ("DiT, 3,784 parameters", "1,797 examples", "8 x cpu", "steps 0 to 6, saved"):
        assert part in printed.out
    phases = ("compiling the training step ...", "compiled in ", "judging 20 samples ...", "done: ")
    at = [next(i for i, line in enumerate(said) if line.startswith(p)) for p in phases]
    assert at == sorted(at)
    assert said[at[-1]] == "done: step 6 of 6"
    assert "class agreement" in said[at[-1] + 1]
    assert f"python -m dico_jax.sample --ckpt={tmp_path / 'whole'}" in said[-1]
    assert max(map(len, printed.err.splitlines())) <= 80
    assert "\r" not in printed.err
    overview = (tmp_path / "whole" / "parameters.txt").read_text()
    assert "| y_embedder/embedding_table/embedding" in overview
    assert "Total: 3,784 -- 15,136 bytes" in overview
    for part in ("6/6", "loss=", "img_s="):
        assert part in printed.err

    config.training.num_steps = 4
    train(config, str(tmp_path / "parts"))
    config.training.num_steps = 6
    assert train(config, str(tmp_path / "parts")) == result
    capfd.readouterr()
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "parts").rglob("*")}
    assert train(config, str(tmp_path / "parts")) == result  # and nothing is done again
    assert capfd.readouterr().out.startswith("already done: step 6 of 6\nclass agreement ")
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "parts").rglob("*")} == before
    whole, parts = (read_metrics(tmp_path / name) for name in ("whole", "parts"))
    # The whole run logs at 2, 4 and 6; so does the other one, and the numbers are the same.
    assert [line["step"] for line in whole] == [2, 4, 6, 6]
    for a, b in zip(whole, [p for p in parts if p["step"] != 4 or "loss" in p], strict=True):
        speed = {"images_per_second": 0, "data_wait": 0}
        assert {**a, **speed} == {**b, **speed}
    for name in ("step_0000003.png", "step_0000006.png"):
        pictures = [(tmp_path / run / "samples" / name).read_bytes() for run in ("whole", "parts")]
        assert pictures[0] == pictures[1]
    assert list((tmp_path / "whole").glob("events.out.tfevents.*"))


def test_the_page_is_made_once_and_in_the_end(tmp_path, capfd):
    config = tiny_config()
    config.eval.class_agreement_samples = config.sampling.grid_every_steps = 0
    made = []

    def page(workdir):
        assert read_metrics(tmp_path)[-1]["step"] == 7  # all is there
        (workdir / "report.html").write_text("page")
        print("it is made")
        made.append(workdir)
        return "the page"

    train(config, str(tmp_path), page=page)
    assert not made
    assert f"page        python -m dico_jax.report {tmp_path}\n" in capfd.readouterr().out
    config.logging.report, config.training.num_steps = True, 7
    train(config, str(tmp_path), page=page)
    said = capfd.readouterr().out
    assert said.index("it is made") < said.index("done: step 7 of 7")
    assert "page        the page\n" in said
    train(config, str(tmp_path), page=page)
    assert made == [tmp_path]
    assert f"page        {tmp_path / 'report.html'}\n" in capfd.readouterr().out


def read_metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_lines_of_an_interrupted_run_are_written_again(tmp_path):
    with Logger(tmp_path, 0, 10) as log:
        for step in (2, 4, 6):
            log.scalars(step, {"loss": float(step)})
    (tmp_path / "metrics.jsonl").open("a").write('{"step": 8, "lo')  # cut by a kill
    with Logger(tmp_path, 4, 10) as log:
        log.scalars(6, {"loss": float("nan")})
    assert [line["step"] for line in read_metrics(tmp_path)] == [2, 4, 6]
    assert read_metrics(tmp_path)[-1]["loss"] == "nan"


@pytest.mark.parametrize(
    ("batch_size", "message"),
    [(250, "use 248 or 256"), (3, "use 8$"), (0, "use 8$"), (-8, "use 8$")],
)
def test_batches_that_devices_cannot_split(batch_size, message):
    with pytest.raises(UsageError, match=f"batch_size={batch_size} does not divide.*{message}"):
        check_batch_size(batch_size, 8)


def test_a_workdir_belongs_to_one_config(tmp_path):
    config = tiny_config()
    folder = open_workdir(str(tmp_path / "run"), tiny_config(seed=1))
    open_workdir(str(folder), config)  # nothing is saved yet
    save_meta(folder, 5, config)
    before = (folder / "config.json").read_text()

    other = tiny_config()
    other.optimizer.learning_rate = 0.5
    other.model.hidden_size = 16
    with pytest.raises(UsageError) as error:
        open_workdir(str(folder), other)
    assert "config.model.hidden_size was 8, is 16" in str(error.value)
    assert "config.optimizer.learning_rate was 0.002, is 0.5" in str(error.value)
    assert (folder / "config.json").read_text() == before

    longer = tiny_config()
    longer.training.update(num_steps=100, keep_every_steps=3, preemption_exit_status=75)
    longer.sampling.cfg_scale = 2.0
    open_workdir(str(folder), longer)
    assert json.loads((folder / "config.json").read_text())["training"]["num_steps"] == 100


def test_workdirs_that_are_none(tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(UsageError, match="file is no folder that you may read"):
        open_workdir(str(file), tiny_config())
    with pytest.raises(NotADirectoryError, match="file/below"):  # the commands make a line of it
        open_workdir(str(file / "below"), tiny_config())
    with pytest.raises(UsageError, match="--workdir= is empty: name a folder"):
        check_workdir("", tiny_config())
    (tmp_path / "pipe").mkdir()
    for name in ("metrics.jsonl", ".lock"):
        os.mkfifo(tmp_path / "pipe" / name)
        with pytest.raises(UsageError, match=f"{name} is no file that you may read and write"):
            open_workdir(str(tmp_path / "pipe"), tiny_config())
        (tmp_path / "pipe" / name).unlink()
    (tmp_path / "pipe" / "checkpoints").touch()
    with pytest.raises(UsageError, match="checkpoints is no folder that you may"):
        open_workdir(str(tmp_path / "pipe"), tiny_config())
    (tmp_path / "old" / "checkpoints" / "3").mkdir(parents=True)
    with pytest.raises(UsageError, match="config.json cannot be read .*: restore it"):
        open_workdir(str(tmp_path / "old"), tiny_config())
    assert file.read_text() == "mine"


def save_meta(folder, step, config, **data):
    """What `check_workdir` reads of a checkpoint."""
    meta = folder / "checkpoints" / str(step) / "meta"
    meta.mkdir(parents=True)
    fields = {"config": config_to_dict(config), "class_names": []} | data
    (meta / "metadata").write_text(json.dumps(fields))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "\0\1", None])
def test_a_damaged_config_is_made_again_from_a_checkpoint(tmp_path, text, capsys):
    folder = open_workdir(str(tmp_path / "run"), tiny_config())
    save_meta(folder, 5, tiny_config())
    whole = (folder / "config.json").read_text()
    (folder / "config.json").unlink()
    if text is not None:
        (folder / "config.json").write_text(text)
    with pytest.raises(UsageError, match="config.seed was 0, is 1"):
        open_workdir(str(folder), tiny_config(seed=1))
    open_workdir(str(folder), tiny_config())
    assert "config.json cannot be read" in capsys.readouterr().err
    assert (folder / "config.json").read_text() == whole


def test_what_may_change_with_care(tmp_path, capsys):
    folder = open_workdir(str(tmp_path / "run"), tiny_config())
    save_meta(folder, 5, tiny_config())
    other = tiny_config()
    other.data.batch_size = 48
    with pytest.raises(UsageError, match=r"or --allow_config_change=data\.batch_size"):
        open_workdir(str(folder), other)
    open_workdir(str(folder), other, ["data.batch_size"])
    assert "config.data.batch_size was" in capsys.readouterr().err
    (line,) = map(json.loads, (folder / "config_changes.jsonl").read_text().splitlines())
    assert line["step"] == 5
    open_workdir(str(folder), other)
    other.seed = 3
    with pytest.raises(UsageError, match="config.seed was 0, is 3") as error:
        open_workdir(str(folder), other, ["data.batch_size"])
    assert "allow" not in str(error.value)


def test_a_run_belongs_to_its_classes(tmp_path, capsys):
    config, data = tiny_config(), {"class_names": ["cat", "dog"], "examples": [40, "a"]}
    folder = open_workdir(str(tmp_path / "run"), config)
    save_meta(folder, 5, config, **data)
    more = data | {"examples": [41, "b"]}
    open_workdir(str(folder), config, (), data)
    assert capsys.readouterr().err == ""
    open_workdir(str(folder), config, (), more)
    assert "had 40 examples and goes on with 41" in capsys.readouterr().err
    # Of all names, where both have a digest of them.
    open_workdir(str(folder), config, (), data | {"examples": [40, "a", "all"]})
    assert capsys.readouterr().err == ""
    save_meta(folder, 6, config, **data | {"examples": [40, "a", "all"]})
    open_workdir(str(folder), config, (), data | {"examples": [40, "a", "others"]})
    assert "had 40 examples and goes on with 40, or others" in capsys.readouterr().err
    for names in (["dog", "zebra"], ["dog", "cat"], ["cat"], ["cat", "dog", "z" * 99_999]):
        with pytest.raises(UsageError, match="data of other classes .label [012] is ") as error:
            check_workdir(str(folder), config, (), more | {"class_names": names})
        assert len(str(error.value)) < 1_000


def test_the_fingerprint_of_a_folder_is_of_all_names(tmp_path):
    (tmp_path / "cat").mkdir()
    for i in range(2_001):
        (tmp_path / "cat" / f"{i:04d}.png").touch()
    before = data_of(FolderSource(str(tmp_path)))["examples"]
    (tmp_path / "cat" / "0001.png").rename(tmp_path / "cat" / "0001a.png")
    after = data_of(FolderSource(str(tmp_path)))["examples"]
    assert before[:2] == after[:2]  # as runs have recorded it before
    assert before[2] != after[2]


def test_broken_lines_of_json_are_left_out(tmp_path, capsys):
    file = tmp_path / "metrics.jsonl"
    for text, kept in (
        (b'{"step": 1}\n{"st\n\xff\0\n[]\n{"step": []}\n{"a": 1}\n{"step": 2}\n{"step"', [1, 2]),
        (b"\x89PNG\0\n\n", []),
        (b'{"step": 1}\n', [1]),
        (b"", []),
    ):
        file.write_bytes(text)
        with Logger(tmp_path, 2, 10) as log:
            log.scalars(4, {"loss": 1.0})
        assert [line["step"] for line in read_metrics(tmp_path)] == [*kept, 4]
        broken = capsys.readouterr().err.count("broken lines are left out")
        assert broken == (text.count(b"\n") > 1)
    with Logger(tmp_path, 0, 10) as log:
        pass
    assert "goes to step 4, and no checkpoint is there" in capsys.readouterr().out
    assert file.read_bytes() == b""


def test_the_config_of_a_run_starts_another(tmp_path):
    config = tiny_config()
    config.training.ema_widths = (0.1,)
    folder = open_workdir(str(tmp_path / "a"), config)
    again = _saved.get_config(str(folder / "config.json"))
    assert config_to_dict(again) == config_to_dict(config)
    assert again.training.ema_widths == (0.1,)
    check_fields(again)
