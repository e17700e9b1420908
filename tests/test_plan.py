"""What a run needs and takes on devices that are not here."""

import ast
import importlib
import json
import math
import re
import statistics

import jax
import pytest

from dico_jax.checkpoints.reader import saved_steps
from dico_jax.errors import UsageError
from dico_jax.experiment import experiment_from_config
from dico_jax.models import abstract_params, create_model, forward_macs
from dico_jax.planning import aot, estimates, planner, programs, roofline, runs
from dico_jax.planning.chips import CHIPS, parse_topology
from dico_jax.planning.report import plan_text
from dico_jax.planning.search import search
from dico_jax.training.loop import train
from dico_jax.training.program import mesh_from_config, training_program
from dico_jax.training.speed import peak_flops
from tests.commands import ROOT, call
from tests.test_training import tiny_config

needs_libtpu = pytest.mark.skipif(
    not aot.has_libtpu(), reason="compiling for TPU needs the package libtpu"
)


def small_config(**fields):
    """A DiCo that compiles in seconds, of latents."""
    config = tiny_config()
    config.autoencoder.name = "latent_preview"
    config.data.image_size, config.data.batch_size = 64, 8
    config.model.update(name="DiCo", hidden_size=8, depth=(1, 1, 2, 1, 1), mlp_ratio=2.0)
    config.model.update(in_channels=4, num_heads=None, patch_size=None, num_classes=10)
    for field, value in fields.items():
        section, name = field.split("__")
        config[section][name] = value
    return config


def prepared(config, count):
    mesh = mesh_from_config(config, count)
    experiment = experiment_from_config(config, sizes_alone=True)
    return experiment, training_program(config, experiment, mesh), mesh


# Chips and slices.


def test_slices():
    found = parse_topology("v5e:8x8")
    assert (found.chips, found.devices, found.hosts) == (64, 64, 16)
    assert parse_topology("tpu7x:2x2x4").devices == 32
    assert parse_topology("h100:16").hosts == 2
    assert [parse_topology(t).hosts for t in ("v5e:1x1", "v6e:2x4", "v5e:4x4")] == [1, 1, 4]
    assert [parse_topology(t).hosts for t in ("v5p:2x2x1", "v4:2x2x2")] == [1, 2]
    assert parse_topology("v5e:02*4").name == "v5e:2x4"
    assert all(peak_flops(chip.kind) for chip in CHIPS.values())


def test_memory_of_gpus_is_what_jax_takes_of_it(monkeypatch):
    assert parse_topology("h100:8").chip.memory == 0.75 * 79 * 2**30
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    assert parse_topology("h100:8").chip.memory == 0.9 * 79 * 2**30


def test_links_of_all_generations_are_counted_alike():
    """All-reduce bandwidth of a pod in Google's tables is that of its chips in one direction."""
    for name, pod, chips in (("v4", 1.1e15, 4096), ("v5e", 51.2e12, 256), ("v6e", 102.4e12, 256)):
        assert 0.85 < pod / chips / (CHIPS[name].links / 2) < 1.05


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("v5e:3x3", "v5e:2x4"),
        ("v5:4x4", "v5"),
        ("v7x:2x2x1", "tpu7x:2x2x1"),
        ("h1000:8", "h100:8"),
        ("v5p:4x4", "v5p:2x2x4"),
        ("v5e", "v5e:4x4"),
        ("v5e:4x4x", "v5e:4x4"),
        ("a100:12", "a100:16"),
        ("", ""),
    ],
)
def test_an_unknown_slice_has_the_nearest_named(wrong, nearest):
    with pytest.raises(UsageError, match=f"^--topology={wrong} .*the nearest is {nearest}"):
        parse_topology(wrong)


# By sizes.


