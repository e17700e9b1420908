"""Averages of parameters, their snapshots, and averages of other widths from those."""

import functools
import shutil
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dico_jax.checkpoints.averages import (
    EmaSnapshots,
    Snapshot,
    _log_inner_product,
    list_snapshots,
    rebuild,
    rebuilt_ema,
    snapshot_steps,
    solve_weights,
)
from dico_jax.checkpoints.state import (
    MAX_WIDTH,
    parse_widths,
    power_function_gain,
    update_ema,
    update_width_emas,
    width_name,
    width_to_gamma,
)
from dico_jax.errors import UsageError
from dico_jax.parallel.mesh import create_mesh, replicated

TRACKED = (0.05, 0.10)


def relative_error(found, wanted):
    return np.linalg.norm(np.float64(found) - wanted) / np.linalg.norm(np.float64(wanted))


# One average.


def test_constant_decay():
    ema, params = {"a": jnp.array([1.0])}, {"a": jnp.array([2.0])}
    np.testing.assert_allclose(update_ema(ema, params, 0.9)["a"], [1.1])
    np.testing.assert_array_equal(update_ema(ema, params, 0.0)["a"], params["a"])


def test_gamma_of_published_widths():
    """Section 3.1 of the paper has gamma = 16.97 for 5% and 6.94 for 10%."""
    assert round(width_to_gamma(0.05), 2) == 16.97
    assert round(width_to_gamma(0.10), 2) == 6.94
    assert width_to_gamma(MAX_WIDTH) == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("width", [0.001, 0.05, 0.2, 0.288])
def test_width_is_a_standard_deviation(width):
    gamma = width_to_gamma(width)
    x = (np.arange(2_000_000) + 0.5) / 2_000_000
    density = (gamma + 1) * x**gamma
    mean = (density * x).mean()
    assert np.sqrt((density * (x - mean) ** 2).mean()) == pytest.approx(width, rel=1e-5)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.float32])
def test_decay_in_float32(dtype):
    gain = jax.jit(power_function_gain, static_argnums=1)
    for step in (1, 2, 10, 10_000, 4_000_000):
        for width in (0.01, *TRACKED, 0.25):
            exponent = width_to_gamma(width) + 1
            with np.errstate(divide="ignore"):
                wanted = -np.expm1(exponent * np.log1p(-1 / np.float64(step)))
            found = gain(jnp.asarray(step, dtype), width)
            assert found.dtype == jnp.float32
            assert abs(float(found) - wanted) <= 1e-6 * wanted, (step, width)


@functools.partial(jax.jit, static_argnames="widths")
def averages(trajectory, widths):
    """The averages after each step of a trajectory (T, N), by name, from copies of its start."""
    emas = {width_name(width): trajectory[0] for width in widths}

    def body(emas, inputs):
        params, step = inputs
        emas = update_width_emas(emas, params, step, widths)
        return emas, emas

    return jax.lax.scan(body, emas, (trajectory, 1 + jnp.arange(len(trajectory))))[1]


def test_update_is_the_weighted_mean_of_all_steps():
    trajectory = np.random.default_rng(0).normal(size=(300, 5)).astype(np.float32)
    found = averages(trajectory, TRACKED)
    for width in TRACKED:
        exponent = width_to_gamma(width) + 1
        for count in (1, 2, 300):
            # The integral of the power function over each step.
            edges = (np.arange(count + 1) / count) ** exponent
            wanted = np.diff(edges) @ trajectory[:count]
            np.testing.assert_allclose(found[width_name(width)][count - 1], wanted, atol=2e-6)


def late_average(update, width=0.1, start=3_000_000, num_steps=20_000):
    """Random parameters around 1 and -1 averaged from step `start` on by update(e, p, step)."""
    mean = jnp.where(jnp.arange(64) % 2, 1.0, -1.0)

    def body(ema, step):
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), step), mean.shape)
        params = mean + 0.03 * noise
        return update(ema, params, step), params

    ema, params = jax.jit(
        lambda: jax.lax.scan(body, mean, start + 1 + jnp.arange(num_steps, dtype=jnp.int32))
    )()
    wanted = np.asarray(mean, np.float64)
    for step, p in enumerate(np.asarray(params, np.float64), start + 1):
        wanted += (p - wanted) * (1 - (1 - 1 / step) ** (width_to_gamma(width) + 1))
    return np.mean(np.float64(ema) / wanted - 1)


def test_late_averages_keep_their_size():
    def update(ema, params, step):
        return update_width_emas({width_name(0.1): ema}, params, step, (0.1,))[width_name(0.1)]

    def other(ema, params, step):
        gain = power_function_gain(step, 0.1)
        return ema * (1 - gain) + params * gain

    assert abs(late_average(update)) < 5e-6
    assert abs(late_average(other)) > 2e-5  # its factors are rounded, so their sum is not 1


