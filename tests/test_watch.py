"""Steps that are not finite, metrics by noise, stalls, profiles and kept programs."""

import re
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from clu.metrics import Average
from jax.experimental.compilation_cache import compilation_cache

from configs import default
from dico_jax import cli
from dico_jax.config import check_values
from dico_jax.diffusion import create_diffusion
from dico_jax.errors import TrainingStopped, UsageError
from dico_jax.parallel.mesh import batch_sharding, create_mesh, replicated
from dico_jax.training.speed import Profiler, enable_compilation_cache
from dico_jax.training.step import attempt_key, mean_of_steps, quarter_losses
from dico_jax.training.watch import MAX_ROLLBACKS, NanWatch, StallWatch, stall_file


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("training.on_nan", "ignore", "on_nan='ignore': use 'stop' or 'skip' or 'rollback'"),
        ("training.stall_warning_seconds", -1, "stall_warning_seconds=-1 must be at least 0"),
        ("profile.start_step", -1, "start_step=-1 must be at least 0"),
        ("profile.num_steps", 0, "num_steps=0 must be at least 1"),
    ],
)
def test_fields_that_cannot_work(field, value, message):
    config = default.get_config()
    check_values(config)
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UsageError, match=f"^config.{field.split('.')[0]}.{message}"):
        check_values(config)


# Steps that are not finite.


OPTIMIZER = optax.adam(0.1)


def make_step(*, skip, bad_draws=(), bad_steps=()):
    """A step like that of training: w learns noise that follows from (seed, step, attempt).

    It is not finite at `bad_steps`, and at the (step, attempt) in `bad_draws`.
    """

    def step(state, attempt):
        key = attempt_key(jax.random.fold_in(jax.random.key(0), state["step"]), attempt)
        number = state["step"] + 1
        bad = jnp.any(jnp.array([False, *[number == s for s in bad_steps]]))
        for bad_step, bad_attempt in bad_draws:
            bad |= (number == bad_step) & (attempt == bad_attempt)
        noise = jnp.where(bad, jnp.nan, jax.random.normal(key, (3,)))
        loss, grads = jax.value_and_grad(lambda w: jnp.square(w - noise).sum())(state["w"])
        updates, opt_state = OPTIMIZER.update(grads, state["opt_state"])
        new = {"step": number, "w": state["w"] + updates, "opt_state": opt_state}
        finite = jnp.isfinite(loss)
        if skip:
            old = {**state, "step": number}
            new = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
        return new, {"loss": loss, "finite": finite}

    return jax.jit(step, donate_argnums=0)


def new_state():
    w = jnp.zeros(3)
    return {"step": jnp.zeros((), jnp.int32), "w": w, "opt_state": OPTIMIZER.init(w)}


def run(step, checkpoints, policy, last, *, log_every=3, save_every=5, die_at=None):
    """The part of the loop that the watch is about.

    `checkpoints` maps steps to (state, attempt).
    """
    newest = max(checkpoints, default=None)
    state, attempt = checkpoints.get(newest, (new_state(), 0))
    watch, said, losses = NanWatch(policy, attempt, lambda text: said.append(text)), [], {}
    state, number = jax.tree.map(jnp.copy, state), newest or 0
    while number < last:
        number += 1
        state, metrics = step(state, np.int32(watch.attempt))
        losses[number] = metrics
        watch.add(number, metrics["finite"])
        if number == die_at:
            return None
        if number % log_every == 0 or number % save_every == 0 or number == last:
            back = watch.check(max(checkpoints, default=None))
            if back is not None:
                state = jax.tree.map(jnp.copy, checkpoints[back][0] if back else new_state())
                number = back
                continue
        if number % save_every == 0:
            checkpoints[number] = (jax.device_get(state), watch.attempt)
    return jax.device_get(state), watch, said, jax.device_get(losses)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_skip_counts_and_goes_on():
    step = make_step(skip=True, bad_steps=(4, 6, 7))
    checkpoints = {}
    _, watch, _, losses = run(step, checkpoints, "skip", 10)
    assert set(checkpoints) == {5, 10}
    assert all(np.isfinite(state["w"]).all() for state, _ in checkpoints.values())
    assert watch.metrics() == {"skipped_steps": 3.0}
    assert watch.metrics() == {"skipped_steps": 0.0}
    values = list(losses.values())
    finite = [v["loss"] for v in values if v["finite"]]
    assert len(finite) == 7
    assert mean_of_steps(values) == {"loss": pytest.approx(np.mean(finite), rel=1e-6)}