@pytest.mark.parametrize(
    ("name", "parameters", "giga"),
    [
        ("DiCo-S", 33_137_672, 4.2365),
        pytest.param("DiCo-XL", 701_151_368, 87.221, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("fsdp", [1, 4])
def test_state_and_arithmetic_are_those_of_an_independent_count(name, parameters, giga, fsdp):
    config = small_config(model__name=name, data__image_size=256, mesh__fsdp=fsdp)
    config.model.update(hidden_size=None, depth=None, mlp_ratio=None, num_classes=1000)
    experiment, program, mesh = prepared(config, 4)
    needed = estimates.need(config, experiment, program.target, mesh)
    model = experiment.model
    # Parameters, their average and two moments, float32. Vectors, and the kernels of depthwise
    # convolutions, which are some, are whole on all devices.
    sizes = [(x.size, x.ndim == 1 or 1 in x.shape) for x in jax.tree.leaves(abstract_params(model))]
    assert sum(size for size, _ in sizes) == parameters
    vectors = sum(size for size, vector in sizes if vector)
    split = (parameters - vectors) / fsdp + vectors
    assert needed.total_state == pytest.approx(16 * split, rel=0.001)
    stages = roofline.stages_of(model, 32, 0, 0)
    macs = sum(stage.count * stage.macs for stage in stages)
    assert macs == forward_macs(model, (32, 32, 4)) == pytest.approx(giga * 1e9, rel=0.01)


@pytest.mark.parametrize("remat", ["none", "dots", "blocks"])
def test_what_blocks_keep(remat):
    depths = (1, 2, 1, 1, 3)
    options = {"hidden_size": 16, "mlp_ratio": 2.0, "remat": remat}
    model = create_model("DiCo", depth=depths, **options)
    found = estimates.kept_activations(model, (16, 16, 4))
    whole = estimates._kept_bytes(model, (16, 16, 4))
    assert sum(found.values()) == pytest.approx(whole, rel=1e-6)
    x = 16 * 16 * 32 * 4  # of a block of the last stage
    if remat == "blocks":  # its input alone
        assert found["decoder_level_1"] == 3 * x
    else:
        assert found["decoder_level_1"] > 3 * (5 if remat == "dots" else 11) * x


def small_dit(**fields):
    """A network that is traced in a second."""
    config = small_config(model__name="DiT", model__depth=2, model__hidden_size=32, **fields)
    config.model.update(num_heads=2, patch_size=2, mlp_ratio=None)
    return config


def test_other_networks_have_estimates():
    config = small_dit()
    experiment, program, mesh = prepared(config, 4)
    needed = estimates.need(config, experiment, program.target, mesh)
    assert set(needed.activations) == {"blocks", "between the stages"}
    where = parse_topology("h100:4")
    time = estimates.step_time(config, experiment, needed, [], mesh, where)
    assert 0 < time.total[0] < time.total[1]


def test_what_devices_exchange():
    config = small_config(mesh__fsdp=2, mesh__tensor=2)
    experiment, program, mesh = prepared(config, 8)
    sent = list(estimates.traffic(config, experiment, program.target, mesh))
    assert [t.axis for t in sent] == ["batch", "data", "fsdp", "fsdp", "tensor"]
    assert all(t.wire > 0 for t in sent)


def test_gradients_of_parts_are_summed_part_by_part():
    summed = []
    for parts in (1, 2):
        config = small_dit(training__accumulation_steps=parts)
        mesh = mesh_from_config(config, jax.devices()[:2])
        experiment = experiment_from_config(config, sizes_alone=True)
        program = training_program(config, experiment, mesh)
        (sent,) = estimates.traffic(config, experiment, program.target, mesh)
        where = parse_topology("v5e:2x2")
        planned = planner.estimate(config, where, mesh, experiment, program.target)
        (_, size) = planner.compile_step(planned, program).collectives["all-reduce"]
        assert size == pytest.approx(sent.payload, rel=0.01)
        summed.append(sent.payload)
    assert summed[1] == 2 * summed[0]


def test_activations_are_those_of_a_program_for_cpu():
    """The compiler needs from as much as is kept to 1.5 times that, beside the gradients."""
    config = small_config(data__image_size=256, data__batch_size=32, model__depth=(2, 1, 1, 1, 2))
    planned, program = plan_on_cpus(config)
    found = planner.compile_step(planned, program)
    needed = planned.needed
    assert found.arguments == pytest.approx(needed.total_state + needed.batch, rel=0.01)
    ratio = (found.temporaries - needed.gradients) / sum(needed.activations.values())
    assert 0.9 < ratio < 1.5, ratio


def plan_on_cpus(config):
    patch = pytest.MonkeyPatch()
    with patch.context() as change:
        change.setattr(aot, "slice_devices", lambda where: jax.devices()[: where.devices])
        return planner.prepare(config, parse_topology("v5e:2x2"), compiles=True)


# What the compiler says.

PROGRAM = """HloModule jit_step

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%body (state: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %all-reduce.1 = (bf16[4,8]{1,0}, f32[2]{0}) all-reduce(%x, %y), to_apply=%add
}

%condition (state: (s32[], bf16[4,8])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(9)
  ROOT %less = pred[] compare(%i, %constant.1), direction=LT
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %while.1 = (s32[], bf16[4,8]) while(%x), condition=%condition, body=%body
  %all-gather-start.1 = (bf16[2,8]{1,0}, bf16[8,8]{1,0}) all-gather-start(%w), dimensions={0}
  %all-gather-done.1 = bf16[8,8]{1,0} all-gather-done(%all-gather-start.1)
}
"""


def test_collectives_in_loops_count_as_often_as_they_run():
    found = aot.collectives(PROGRAM)
    assert found == {"all-reduce": (9, 9 * (64 + 8)), "all-gather": (1, 128)}


@pytest.mark.parametrize(
    "text",
    [
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (298.12G) exceeds available HBM (15.75G).",
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
        "hbm. Used 298.12G of 15.75G hbm. Exceeded hbm capacity by 282.37G.",
    ],
)
def test_what_the_compiler_refuses_is_read(text):
    assert aot.DoesNotFit(text).needed == 298.12 * 2**30
    assert math.isnan(aot.DoesNotFit("RESOURCE_EXHAUSTED: of another kind").needed)


@pytest.mark.parametrize("scan", [False, True])
def test_a_plan_from_a_compiled_program(scan, monkeypatch):
    monkeypatch.setattr(aot, "slice_devices", lambda where: jax.devices()[: where.devices])
    monkeypatch.setattr(aot, "has_libtpu", lambda: True)
    config = small_config(model__scan_blocks=scan, mesh__fsdp=2)
    where = parse_topology("v5e:2x2")
    plan = planner.make_plan(config, where, planner.Options(price=2.0))
    assert plan == json.loads(json.dumps(plan))
    memory = plan["sections"]["memory per device"]
    assert plan["fits"]
    assert memory["headroom"]["by"] == "compiled"
    assert ("a save: state twice" in memory) == scan
    assert ("with loops' bodies once" in plan["sections"]["work of a step"]) == scan
    assert {figure["by"] for s in plan["sections"].values() for figure in s.values()} == {
        "analytic", "compiled",
    }  # fmt: skip
    least, most = plan["sections"]["time"]["chip-hours"]["value"]
    assert 0 < least < most
    assert plan["sections"]["time"]["cost by --price"]["value"] == [2 * least, 2 * most]
    text = plan_text(plan)
    assert text.startswith("DiCo on v5e:2x2: fits\n")
    kind = "all-reduce"
    assert any(name.startswith(kind) for name in plan["sections"][
        "communication of a step, per device"])  # fmt: skip


def test_a_run_that_does_not_fit(monkeypatch):
    monkeypatch.setattr(aot, "slice_devices", lambda where: jax.devices()[: where.devices])
    monkeypatch.setattr(aot, "has_libtpu", lambda: True)

    def refuse(*_, **__):
        raise aot.DoesNotFit("RESOURCE_EXHAUSTED: Used 20.00G of 15.75G hbm.")

    monkeypatch.setattr(aot, "compile_program", refuse)
    plan = planner.make_plan(small_config(), parse_topology("v5e:2x2"), planner.Options())
    assert not plan["fits"]
    assert "DOES NOT FIT" in plan_text(plan)
    headroom = plan["sections"]["memory per device"]["headroom"]
    assert headroom["value"] == pytest.approx((15.75 - 20) * 2**30)


def test_what_is_far_too_large_is_not_compiled(monkeypatch):
    monkeypatch.setattr(aot, "slice_devices", lambda where: jax.devices()[: where.devices])
    monkeypatch.setattr(aot, "has_libtpu", lambda: True)
    said = []
    config = small_dit(data__image_size=256, data__batch_size=2**16)
    options = planner.Options(programs=("decode",))
    plan = planner.make_plan(config, parse_topology("v5e:2x2"), options, said.append)
    assert not said
    assert not plan["fits"]
    assert plan["notes"][0].startswith("by sizes it is far too large")


# The command.

TINY = (
    "--config=configs/digits.py",
    "--config.model.hidden_size=8",
    "--config.model.in_channels=4",
    "--config.autoencoder.name=latent_preview",
    "--config.data.image_size=64",
)


def test_the_command_without_a_compiler(tmp_path):
    args = "--topology=h200:8", "--format=json", f"--out={tmp_path / 'plan.json'}"
    done = call("dico_jax.plan", *TINY, *args)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert json.loads((tmp_path / "plan.json").read_text()) == plan
    figures = [f for section in plan["sections"].values() for f in section.values()]
    assert {figure["by"] for figure in figures} == {"analytic"}
    assert plan["notes"][0].startswith("GPUs: nothing is compiled")
    assert plan["config"]["data.batch_size"] == 64


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--topology=v5e:5x5"], "--topology=v5e:5x5 is no slice"),
        (["--topology=v5e:4x4", "--config.mesh.fsdp=3"], "config.mesh.fsdp=3 and"),
        (["--topology=v5e:8x16"], "config.data.batch_size=64 does not divide over 128 devices"),
        (["--topology=v5e:2x2", "--config.training.accumulation_steps=3"], "accumulation_steps=3"),
        (
            ["--topology=v5e:2x2", "--config.model.num_classes=None"],
            "config.model.num_classes=None",
        ),
        (["--topology=v5e:2x2", "--effort=-2"], "--effort"),
        ([], "--topology"),
    ],
)
def test_what_cannot_be_planned_is_one_line(args, said):
    done = call("dico_jax.plan", *TINY, "--nocompile", *args)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") <= 2
    assert not done.stdout


# With libtpu's compiler.


@pytest.mark.slow
@needs_libtpu
def test_a_small_step_compiles_for_a_slice():
    call_args = ["--topology=v5e:2x2", "--format=json", "--effort=-1"]
    done = call("dico_jax.plan", *TINY, *call_args, fresh=True, xla_flags="")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["fits"]
    assert plan["sections"]["memory per device"]["headroom"]["by"] == "compiled"


# Other programs, other settings, and runs.


def test_what_a_run_compiles_besides(monkeypatch):
    monkeypatch.setattr(aot, "slice_devices", lambda where: jax.devices()[: where.devices])
    monkeypatch.setattr(aot, "has_libtpu", lambda: True)
    options = planner.Options(programs=("sample", "decode"))
    config = small_config(mesh__fsdp=2, model__scan_blocks=True)
    sections = planner.make_plan(config, parse_topology("v5e:2x2"), options)["sections"]
    sample, decode = (sections[f"program {name!r}, 16 images"] for name in options.programs)
    assert sample["headroom"]["value"] < decode["headroom"]["value"]
    assert sample["FLOPs of a device, loops' bodies once"]["by"] == "compiled"


@pytest.mark.slow
def test_the_published_decoder_and_features_have_shapes(monkeypatch):
    config = small_config()
    config.autoencoder.name = "sd_vae"
    experiment, program, mesh = prepared(config, 4)
    assert sum(x.size for x in jax.tree.leaves(experiment.autoencoder.shapes())) == 83_653_863
    mesh = mesh_from_config(config, jax.devices()[:4])
    for make in (programs.decoder, programs.features):
        assert make(config, experiment, program.target.ema_params, mesh).flops > 1e9


def test_the_search_finds_what_fits():
    config = small_dit(data__image_size=256, data__batch_size=2**16)
    where = parse_topology("v5e:2x2")
    assert planner.prepare(config, where)[0].memory > where.chip.memory
    found = search(config, where)
    rows = found["ranked"]
    assert found["best"] == rows[0]["flags"] != "as it is"
    assert rows[0]["fits"]
    assert rows[0]["memory_bytes"] < where.chip.memory
    assert "--config.data.batch_size" not in rows[0]["flags"]  # which changes what is learned
    # The flags are those of a run that fits.
    for flag in found["best"].split():
        field, _, value = flag.removeprefix("--config.").partition("=")
        section, name = field.split(".")
        config[section][name] = type(config[section][name])(ast.literal_eval(value)) if (
            value[0].isdigit() or value in ("True", "False")) else value  # fmt: skip
    assert planner.prepare(config, where)[0].memory < where.chip.memory


def test_the_search_of_a_batch_of_one_has_it_as_it_is():
    found = search(small_dit(data__batch_size=1), parse_topology("v5e:1x1"))
    assert "as it is" in [row["flags"] for row in found["ranked"]]
    config = small_dit(data__batch_size=16, training__accumulation_steps=8)
    found = search(config, parse_topology("v5e:1x1"))
    assert found["candidates"] == 3 * 2 * 2 * 4 * 3


def test_what_a_plan_leaves_out_is_said():
    where, options = parse_topology("v5e:1x1"), planner.Options(compiles=False)
    config = small_dit(data__source="folder", diffusion__objective="mean_flow")
    config.autoencoder.name = "latent_preview"
    planned, _ = planner.prepare(small_dit(), where)
    said = " ".join(planner._notes(planned._replace(config=config)))
    assert "pictures of 'folder' are encoded by 'latent_preview' in the run" in said
    assert "'mean_flow'" in said
    both, one = (
        planner.make_plan(small_dit(data__horizontal_flip=flip), where, options)["sections"]["time"]
        for flip in (True, False)
    )
    for two, single in zip(*(t["input of a host"]["value"] for t in (both, one)), strict=True):
        assert two == 2 * single


def test_the_best_settings_are_compiled(monkeypatch):
    monkeypatch.setattr(aot, "slice_devices", lambda where: jax.devices()[: where.devices])
    said = []
    found = search(small_dit(), parse_topology("v5e:1x1"), 1, said.append)
    assert len(said) == 1
    assert [row["memory_by"] for row in found["ranked"]].count("compiled") == 1


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    config = small_run()
    train(config, str(folder))
    return folder


def small_run():
    config = tiny_config()
    config.eval.class_agreement_samples = config.sampling.grid_every_steps = 0
    return config


def test_times_are_scaled_by_a_run(workdir, tmp_path):
    where = parse_topology("v5e:2x2")
    scale = runs.calibration(str(workdir), where)
    speed = runs.recorded_speeds(str(workdir))
    plan = planner.make_plan(small_run(), where, planner.Options(compiles=False, scale=scale))
    least, most = plan["sections"]["time"]["images per second"]["value"]
    assert least < statistics.median(speed) < most == pytest.approx(1.25**2 * least)
    name = "measured step over the middle of its estimate"
    assert plan["sections"]["time"][name] == {"value": scale, "unit": "", "by": "measured"}
    with pytest.raises(UsageError, match="^--calibrate=.* is no workdir of a run"):
        runs.calibration(str(tmp_path), where)
    (tmp_path / "config.json").write_text((workdir / "config.json").read_text())
    with pytest.raises(UsageError, match="has no images_per_second"):
        runs.calibration(str(tmp_path), where)


def test_a_dry_run_writes_nothing(tmp_path, capsys):
    runs.dry_run(small_run(), str(tmp_path / "run"))
    assert not list(tmp_path.iterdir())
    text = capsys.readouterr().out
    assert "steps 0 to 6" in text
    assert "saves 2 times" in text
    assert "for the 6 steps that are left" in text


def test_a_dry_run_goes_on_where_the_run_is(workdir, capsys):
    config = small_run()
    config.training.num_steps = 10
    before = sorted((file, file.stat().st_mtime_ns) for file in workdir.rglob("*"))
    runs.dry_run(config, str(workdir))
    assert "steps 6 to 10" in capsys.readouterr().out
    assert sorted((file, file.stat().st_mtime_ns) for file in workdir.rglob("*")) == before


def test_saved_steps_make_room_for_those_to_come(workdir, monkeypatch):
    config, state = small_run(), 10**6
    config.training.num_steps, config.training.checkpoint_every_steps = 10**4, 10
    config.training.keep_checkpoints = len(saved_steps(workdir))
    usage = runs.shutil.disk_usage(workdir)._replace(free=1.5 * state)
    monkeypatch.setattr(runs.shutil, "disk_usage", lambda _: usage)
    assert "0.00 GB of 0.00 GB" in runs._saves(config, str(workdir), state, 6)
    with pytest.raises(UsageError, match="checkpoints"):
        runs._saves(config, str(workdir / "other"), state, 0)


def test_a_dry_run_refuses_what_does_not_fit(tmp_path, monkeypatch):
    usage = runs.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(runs.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UsageError, match="^--workdir=.* needs .* GB for checkpoints"):
        runs.dry_run(small_run(), str(tmp_path / "run"))
    config = small_run()
    config.data.batch_size = 3
    with pytest.raises(UsageError, match="data.batch_size=3 does not divide"):
        runs.dry_run(config, str(tmp_path / "run"))


def test_a_run_is_compared_with_its_plan(tmp_path, capsys):
    config = small_run()
    plan = planner.make_plan(config, parse_topology("h100:1"), planner.Options())
    config.data.batch_size = 8
    plan["versions"]["jax"] = "0.1"
    found = list(runs.differences(plan, config))
    assert found[0] == "config.data.batch_size is 8, and 16 was planned"
    assert found[1] == "devices is '8 x cpu', and '1 x NVIDIA H100 80GB HBM3' was planned"
    assert found[2].startswith("version of jax is ")
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(plan))
    runs.compare(str(file), config)
    assert capsys.readouterr().err.startswith(
        f"warning: --plan={file}: config.data.batch_size is 8"
    )
    file.write_text("[]")
    with pytest.raises(UsageError, match="^--plan=.* is no plan"):
        runs.compare(str(file), config)