@pytest.mark.parametrize(
    ("widths", "every", "message"),
    [
        ((0.05, 0.0), 0, "training.ema_widths=(0.05, 0.0) must be different numbers above 0"),
        ((0.29,), 0, "training.ema_widths=(0.29,) must be different numbers above 0 and below 0.2"),
        (("0.1",), 0, "training.ema_widths=('0.1',) must be different numbers"),
        ((float("nan"),), 0, "training.ema_widths=(nan,) must be different numbers"),
        ((0.1, 0.1), 0, "training.ema_widths=(0.1, 0.1) must be different numbers"),
        ((0.1,), -5, "training.ema_snapshot_every_steps=-5 must be at least 0"),
        ((), 5, "training.ema_snapshot_every_steps=5 must be at least 0, and 0 without config"),
    ],
)
def test_wrong_fields(widths, every, message):
    with pytest.raises(UsageError) as error:
        parse_widths(widths, every)
    assert str(error.value).startswith(message)
    assert parse_widths([0.05, 0.1], 5) == (0.05, 0.1)


# Averages of other widths.


def pairs(steps, widths=TRACKED):
    grid = [(step, width) for step in steps for width in widths]
    return [step for step, _ in grid], [width for _, width in grid]


def test_inner_products_are_integrals():
    for t1, width1, t2, width2 in [
        (50, 0.05, 50, 0.05), (50, 0.05, 80, 0.1), (80, 0.1, 50, 0.05), (7, 0.2, 80, 0.03)
    ]:  # fmt: skip
        gamma1, gamma2 = width_to_gamma(width1), width_to_gamma(width2)
        end = min(t1, t2)
        x = (np.arange(1_000_000) + 0.5) / 1_000_000 * end
        product = (gamma1 + 1) / t1 * (x / t1) ** gamma1 * (gamma2 + 1) / t2 * (x / t2) ** gamma2
        found = np.exp(_log_inner_product(t1, gamma1, t2, gamma2))
        assert found == pytest.approx(product.mean() * end, rel=1e-6)


def test_weights_are_those_of_sampled_power_functions():
    steps, widths = pairs([60, 80, 100])
    x = (np.arange(200_000) + 0.5) / 2000

    def density(t, width):
        exponent = width_to_gamma(width)
        return np.where(x < t, (exponent + 1) / t * (np.minimum(x, t) / t) ** exponent, 0)

    columns = np.stack([density(t, w) for t, w in zip(steps, widths, strict=True)], 1)
    wanted = density(100, 0.07)
    # The sum is held by leaving out the last unknown, which is 1 minus the others.
    others = columns[:, :-1] - columns[:, -1:]
    first, *_ = np.linalg.lstsq(others, wanted - columns[:, -1], rcond=None)
    found, misfit = solve_weights(steps, widths, 100, 0.07)
    np.testing.assert_allclose(found, [*first, 1 - first.sum()], atol=2e-4)
    assert found.sum() == pytest.approx(1, abs=1e-12)
    off = np.linalg.norm(columns @ found - wanted) / np.linalg.norm(wanted)
    assert misfit == pytest.approx(off, rel=1e-2)


def test_tracked_widths_need_no_other_snapshot():
    for width, position in ((0.05, -2), (0.10, -1)):
        steps, widths = pairs(range(50, 2001, 50))
        wanted = np.zeros(len(steps))
        wanted[position] = 1
        np.testing.assert_allclose(solve_weights(steps, widths, 2000, width)[0], wanted, atol=1e-10)


def test_weights_of_long_runs_and_narrow_widths():
    steps, widths = pairs(range(40_000, 4_000_001, 40_000), (0.01, 0.02))
    assert width_to_gamma(0.01) > 95
    weights, misfit = solve_weights(steps, widths, 4_000_000, 0.015)
    assert np.isfinite(weights).all()
    assert weights.sum() == pytest.approx(1, abs=1e-9)
    assert misfit < 0.01


# Widths that were not tracked, and how far off they may be, relative to the average's norm. Of
# parameters that stay near where they are, less is lost.
BARS = {
    0.02: (1e-3, 1e-4),
    0.03: (3e-4, 3e-5),
    0.04: (1e-4, 1e-5),
    0.06: (2e-5, 3e-6),
    0.08: (2e-5, 3e-6),
    0.12: (2e-5, 3e-6),
    0.15: (3e-5, 3e-6),
    0.20: (4e-4, 2e-5),
    0.25: (5e-3, 2e-4),
}


@functools.cache
def random_walk(offset):
    """The averages of a random walk of 2,000 steps from random numbers of size `offset`."""
    rng = np.random.default_rng(0)
    walk = rng.normal(size=(2000, 400)).cumsum(0) + offset * rng.normal(size=400)
    return jax.device_get(averages(walk.astype(np.float32), (*TRACKED, *BARS)))


