"""The benchmark: its clock, its counts, its programs, and the command."""

import functools
import json
import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dico_jax import cli
from dico_jax.autoencoders import Autoencoder
from dico_jax.benchmarking import Options, programs, report, runner
from dico_jax.experiment import experiment_from_config, sampling_from_config
from dico_jax.models import MODELS, abstract_params, create_model, forward_macs
from dico_jax.models.dico import DiCo
from dico_jax.models.dit import DiT
from dico_jax.ops import conv
from dico_jax.parallel.mesh import create_mesh, replicated
from dico_jax.sampling.generate import make_generate_fn
from tests import golden
from tests.commands import ROOT, assert_refused, call

TINY = {
    "tiny-DiT": (DiT, {"hidden_size": 16, "depth": 2, "num_heads": 1, "patch_size": 2}),
    "tiny-DiT/4": (DiT, {"hidden_size": 16, "depth": 1, "num_heads": 1, "patch_size": 4}),
    "tiny-DiCo": (DiCo, {"hidden_size": 8, "depth": (1, 2, 1, 1, 1)}),
}
SIZE = 32  # pixels


@pytest.fixture(autouse=True)
def _tiny_models(monkeypatch):
    for name, model in TINY.items():
        monkeypatch.setitem(MODELS, name, model)


def options(action, **changes):
    quick = {"model": "tiny-DiT", "image_size": SIZE, "batch_size": 4, "num_classes": 10}
    quick |= {"warmup": 1, "repeats": 3, "seconds": 0.0, "devices": 2, "ceiling_sizes": (16,)}
    return Options(action, **(quick | changes))


def make_program(action, num_devices=2, **changes):
    config = runner.make_config(options(action, **changes), changes.get("model", "tiny-DiT"))
    mesh = create_mesh(jax.devices()[:num_devices])
    return programs.make_program(action, config, mesh), config, mesh


# Timing.


def fake_functions(durations):
    """A clock, functions that take so many of its seconds, and the list of what has run."""
    now, calls = [0.0], []

    def function(name, duration):
        def run():
            calls.append(name)
            now[0] += duration

        return run

    return lambda: now[0], {n: function(n, d) for n, d in durations.items()}, calls


def test_functions_are_measured_in_turn():
    clock, functions, calls = fake_functions({"a": 2.0, "b": 0.5})
    times = runner.measure(functions, warmup=1, repeats=3, seconds=0.0, clock=clock)
    assert calls == ["a", "b"] * 4
    assert times == {"a": [2.0] * 3, "b": [0.5] * 3}
    # Rounds of 2.5 s until 6 s have passed, and no fewer than `repeats`.
    assert len(runner.measure(functions, 0, 1, seconds=6.0, clock=clock)["b"]) == 3
    assert len(runner.measure(functions, 0, 7, seconds=6.0, clock=clock)["b"]) == 7


def test_summaries_of_times():
    summary = runner.summary([5.0, 1.0, 2.0, 3.0, 4.0])
    assert summary.pop("times_seconds") == [5.0, 1.0, 2.0, 3.0, 4.0]
    assert summary == {
        "median_seconds": 3.0,
        "p10_seconds": pytest.approx(1.4),
        "p90_seconds": pytest.approx(4.6),
        "min_seconds": 1.0,
        "max_seconds": 5.0,
    }


# Counts.