def test_main_takes_both_flags(tmp_path):
    args = ["--config=configs/digits.py", "--config.model.hidden_size=8", "--dry_run"]
    args += ["--config.data.batch_size=8", f"--workdir={tmp_path / 'run'}"]
    file = tmp_path / "plan.json"
    plan = call("dico_jax.plan", *args[:2], "--topology=a100:1", f"--out={file}", "--format=json")
    assert plan.returncode == 0, plan.stderr
    done = call("dico_jax.main", *args, f"--plan={file}")
    assert done.returncode == 0, done.stderr
    assert "config.data.batch_size is 8, and 64 was planned" in done.stderr
    assert "no step was kept" in done.stdout
    assert not (tmp_path / "run").exists()


# Every config names the slice that it is meant for.

CONFIGS = sorted(p.stem for p in (ROOT / "configs").glob("[a-z]*.py") if p.stem != "default")


def slice_of(name):
    """Of a config's file its slice and the flags beside it."""
    found = re.search(
        r"^Slice: (\S+)((?:\s+--\S+)*)$", (ROOT / f"configs/{name}.py").read_text(), re.M
    )
    assert found, name
    return found[1], found[2].split()


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_names_its_slice(name):
    topology, flags = slice_of(name)
    config = importlib.import_module(f"configs.{name}").get_config()
    where = parse_topology(topology)
    for flag in flags:
        field, _, value = flag.removeprefix("--config.").partition("=")
        section, option = field.split(".")
        kind = config[section].get_type(option)
        config[section][option] = kind({"True": 1}.get(value, value))
    mesh_from_config(config, where.devices)


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_fits_its_slice(name):
    topology, flags = slice_of(name)
    args = f"--config=configs/{name}.py", f"--topology={topology}", "--format=json", *flags
    done = call("dico_jax.plan", *args, "--program=none", fresh=True, xla_flags="")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["fits"]
    work = plan["sections"]["work of a step"]  # the bar is 4 minutes on two cores of its own
    assert work["tracing and compiling, of all cores"]["value"] < 240