def walk_snapshots(offset, every=50, widths=TRACKED):
    found = random_walk(offset)
    return [
        Snapshot(step, width, lambda s=step, w=width: {"a": found[width_name(w)][s - 1]})
        for step in range(every, 2001, every)
        for width in widths
    ]


@pytest.mark.parametrize("column", [0, 1])
def test_unseen_widths_of_a_random_walk(column):
    offset = (0, 1000)[column]
    snapshots = walk_snapshots(offset)
    for width, bars in BARS.items():
        wanted = random_walk(offset)[width_name(width)]
        found = rebuild(snapshots, 2000, width)["a"]
        assert found.dtype == np.float32
        error = relative_error(found, wanted[-1])
        print(f"offset {offset}, width {width}: off by {error:.1e}")
        assert error < bars[column]
        if 0.04 <= width <= 0.2:  # with half of the snapshots
            error = relative_error(rebuild(snapshots, 1000, width)["a"], wanted[999])
            print(f"offset {offset}, width {width}, step 1000: off by {error:.1e}")
            assert error < 10 * bars[column]


def test_tracked_widths_come_back_to_the_bit():
    for width in TRACKED:
        found = rebuild(walk_snapshots(0), 2000, width)["a"]
        np.testing.assert_array_equal(found, random_walk(0)[width_name(width)][-1])


@pytest.mark.parametrize(
    ("every", "step", "width", "message"),
    [
        (1000, 2000, 0.2, "widths 0.05, 0.1 up to step 2000 (off by 45%): use a width nearer"),
        (50, 2000, 0.003, "cannot be rebuilt from the 80 snapshots"),
        (50, 2000, 0.3, "--ema_width=0.3 must be above 0 and below 0.2887"),
        (50, 2000, -0.1, "--ema_width=-0.1 must be above 0"),
    ],
)
def test_what_cannot_be_rebuilt(every, step, width, message):
    with pytest.raises(UsageError) as error:
        rebuild(walk_snapshots(0, every), step, width)
    assert str(error.value).startswith(f"--ema_width={width}")
    assert message in str(error.value)


def test_snapshots_are_read_one_after_the_other():
    arrays, most, read = [], [], []

    def reader(snapshot):
        def read_tree():
            tree = {"a": snapshot.read()["a"].copy()}
            arrays.append(weakref.ref(tree["a"]))
            most.append(sum(array() is not None for array in arrays))
            read.append(snapshot.step)
            return tree

        return snapshot._replace(read=read_tree)

    snapshots = [reader(s) for s in walk_snapshots(0)]
    found = rebuild(snapshots, 1000, 0.08)
    np.testing.assert_array_equal(found["a"], rebuild(walk_snapshots(0), 1000, 0.08)["a"])
    assert max(most) == 1
    assert 5 < len(read) <= 40  # none after step 1,000
    assert max(read) == 1000


# On disk.


def trees(step):
    """Averages of widths 0.05 and 0.1, as a run has them."""
    rng = np.random.default_rng(step)
    return {
        width_name(width): {
            "block": {"kernel": rng.normal(size=(64, 32)).astype(np.float32)},
            "0": {"bias": rng.normal(size=3).astype(np.float32)},
        }
        for width in TRACKED
    }


def save(workdir, steps, every=2, last_step=None):
    sharding = replicated(create_mesh())
    with EmaSnapshots(workdir, every, last_step) as snapshots:
        for step in steps:
            snapshots.save(step, jax.device_put(trees(step), sharding))


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("kept")
    save(workdir, range(1, 8), last_step=7)
    return workdir


@pytest.fixture
def workdir(kept, tmp_path):
    return shutil.copytree(kept, tmp_path / "run")


def test_snapshots_are_kept_when_they_are_due(kept):
    assert snapshot_steps(str(kept)) == [2, 4, 6, 7]
    found = list_snapshots(str(kept), last_step=6)
    assert [(s.step, s.width) for s in found] == [(s, w) for s in (2, 4, 6) for w in TRACKED]
    for snapshot in found:
        wanted = trees(snapshot.step)[width_name(snapshot.width)]
        jax.tree.map(np.testing.assert_array_equal, snapshot.read(), wanted)
    for step, number in ((None, 7), (4, 4)):
        jax.tree.map(
            np.testing.assert_array_equal,
            rebuilt_ema(str(kept), 0.1, step),
            trees(number)[width_name(0.1)],
        )


def test_nothing_is_kept_unless_asked_for(tmp_path):
    save(tmp_path, range(1, 4), every=0)
    assert list(tmp_path.iterdir()) == []
    assert snapshot_steps(str(tmp_path)) == []
    with pytest.raises(UsageError, match="--ema_width=0.1: .* has no snapshots of averages"):
        rebuilt_ema(str(tmp_path), 0.1)