def test_skip_stops_after_many_in_a_row():
    watch = NanWatch("skip")
    for step in range(1, 301):
        watch.add(step, np.bool_(step % 100 == 0))
    assert watch.check(None) is None
    for step in range(301, 400):
        watch.add(step, np.bool_(False))
    assert watch.check(250) is None  # 99 in a row
    watch.add(400, np.bool_(False))
    with pytest.raises(
        TrainingStopped, match="at step 400, nor at the 99 .* checkpoint is step 250"
    ):
        watch.check(250)


def test_stop_names_the_first_bad_step_and_saves_nothing_after_it():
    checkpoints = {}
    with pytest.raises(TrainingStopped) as error:
        run(make_step(skip=False, bad_steps=(8,)), checkpoints, "stop", 20, log_every=100)
    assert re.match(
        "config.training.on_nan=stop: loss or gradients were not finite at step 8; "
        "the newest good checkpoint is step 5: .*on_nan=skip",
        str(error.value),
    )
    assert "\n" not in str(error.value)
    assert set(checkpoints) == {5}
    with pytest.raises(TrainingStopped, match="at step 2; no checkpoint has been saved yet"):
        run(make_step(skip=False, bad_steps=(2,)), {}, "stop", 20)


def test_rollback_takes_the_steps_again_with_other_noise():
    checkpoints = {}
    step = make_step(skip=False, bad_draws=((3, 0), (8, 1), (9, 2)))
    state, watch, said, losses = run(step, checkpoints, "rollback", 20)
    assert watch.attempt == 3
    assert watch.metrics() == {"rollbacks": 3.0}
    assert [re.search(r"at step (\d+); going on from step (\d+)", s).groups() for s in said] == [
        ("3", "0"),
        ("8", "5"),
        ("9", "5"),
    ]
    assert all(v["finite"] for v in losses.values())
    assert {n: attempt for n, (_, attempt) in checkpoints.items()} == {5: 1, 10: 3, 15: 3, 20: 3}

    # The same run again, and one that dies after each of its steps and is started again.
    assert_same(run(step, {}, "rollback", 20)[0], state)
    for die_at in (2, 4, 8, 9, 13):
        others = {}
        assert run(step, others, "rollback", 20, die_at=die_at) is None
        again, *_ = run(step, others, "rollback", 20)
        assert_same(again, state)
        assert_same(others, checkpoints)


def test_rollback_gives_up_on_what_noise_does_not_mend():
    checkpoints = {}
    with pytest.raises(
        TrainingStopped, match="at step 7, after 3 returns to step 5; the newest go"
    ):
        run(make_step(skip=False, bad_steps=(7,)), checkpoints, "rollback", 20)
    assert set(checkpoints) == {5}
    # The count is one of returns to one checkpoint.
    watch = NanWatch("rollback", say=lambda text: None)
    for checkpoint in (10, 20):
        for _ in range(MAX_ROLLBACKS):
            watch.add(checkpoint + 1, np.bool_(False))
            assert watch.check(checkpoint) == checkpoint
    assert watch.attempt == 2 * MAX_ROLLBACKS
    watch.add(21, np.bool_(False))
    with pytest.raises(TrainingStopped):
        watch.check(20)