def padding_macs(d, side):
    """Multiply-adds with zeros around the input of DiCo's dense 3x3 convolutions.

    XLA leaves them out, papers and `forward_macs` do not.
    """
    positions = {1: side**2, 2: side**2 // 4, 4: side**2 // 16}
    convolutions = [(1, 4 * d + 2 * d * 8), (1, d * d // 2), (2, 2 * d * d)]
    convolutions += [(4, 4 * d * 8 * d), (2, 2 * d * 4 * d)]
    return sum(
        positions[k] * (9 - (3 - 2 * k / side) ** 2) * channels for k, channels in convolutions
    )


@pytest.mark.parametrize(
    ("name", "sizes", "side"),
    [
        ("DiT", {"hidden_size": 512, "depth": 2, "num_heads": 8}, 16),
        ("DiCo", {"hidden_size": 256, "depth": (1,) * 5}, 32),
    ],
)
def test_counted_flops_agree_with_xla(name, sizes, side, monkeypatch):
    monkeypatch.setattr(conv, "winograd_pays", lambda *_: False)  # it takes fewer
    model = create_model(name, num_classes=10, **sizes)
    x = jax.ShapeDtypeStruct((2, side, side, 4), jnp.float32)
    t = jax.ShapeDtypeStruct((2,), jnp.int32)
    function = jax.jit(lambda params, x, t, y: model.apply({"params": params}, x, t, y))
    found = programs.compile_ahead(function, abstract_params(model), x, t, t)
    macs = forward_macs(model, (side, side, 4))
    counts = programs.xla_counts(found, 1)
    ratio = counts["flops_per_run_by_xla"] / (2 * 2 * macs)
    # XLA's count has operations element by element besides; at these widths they are few.
    lowest = 1 - padding_macs(256, side) / macs if name == "DiCo" else 1
    assert 0.94 < lowest < ratio < 1.03
    assert counts["bytes_accessed_per_run_by_xla"] > 0
    assert counts["no_flops_by_xla_because"] is None
    assert found.trace_seconds > 0
    assert found.compile_seconds > 0


def no_counts(why):
    counts = dict.fromkeys(["flops_per_run_by_xla", "bytes_accessed_per_run_by_xla"])
    return counts | {"no_flops_by_xla_because": why}


def test_flops_are_summed_over_devices_and_loops_have_none():
    flops = [
        programs.xla_counts(make_program("forward", n)[0].compiled, n)["flops_per_run_by_xla"]
        for n in (1, 2)
    ]
    assert flops[1] == pytest.approx(flops[0], rel=0.05)
    looped = programs.compile_ahead(
        jax.jit(lambda x: jax.lax.map(jax.jit(lambda v: v @ v), x)), jnp.zeros((9, 4, 4))
    )
    assert programs.xla_counts(looped, 1) == no_counts(programs.LOOPS_NOTE)


def test_what_xla_does_not_say_is_null():
    silent = types.SimpleNamespace(cost_analysis=lambda: None, memory_analysis=lambda: None)
    program = programs.Compiled(silent, 0.0, 0.0, has_loops=False)
    assert programs.xla_counts(program, 2) == no_counts(programs.NO_COUNT_NOTE)
    assert programs.memory_gb(program) is None


# Programs.


def test_random_parameters_are_nowhere_zero():
    model = create_model("tiny-DiT", num_classes=10)
    params = programs.draw(abstract_params(model), replicated(create_mesh(jax.devices()[:2])))
    for path, leaf in jax.tree.leaves_with_path(params):
        assert np.all(np.asarray(leaf)), path
        assert leaf.sharding.num_devices == 2
    kernel = np.asarray(params["blocks"]["0"]["mlp"]["fc1"]["kernel"])
    assert kernel.std() == pytest.approx(1 / math.sqrt(kernel.shape[0]), rel=0.1)


@pytest.mark.slow
def test_training_goes_from_state_to_state():
    program, config, _ = make_program("train", scan_blocks=True)
    first, second = (jax.device_get(program.run()) for _ in range(2))
    assert first["finite"]
    assert second["finite"]
    assert first["param_norm"] != second["param_norm"]
    model = experiment_from_config(config).model
    assert program.flops == 4 * 3 * 2 * forward_macs(model, (4, 4, 4))
    assert program.compiled.has_loops
    # The new state takes the place of the old one.
    memory = programs.memory_gb(program.compiled)
    assert memory["outputs_not_in_place"] < 0.01 * memory["outputs"]


@pytest.mark.slow
def test_latents_are_those_of_the_sampler():
    program, config, mesh = make_program("sample", steps=3, cfg_scale=2.0)
    experiment = experiment_from_config(config)
    process, sampling = sampling_from_config(config)
    generate = make_generate_fn(
        experiment.model,
        process,
        Autoencoder("quarters", 8, 4, decode=lambda params, x: x / 4),
        experiment.latent_shape,
        sampling,
        mesh,
    )
    params = programs.draw(abstract_params(experiment.model), replicated(mesh))
    indices = np.arange(4, dtype=np.int32)
    conditions = experiment.model.zero_condition(4)  # what programs are run with
    images = np.asarray(generate(params, indices, conditions)[0]).astype(int)
    latents = np.asarray(program.run())
    expected = np.clip(127.5 * latents / 4 + 128, 0, 255).astype(int)
    assert images.std() > 20
    assert np.abs(images - expected).max() <= 1
    # Guidance has two passes per step.
    assert program.flops == 4 * 3 * 2 * 2 * forward_macs(experiment.model, (4, 4, 4))
    plan = programs.plan_sample(
        runner.make_config(options("sample", cfg_scale=1), "tiny-DiT"), mesh
    )
    assert plan.flops == 4 * 250 * 2 * forward_macs(experiment.model, (4, 4, 4))


@pytest.mark.slow
@pytest.mark.parametrize("scan_blocks", [False, True])
@pytest.mark.parametrize("action", programs.PLANS)
def test_every_program_of_dico_runs(action, scan_blocks):
    changes = {"model": "tiny-DiCo", "scan_blocks": scan_blocks, "dtype": "bfloat16", "steps": 2}
    result = runner.run_benchmark(options(action, **changes))
    looped = scan_blocks or action == "sample"
    assert (result["models"][0]["flops_per_run_by_xla"] is None) == looped


def test_ceiling_is_the_best_product():
    found = runner.measure_ceiling(create_mesh(jax.devices()[:2]), "bfloat16", (8, 16), 0.0)
    speeds = [2 * row["size"] ** 3 / row["median_seconds"] for row in found["sizes"]]
    assert found["flops_per_second_per_device"] == max(speeds)
    assert [len(row["times_seconds"]) for row in found["sizes"]] == [5, 5]
    assert [row["size"] for row in found["sizes"]] == [8, 16]
    assert found["dtype"] == "bfloat16"


# Results.


def test_result_of_two_models():
    lines = []
    result = runner.run_benchmark(options("forward", compare=("tiny-DiT/4",)), lines.append)
    assert lines[:2] == ["compiling forward of tiny-DiT", "compiling forward of tiny-DiT/4"]
    result = json.loads(json.dumps(result))
    assert [model["model"] for model in result["models"]] == ["tiny-DiT", "tiny-DiT/4"]
    per_device = result["ceiling"]["flops_per_second_per_device"]
    for model in result["models"]:
        median = model["median_seconds"]
        assert len(model["times_seconds"]) == 3
        assert model["images_per_second"] == pytest.approx(4 / median)
        assert model["flops_per_run"] == 4 * 2 * model["multiply_adds_per_image"]
        assert model["flops_per_second"] == pytest.approx(model["flops_per_run"] / median)
        assert model["mfu_of_ceiling"] == pytest.approx(model["flops_per_second"] / 2 / per_device)
        assert model["mfu_of_maker_peak"] is None  # of CPUs nobody says
        assert model["memory_gb_per_device"]["arguments"] > 0
    first, second = (model["median_seconds"] for model in result["models"])
    assert result["comparison"] == [
        {
            "model": "tiny-DiT",
            "compared_with": "tiny-DiT/4",
            "times_as_fast": pytest.approx(second / first),
        }
    ]
    assert result["devices"] == {"platform": "cpu", "kind": "cpu", "count": 2}
    text = report.result_text(result)
    assert f"tiny-DiT is {second / first:.2f} times as fast as tiny-DiT/4" in text
    assert "on 2 x cpu" in text


def test_maker_peaks_count_per_device(monkeypatch):
    monkeypatch.setattr(runner, "peak_flops", lambda kind: 1e12)
    result = runner.run_benchmark(options("forward", ceiling=False, ceiling_sizes=()))
    row = result["models"][0]
    assert row["mfu_of_ceiling"] is None
    assert row["mfu_of_maker_peak"] == row["flops_per_second"] / 2 / 1e12
    assert "maker's peak: 1 TFLOP/s per device" in report.result_text(result)


def test_numbers_that_are_not_finite_are_refused():
    runner.check_finite({"a": jnp.ones(3), "n": jnp.arange(2)}, "x")
    with pytest.raises(FloatingPointError, match="DiT: the result has numbers"):
        runner.check_finite({"a": jnp.ones(3), "b": jnp.array([1.0, jnp.nan])}, "DiT")


def test_a_real_lack_of_memory_is_one_line(capsys):
    sizes = (10_000_000,)  # more than a processor can address
    wanted = options("forward", repeats=1, ceiling_sizes=sizes)
    with pytest.raises(SystemExit) as ended:
        cli._main(lambda: runner.run_benchmark(wanted), {}, [])
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: out of memory: ")


# The table.


@golden.requires_golden
def test_table_has_the_counts_of_the_published_code():
    published = json.loads((golden.FOLDER / "model_table.json").read_text())
    for size in (256, 512):
        rows = {row["model"]: row for row in table(size)}
        for name, counts in published.items():
            assert rows[name]["multiply_adds_per_image"] == counts[f"macs_{size}"]["total"]
            trainable = counts.get("parameters_trainable", counts["parameters"])
            assert rows[name]["parameters"] == trainable
            if "published" in counts and size == 256:
                parameters, macs = report.PUBLISHED[name]
                assert parameters == f"{counts['published']['parameters_M']:.1f}M"
                assert macs[256] == f"{counts['published']['macs_G']:.2f}G"


_TABLES = {}


def table(size):
    if size not in _TABLES:
        for name in TINY:
            MODELS.pop(name, None)
        _TABLES[size] = report.model_table(size)
    return _TABLES[size]


@functools.cache
def text_table():
    return report.text_table(256)


def test_papers_and_counts_agree():
    compared = 0
    for row in table(256) + table(512):
        for ours, theirs in (
            (row["parameters"], row["published_parameters"]),
            (row["multiply_adds_per_image"], row["published_multiply_adds_per_image"]),
        ):
            if theirs is not None:
                scale = {"M": 1e6, "G": 1e9, "B": 1e9}[theirs[-1]]
                digits = len(theirs[:-1].partition(".")[2])
                rounding = 0.5 * 10**-digits * scale
                # Papers also count normalisation and pooling.
                assert abs(float(theirs[:-1]) * scale - ours) < rounding + 0.004 * ours, row
                compared += 1
    assert compared == 21


def test_documentation_has_the_table():
    text = (ROOT / "docs" / "benchmark.md").read_text()
    assert report.table_text(table(256)) in text
    assert report.text_table_text(text_table()) in text


def test_what_a_text_adds_is_counted():
    for row in text_table():
        model = create_model(row["model"], text_fusion=row["text_fusion"])
        per_step = row["multiply_adds_of_fusion_per_step"]
        whole = row["multiply_adds_without_text"] + per_step
        whole += row["multiply_adds_of_fusion_per_prompt"]
        # The rest are the pooled features, in place of label tables.
        assert 0 < forward_macs(model, (32, 32, 4)) - whole < 0.01 * whole
        if row["model"] == "TextDiCo-S" and row["text_fusion"] == "dwc":
            # Blocks times positions times 81, by width (the paper's table 1).
            widths = 128 * 1024 * 5 + 256 * 256 * 4 + 512 * 64 * 4 + 256 * 256 * 4 + 256 * 1024 * 4
            assert per_step == 81 * widths
            mlps = sum(n * (768 * w + w + w * w + w)
                       for n, w in ((5, 128), (4, 256), (4, 512), (4, 256), (4, 256)))  # fmt: skip
            assert row["parameters_of_fusion"] == mlps


def test_documentation_names_every_field_of_a_result():
    text = (ROOT / "docs" / "benchmark.md").read_text()
    result = runner.run_benchmark(options("forward", devices=1, repeats=1))
    for name in {*result, *result["models"][0], *result["ceiling"], *result["devices"]}:
        assert f"`{name}`" in text, name


# The command.


def test_forward_by_command(tmp_path):
    out = tmp_path / "forward.json"
    args = ["forward", "--model=DiT-S/8", "--image_size=64", "--batch_size=2", "--warmup=0"]
    args += ["--repeats=2", "--seconds=0", "--ceiling_sizes=32", f"--out={out}"]
    done = call("dico_jax.benchmark", *args, devices=2)
    assert done.returncode == 0, done.stderr
    assert re.search(r"images per second +[\d.]+\n", done.stdout)
    result = json.loads(out.read_text())
    assert result["settings"]["model"] == "DiT-S/8"
    assert result["devices"]["count"] == 2
    assert result["models"][0]["parameters"] == 33_142_016
    assert result["argv"] == ["dico_jax.benchmark", *args]
    assert {"jax", "jaxlib", "dico_jax", "python"} <= set(result["versions"])
    again = call("dico_jax.benchmark", *args, devices=2)
    assert_refused(again, f"--out={out} exists")


def test_table_by_command(tmp_path):
    out = tmp_path / "table.json"
    done = call("dico_jax.benchmark", "table", "--image_size=512", f"--out={out}")
    assert done.returncode == 0, done.stderr
    assert report.table_text(table(512)) in done.stdout
    assert json.loads(out.read_text())["models"] == table(512)


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["fly"], ["'fly' is unknown", "benchmark forward", "benchmark table"]),
        ([], ["what to do is missing"]),
        (["forward", "--model=DiCo-M"], ["--model='DiCo-M' is unknown", "'DiCo-S'"]),
        (["forward", "--compare=DiT-M/2"], ["--compare='DiT-M/2' is unknown", "'DiT-"]),
        (["forward", "--compare=DiCo-S"], ["--compare=DiCo-S is measured already"]),
        (["forward", "--image_size=100"], ["--image_size=100", "use 96 or 128"]),
        (["forward", "--batch_size=3"], ["--batch_size=3 does not divide over 2", "2 or 4"]),
        (["forward", "--devices=3"], ["--devices=3: there are 2"]),
        (["forward", "--dtype=float16"], ["dtype", "float16", "bfloat16"]),
        (["forward", "--steps=2"], ["--steps is for sample, not for forward"]),
        (["forward", "--noceiling", "--ceiling_sizes=8"], ["--ceiling_sizes has no effect"]),
        (["forward", "--ceiling_sizes=8,x"], ["--ceiling_sizes=8,x: give numbers"]),
        (["train", "--remat=all"], ["--remat='all' is unknown", "dots"]),
        (["sample", "--steps=0"], ["steps", "0"]),
        (["sample", "--steps=2000"], ["--steps=2000", "1000 timesteps"]),
        (["sample", "--cfg_scale=-1"], ["--cfg_scale=-1.0 must be at least 0"]),
        (["table", "--image_size=96"], ["--image_size=96", "use 64 or 128"]),
        (["table", "--model=DiCo-S"], ["--model is for", "not for table"]),
        (["table", "--out=/no/such/folder/x.json"], ["there is no folder /no/such/folder"]),
    ],
)
def test_benchmark_refuses(args, parts):
    assert_refused(call("dico_jax.benchmark", *args, devices=2), *parts)