def test_a_sharded_average_may_be_donated_after_its_save(tmp_path):
    mesh = create_mesh()
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(mesh.axis_names[0]))
    with EmaSnapshots(tmp_path, 1) as snapshots:
        values = jax.device_put(np.arange(4096, dtype=np.float32).reshape(8, 512), split)
        snapshots.save(1, {width_name(0.1): {"a": values}})
        jax.jit(lambda x: x * 0, donate_argnums=0)(values)
    found = rebuilt_ema(str(tmp_path), 0.1)["a"]
    np.testing.assert_array_equal(found, np.arange(4096, dtype=np.float32).reshape(8, 512))


def test_a_run_that_returns_to_an_earlier_step_makes_its_snapshots_anew(workdir):
    with EmaSnapshots(workdir, 2) as snapshots:
        snapshots.save(3, {})
        assert snapshot_steps(str(workdir)) == [2, 4, 6, 7]
        snapshots.save(4, jax.device_put(trees(100)))
    assert snapshot_steps(str(workdir)) == [2, 4]
    wanted = trees(100)[width_name(0.05)]
    jax.tree.map(np.testing.assert_array_equal, rebuilt_ema(str(workdir), 0.05), wanted)


def test_a_half_written_snapshot_is_not_listed_and_is_cleaned_away(workdir):
    folder = workdir / "ema_snapshots"
    half = folder / "8.orbax-checkpoint-tmp-1"
    shutil.copytree(folder / "6", half)
    assert snapshot_steps(str(workdir)) == [2, 4, 6, 7]
    save(workdir, [8])
    assert snapshot_steps(str(workdir)) == [2, 4, 6, 7, 8]
    assert not half.exists()


def change_data(folder, change):
    """Changes the files that have the numbers of the larger array; Orbax keeps one or two."""
    files = [p for p in (folder / "width_0_1").rglob("*") if p.is_file()]
    large = [p for p in files if p.stat().st_size > 4000]
    assert large
    for file in large:
        file.write_bytes(change(file.read_bytes()))


def flip_a_bit(folder):
    change_data(folder, lambda data: data[:2000] + bytes([data[2000] ^ 1]) + data[2001:])


def cut_data(folder):
    change_data(folder, lambda data: data[: len(data) // 2])


def cut_data_without_checksums(folder):
    """As of an older version."""
    (folder / "checksums.json").unlink()
    meta = folder / "meta" / "metadata"
    meta.write_text(meta.read_text().replace('"checksums"', '"nothing"'))
    cut_data(folder)


def remove_meta(folder):
    shutil.rmtree(folder / "meta")


def remove_width(folder):
    shutil.rmtree(folder / "width_0_1")


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (flip_a_bit, "width_0_1"),
        (cut_data, "width_0_1"),
        (cut_data_without_checksums, "width_0_1"),
        (remove_meta, "meta"),
        (remove_width, "width_0_1"),
    ],
)
def test_damaged_snapshots_are_named(damage, part, workdir):
    folder = workdir / "ema_snapshots" / "7"
    damage(folder)
    with pytest.raises(UsageError) as error:
        rebuilt_ema(str(workdir), 0.1)
    for text in (str(folder), part, " is damaged ("):
        assert text in str(error.value)
    assert "\n" not in str(error.value)
    jax.tree.map(
        np.testing.assert_array_equal,
        rebuilt_ema(str(workdir), 0.1, step=6),
        trees(6)[width_name(0.1)],
    )


def test_a_step_without_a_snapshot(kept):
    with pytest.raises(UsageError, match="--step=5: .* of steps 2, 4, 6, 7"):
        rebuilt_ema(str(kept), 0.1, step=5)


def fill_disk(monkeypatch, manager, method):
    """Makes a method of Orbax fail once, as it does when the disk is full."""
    original = getattr(manager, method)

    def fail(*_, **__):
        monkeypatch.setattr(manager, method, original)
        raise ValueError("RESOURCE_EXHAUSTED: Error writing\n local file [os_error_code='28']")

    monkeypatch.setattr(manager, method, fail)


def test_a_full_disk(tmp_path, monkeypatch, capsys):
    with EmaSnapshots(tmp_path, 1) as snapshots:
        fill_disk(monkeypatch, snapshots._writer._manager, "save")
        with pytest.raises(UsageError, match="snapshots: step 2 could not be saved .*: make room"):
            snapshots.save(2, jax.device_put(trees(2)))
    assert snapshot_steps(str(tmp_path)) == []
    snapshots = EmaSnapshots(tmp_path, 1).__enter__()
    fill_disk(monkeypatch, snapshots._writer._manager, "wait_until_finished")
    snapshots.__exit__(KeyError, KeyError("why the run ended"), None)
    assert "could not be saved" in capsys.readouterr().err