def test_a_stopped_run_ends_with_status_1_and_one_line(capsys):
    def main():
        raise TrainingStopped("not finite at step 8;\n  use another")

    with pytest.raises(SystemExit) as error:
        cli._main(main, {}, [])
    assert error.value.code == 1
    assert capsys.readouterr().err == "error: not finite at step 8; use another\n"


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (
            RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 987654 bytes.\nat"),
            "987654 by",
        ),
        (
            RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9.5GiB."),
            "9.5GiB",
        ),
        (MemoryError("Unable to allocate 7.45 GiB for an array with shape (9,)"), "7.45 GiB"),
        (MemoryError(), "more"),
        (RuntimeError("INTERNAL: Out of memory"), "more"),  # on CPUs
    ],
)
def test_out_of_memory_is_one_line_of_advice(capsys, error, asked):
    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        cli._main(main, {}, [])
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(rf"error: out of memory: {asked}.* was asked for, [0-9.]+ GB are there: ", line)
    assert "a smaller --batch_size" in line


def test_a_disk_that_tensorstore_cannot_read_is_one_line(capsys):
    def main():
        raise ValueError("Error reading 'run/manifest.ocdbt': [os_error_code='5']\nsource ...")

    with pytest.raises(SystemExit) as ended:
        cli._main(main, {}, [])
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith("error: Error reading 'run/manifest.ocdbt'")


@pytest.mark.parametrize("kind", [RuntimeError, ValueError])
def test_other_errors_are_bugs(kind):
    def main():
        raise kind("a bug")

    with pytest.raises(kind, match="a bug"):
        cli._main(main, {}, [])


def test_attempts_draw_differently_and_the_first_as_without():
    key = jax.random.key(3)
    draw = jax.jit(lambda attempt: jax.random.normal(attempt_key(key, attempt), (4,)))
    draws = [np.asarray(draw(np.int32(attempt))) for attempt in range(3)]
    np.testing.assert_array_equal(draws[0], jax.random.normal(key, (4,)))
    assert len({d.tobytes() for d in draws}) == 3


# Metrics.


def test_quarters_of_a_batch_split_over_devices():
    rng, mesh = np.random.default_rng(0), create_mesh()
    split = batch_sharding(mesh)
    quarters = jax.jit(
        lambda mse, t: quarter_losses({"mse": mse}, create_diffusion().progress(t)),
        in_shardings=(split, split),
        out_shardings=replicated(mesh),
    )
    # Batches of 16 with few examples, or none at all, in some quarters.
    ts = [rng.integers(0, high, 16) for high in (1000, 250, 260)]
    ts[0][:4] = (0, 249, 250, 999)
    mses = [rng.uniform(0, 2, 16).astype(np.float32) for _ in ts]
    steps = [
        {"finite": True} | jax.device_get(quarters(mse, t.astype(np.int32)))
        for mse, t in zip(mses, ts, strict=True)
    ]
    assert [int(steps[1][f"mse_t{q}_{q + 25}"].count) for q in (0, 25, 50, 75)] == [16, 0, 0, 0]
    t, mse = np.concatenate(ts), np.concatenate(mses).astype(np.float64)
    assert mean_of_steps(steps) == {
        f"mse_t{q}_{q + 25}": pytest.approx(
            mse[(t >= 10 * q) & (t < 10 * q + 250)].mean(), rel=1e-6
        )
        for q in (0, 25, 50, 75)
    }
    # No example of three quarters: no number, rather than one that is none.
    assert set(mean_of_steps(steps[1:2])) == {"mse_t0_25"}


@pytest.mark.parametrize("num_timesteps", [1000, 50, 7, 4])
def test_quarters_are_quarters(num_timesteps):
    t = np.arange(num_timesteps)
    progress = create_diffusion(diffusion_steps=2000, timestep_respacing=num_timesteps).progress
    found = jax.jit(lambda t: quarter_losses({"mse": jnp.ones(t.shape)}, progress(t)))(t)
    bounds = np.ceil(np.arange(5) * num_timesteps / 4).astype(int)
    assert [int(q.count) for q in found.values()] == list(np.diff(bounds))


def test_an_example_that_is_not_finite_spoils_its_own_quarter():
    found = jax.jit(quarter_losses)(
        {"mse": jnp.array([1.0, jnp.nan, 3.0])}, jnp.array([0.0, 0.5, 0.999])
    )
    totals = [float(v.total) for v in found.values()]
    np.testing.assert_array_equal(totals, [1, 0, np.nan, 3])


def test_means_over_steps():
    steps = [
        {"finite": f, "loss": np.float32(x), "q": Average(np.float32(s), np.int32(n))}
        for f, x, s, n in ((True, 1, 2, 1), (True, 2, 12, 3), (False, np.nan, np.nan, 4))
    ]
    assert mean_of_steps(steps) == {"loss": 1.5, "q": 3.5}
    assert np.isnan(mean_of_steps(steps[2:])["loss"])  # nothing else to tell


# Stalls.


def stall_threads():
    return [t for t in threading.enumerate() if t.name == "stall-watch"]


def test_a_stall_is_told_with_the_stacks(tmp_path):
    told, said = threading.Semaphore(0), []

    def say(text):
        said.append(text)
        told.release()

    with StallWatch(0.02, tmp_path / "stall.txt", say) as watch:
        assert told.acquire(timeout=60)
        assert said[0].startswith("warning: no step has ended for 0 seconds since the start of ")
        watch.step_done(12)
        while "after step 12" not in said[-1]:
            assert told.acquire(timeout=60)
        count = len(said)
        while len(said) <= count:  # it repeats
            assert told.acquire(timeout=60)
        assert len(stall_threads()) == 1
    assert not stall_threads()
    assert str(tmp_path / "stall.txt") in said[-1]
    text = (tmp_path / "stall.txt").read_text()
    assert "after step 12\n" in text
    assert "in test_a_stall_is_told_with_the_stacks" in text


def test_a_stall_in_native_code_that_holds_pythons_lock(tmp_path):
    with StallWatch(0.05, tmp_path / "stall.txt", lambda text: None) as watch:
        watch.step_done(1)
        start = time.monotonic()
        while time.monotonic() < start + 0.5:
            re.match("(a|aa)+b", 24 * "a")  # no other thread of Python's runs meanwhile
    assert "in test_a_stall_in_native_code" in (tmp_path / "stall.txt").read_text()


def test_a_stall_file_that_cannot_be_written(tmp_path):
    said = []
    with StallWatch(100, tmp_path / "missing" / "stall.txt", said.append):
        assert "stall.txt cannot be written" in said[0]


def test_every_process_has_its_own_file(tmp_path, monkeypatch):
    assert stall_file(tmp_path) == tmp_path / "stall.txt"
    monkeypatch.setattr(jax, "process_index", lambda: 3)
    assert stall_file(tmp_path) == tmp_path / "stall_3.txt"


def test_no_watch_and_quick_ends(tmp_path):
    with StallWatch(0, tmp_path / "stall.txt") as watch:
        watch.step_done(1)
        assert not stall_threads()
    with StallWatch(1e6, tmp_path / "stall.txt"):
        assert stall_threads()
    assert not stall_threads()
    assert not (tmp_path / "stall.txt").exists()


# Profiles.


def profile_config(start_step, num_steps):
    config = default.get_config()
    config.profile.start_step, config.profile.num_steps = start_step, num_steps
    return config.profile


@pytest.fixture
def events(monkeypatch):
    """What a profiler does, in order, without tracing."""
    found = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: found.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: found.append("stop"))
    monkeypatch.setattr(jax, "block_until_ready", lambda x: found.append(f"wait for {x}"))
    return found


@pytest.mark.parametrize(
    ("start_step", "num_steps", "expected"),
    [
        (0, 2, "11 12 13 14"),
        (1, 2, "start 11 12 wait for 12 stop 13 14"),
        (2, 1, "11 wait for 11 start 12 wait for 12 stop 13 14"),
        (2, 2, "11 wait for 11 start 12 13 wait for 13 stop 14"),
        (4, 9, "11 12 13 wait for 13 start 14 wait for 14 stop"),
        (9, 1, "11 12 13 14"),
    ],
)
def test_profiled_steps_count_from_the_start_of_the_process(
    tmp_path, events, start_step, num_steps, expected
):
    said = []
    with Profiler(profile_config(start_step, num_steps), tmp_path, said.append) as profiler:
        for step in range(11, 15):
            events.append(str(step))  # the step is dispatched
            before = len(events)
            slow = profiler.step_done(step, step)
            assert slow == (len(events) > before)
    assert " ".join(events) == expected
    assert len(said) == expected.count("stop")


def test_a_profile_ends_with_a_failed_run_and_other_processes_make_none(
    tmp_path, events, monkeypatch
):
    profiler = Profiler(profile_config(1, 5), tmp_path, str)
    with pytest.raises(KeyError), profiler:
        profiler.step_done(1, {}["loss"])
    assert events == ["start", "stop"]  # what failed is not waited for
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with Profiler(profile_config(1, 5), tmp_path) as profiler:
        profiler.step_done(1, 1)
    assert events == ["start", "stop"]


def test_a_profile_is_written(tmp_path):
    said = []
    double = jax.jit(lambda x: 2 * x)
    with Profiler(profile_config(2, 2), tmp_path, said.append) as profiler:
        for step in range(1, 4):
            profiler.step_done(step, {"loss": double(jnp.ones(4))})
    (trace,) = (tmp_path / "profile").glob("plugins/profile/*/*.xplane.pb")
    assert b"train" in trace.read_bytes()
    assert said == [
        f"profile of 2 steps in {tmp_path / 'profile'}: xprof --logdir={tmp_path / 'profile'}"
    ]


def test_a_profile_that_cannot_be_written_is_a_warning(tmp_path):
    (tmp_path / "profile").write_text("a file in the folder's place")
    said = []
    with Profiler(profile_config(1, 2), tmp_path, said.append) as profiler:
        for step in range(1, 4):
            profiler.step_done(step, {"loss": jnp.ones(4)})
    (line,) = said
    assert line.startswith(f"warning: no profile in {tmp_path / 'profile'}, training goes on: ")


# Kept programs.


@pytest.fixture
def _cache_settings():
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.mark.usefixtures("_cache_settings")
def test_programs_are_kept_where_the_newest_call_says(tmp_path):
    for name, factor in (("a", 3.25), ("b", 4.25)):
        folder = tmp_path / "new" / name
        assert enable_compilation_cache(str(folder), min_compile_seconds=0) == str(folder)
        jax.jit(lambda x, factor=factor: x * factor)(jnp.ones(3))
        assert list(folder.glob("*-cache"))


@pytest.mark.usefixtures("_cache_settings")
def test_where_programs_are_kept(tmp_path, monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    assert enable_compilation_cache("") is None
    assert enable_compilation_cache("default") is None  # on CPUs
    assert jax.config.jax_compilation_cache_dir == before
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    jax.config.update("jax_compilation_cache_dir", None)
    expected = str(tmp_path / "cache" / "dico_jax" / "xla")
    assert enable_compilation_cache("default") == expected
    assert jax.config.jax_compilation_cache_dir == expected
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "given"))
    assert enable_compilation_cache("default") == str(tmp_path / "given")
    assert enable_compilation_cache("gs://bucket/xla") == "gs://bucket/xla"


@pytest.mark.usefixtures("_cache_settings")
def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    before = jax.config.jax_compilation_cache_dir
    assert enable_compilation_cache(str(tmp_path / "file" / "xla")) is None
    assert "warning: config.training.compilation_cache=" in capsys.readouterr().err
    assert jax.config.jax_compilation_cache_dir == before
