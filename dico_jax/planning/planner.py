"""The plan of a run on a slice: figures by section, each with where it comes from."""

import math
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from dico_jax.checkpoints.state import TrainState
from dico_jax.config import config_to_dict, flatten
from dico_jax.errors import UsageError
from dico_jax.experiment import Experiment, experiment_from_config
from dico_jax.models import count_parameters, training_flops
from dico_jax.planning import analytic, aot, compiled, estimates, measured
from dico_jax.planning.chips import SOURCES, Slice
from dico_jax.planning.programs import PROGRAMS
from dico_jax.training.program import TrainingProgram, mesh_from_config, training_program

Figures = dict[str, Any]  # by name `analytic(...)` and its like
NO_LIBTPU = (
    "libtpu is not installed: nothing is compiled, so memory and bytes are estimates, and what "
    "the compiler refuses is not known; pip install libtpu"
)
# Times the chip's memory, by sizes: the compiler, which would search long, finds no way any more.
_HOPELESS = 1.25
_CALIBRATED = 1.25  # the range of a time that a run has scaled: by so much to either side


class Options(NamedTuple):
    """What is planned besides the config and the slice."""

    compiles: bool = True  # where there is a compiler for the chips
    programs: tuple[str, ...] = ()  # of `PROGRAMS`, compiled besides the training step
    price: float | None = None  # of a chip for an hour
    scale: float | None = None  # of the time, from a run's measured step over its estimate


class Planned(NamedTuple):
    """A config on a slice, estimated by sizes."""

    config: ConfigDict
    where: Slice
    mesh: Any
    experiment: Experiment
    target: TrainState  # shapes and shardings of its state
    needed: estimates.Need
    sent: list[estimates.Traffic]
    time: estimates.StepTime

    @property
    def memory(self) -> float:
        """Bytes that one device needs at most, analytic: in a step, or where a run saves."""
        return max(self.needed.step, self.saving)

    @property
    def saving(self) -> float:
        """A state of stacked blocks is copied apart before it is saved."""
        copies = 2 if self.config.model.scan_blocks else 1
        return copies * self.needed.total_state


def estimate(
    config: ConfigDict, where: Slice, mesh: Any, experiment: Experiment, target: TrainState
) -> Planned:
    given = config, experiment, target, mesh
    needed, sent = estimates.need(*given), list(estimates.traffic(*given))
    time = estimates.step_time(config, experiment, needed, sent, mesh, where)
    return Planned(config, where, mesh, experiment, target, needed, sent, time)


def prepare(
    config: ConfigDict, where: Slice, compiles: bool = False
) -> tuple[Planned, TrainingProgram]:
    """UsageError for what main would refuse on such a slice, but for the data."""
    mesh = mesh_from_config(config, aot.slice_devices(where) if compiles else where.devices)
    config = config.copy_and_resolve_references()
    if config.model.num_classes is None:
        raise UsageError("config.model.num_classes", None, "comes from the data: give the number")
    experiment = experiment_from_config(config, sizes_alone=True)
    program = training_program(config, experiment, mesh)
    return estimate(config, where, mesh, experiment, program.target), program


def make_plan(
    config: ConfigDict, where: Slice, options: Options, say: Callable[[str], Any] = str
) -> dict[str, Any]:
    """The result that docs/plan.md describes; `say` is told what is being done."""
    on_tpu = where.chip.platform == "tpu"
    compiles = options.compiles and on_tpu and aot.has_libtpu()
    planned, program = prepare(config, where, compiles)
    found: aot.Found | aot.DoesNotFit | None = None
    notes = [] if compiles else [_why_not(options, on_tpu)]
    if compiles and planned.memory > _HOPELESS * where.chip.memory:
        compiles, notes = False, ["by sizes it is far too large: nothing is compiled"]
    if compiles:
        say(f"compiling the training step for {where.name}")
        found = compile_step(planned, program)
    if isinstance(found, aot.DoesNotFit):
        notes.append(f"the compiler refuses: {found}")
    memory = _memory(planned, found)
    sections = {
        "run": _run(planned),
        "memory per device": memory,
        "activations kept for the backward pass, per device": _activations(planned),
        "work of a step": _work(planned, found),
        "communication of a step, per device": _communication(planned, found),
        "time": _time(planned, options),
    }
    for name in options.programs if compiles else ():
        say(f"compiling {name} for {where.name}")
        sections[f"program {name!r}, {config.sampling.batch_size} images"] = _program(planned, name)
    return {
        "topology": where.name,
        "fits": all(s["headroom"]["value"] >= 0 for s in sections.values() if "headroom" in s),
        "sections": sections,
        "notes": [*notes, *_notes(planned)],
        "devices": {"kind": where.chip.kind, "count": where.devices, "hosts": where.hosts},
        "config": flatten(config_to_dict(planned.config)),
        **aot.about(),
        "flags": {name: os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")},
    }


def _why_not(options: Options, on_tpu: bool) -> str:
    if not on_tpu:
        return "GPUs: nothing is compiled, all is by sizes and data sheets"
    return NO_LIBTPU if options.compiles else "nothing is compiled, as --nocompile asks"


def compile_step(planned: Planned, program: TrainingProgram) -> aot.Found | aot.DoesNotFit:
    """The training step that main compiles first, for the devices of the slice."""
    model, size = planned.experiment.model, planned.config.data.batch_size
    shape = (size, *planned.experiment.latent_shape)
    condition = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct((size, *a.shape[1:]), a.dtype), model.zero_condition(1)
    )
    batch = {"x": jax.ShapeDtypeStruct(shape, np.float32), "condition": condition}
    try:
        return aot.compile_program(program.step, program.stacked, batch)
    except aot.DoesNotFit as error:
        return error


def _run(planned: Planned) -> Figures:
    config, where, model = planned.config, planned.where, planned.experiment.model
    axes = " x ".join(f"{name} {size}" for name, size in dict(planned.mesh.shape).items())
    return {
        "model": analytic(config.model.name),
        "parameters": analytic(count_parameters(model)),
        "devices": analytic(f"{where.devices} x {where.chip.kind} on {where.hosts} hosts"),
        "mesh": analytic(axes),
        "batch": analytic(config.data.batch_size, "images"),
        "of a device": analytic(config.data.batch_size / _batch_shards(planned), "images"),
        "steps": analytic(config.training.num_steps),
    }


def _batch_shards(planned: Planned) -> int:
    return planned.mesh.shape["data"] * planned.mesh.shape["fsdp"]


def _memory(planned: Planned, found: aot.Found | aot.DoesNotFit | None) -> Figures:
    needed, chip = planned.needed, planned.where.chip
    figures: Figures = {name: analytic(size, "bytes") for name, size in needed.state.items()}
    figures["gradients"] = analytic(needed.gradients, "bytes")
    figures["activations"] = analytic(sum(needed.activations.values()), "bytes")
    figures["a step"] = analytic(needed.step, "bytes")
    if planned.config.model.scan_blocks:
        figures["a save: state twice"] = analytic(planned.saving, "bytes")
    peak, make = planned.memory, analytic
    if isinstance(found, aot.Found):
        figures["state and batch, as laid out"] = compiled(found.arguments, "bytes")
        figures["temporaries, not all at one time"] = compiled(found.temporaries, "bytes")
        figures["program"] = compiled(found.code, "bytes")
        figures["a step, compiled"] = compiled(found.memory, "bytes")
        peak, make = max(found.memory, planned.saving), compiled
    elif isinstance(found, aot.DoesNotFit):
        figures["a step, compiled"] = compiled(found.needed, "bytes")
        peak, make = max(found.needed, planned.saving, chip.memory + 1), compiled
    figures["of the chip"] = analytic(chip.memory, "bytes")
    figures["headroom"] = make(chip.memory - peak, "bytes")
    return figures


def _activations(planned: Planned) -> Figures:
    return {name: analytic(size, "bytes") for name, size in planned.needed.activations.items()}


def _work(planned: Planned, found: aot.Found | aot.DoesNotFit | None) -> Figures:
    model, shape = planned.experiment.model, planned.experiment.latent_shape
    devices, size = planned.where.devices, planned.config.data.batch_size
    flops = size * training_flops(model, shape) / devices
    figures: Figures = {"FLOPs of a device": analytic(flops, "FLOP")}
    if not isinstance(found, aot.Found):
        return figures
    once, name = flops, "FLOPs of a device"
    if found.has_loops and model.stages:
        single = model.clone(depth=jax.tree.map(lambda _: 1, model.depth))
        once, name = size * training_flops(single, shape) / devices, "with loops' bodies once"
        figures[name] = analytic(once, "FLOP")
    figures[f"{name}, by XLA"] = compiled(found.flops, "FLOP")
    figures["XLA's over the analytic"] = compiled(found.flops / once)
    figures["bytes accessed" + ", loops' bodies once" * found.has_loops] = compiled(
        found.accessed, "bytes"
    )
    figures["tracing and compiling"] = compiled(found.seconds, "s")
    figures["tracing and compiling, of all cores"] = compiled(found.processor, "s")
    return figures


def _program(planned: Planned, name: str) -> Figures:
    """Of a program that runs while the state of the training lies beside it."""
    state, chip = planned.target, planned.where.chip
    try:
        found = PROGRAMS[name](planned.config, planned.experiment, state.ema_params, planned.mesh)
    except aot.DoesNotFit as error:
        return {"headroom": compiled(min(chip.memory - error.needed, -1), "bytes")}
    beside = planned.needed.total_state
    if name == "sample" and not planned.config.model.scan_blocks:
        beside -= planned.needed.state["parameters"]  # the average is sampled where it lies
    if name == "sample":  # what decodes them afterwards is there already
        weights = jax.tree.leaves(planned.experiment.autoencoder.shapes())
        beside += sum(leaf.size * leaf.dtype.itemsize for leaf in weights)
    loops = ", loops' bodies once" * found.has_loops
    return {
        "arguments": compiled(found.arguments, "bytes"),
        "temporaries": compiled(found.temporaries, "bytes"),
        "most at one time": compiled(found.memory, "bytes"),
        "state of the run beside it": analytic(beside, "bytes"),
        "headroom": compiled(chip.memory - found.memory - beside, "bytes"),
        f"FLOPs of a device{loops}": compiled(found.flops, "FLOP"),
        f"bytes accessed{loops}": compiled(found.accessed, "bytes"),
        "tracing and compiling": compiled(found.seconds, "s"),
    }


def _communication(planned: Planned, found: aot.Found | aot.DoesNotFit | None) -> Figures:
    figures: Figures = {}
    for sent in planned.sent:
        name = f"{sent.kind} over {sent.axis!r}, {sent.times} a step"
        figures[name] = analytic(sent.payload, "bytes")
    if isinstance(found, aot.Found):
        for kind, (count, size) in sorted(found.collectives.items()):
            figures[f"{kind}, {count} a step"] = compiled(size, "bytes")
    return figures


def _time(planned: Planned, options: Options) -> Figures:
    config, where, time = planned.config, planned.where, planned.time
    unit, step = analytic, list(time.total)
    if options.scale:  # what is left open is how another setting differs from the measured one
        middle = options.scale * (step[0] * step[1]) ** 0.5
        step = [middle / _CALIBRATED, middle * _CALIBRATED]
    images = config.data.batch_size
    hours = [config.training.num_steps * t / 3600 for t in step]
    # Prepared latents in float16: means and log variances, also of the mirrored picture.
    example = 2 * 2 * math.prod(planned.experiment.latent_shape) * (1 + config.data.horizontal_flip)
    figures = {
        "network, forward and backward": unit(list(time.compute), "s"),
        "optimizer and averages": unit(list(time.optimizer), "s"),
        "communication": unit(list(time.communication), "s"),
        "step": unit(step, "s"),
        "images per second": unit([images / t for t in step[::-1]]),
        "of the peak": unit([_utilisation(planned, t) for t in step[::-1]]),
        "hours to the last step": unit(hours, "h"),
        "chip-hours": unit([where.chips * h for h in hours], "h"),
        "input of a host": unit(
            [example * images / t / where.hosts for t in step[::-1]], "bytes/s"
        ),
    }
    if options.scale:
        figures["measured step over the middle of its estimate"] = measured(options.scale)
    if options.price is not None:
        figures["cost by --price"] = unit([options.price * where.chips * h for h in hours])
    return figures


def _utilisation(planned: Planned, seconds: float) -> float:
    model, shape = planned.experiment.model, planned.experiment.latent_shape
    flops = planned.config.data.batch_size * training_flops(model, shape) / planned.where.devices
    return flops / seconds / planned.where.chip.flops(model.dtype.name)


def _notes(planned: Planned) -> Iterator[str]:
    chip = planned.where.chip
    yield f"peaks: {SOURCES[chip.platform]}"
    yield (
        "times: at least by the peaks, communication hidden; at most by 40% of peak arithmetic, "
        "60% of the bandwidth with 1.63 times the bytes, half of the links, one after the other"
    )
    data, kind = planned.config.data.source, planned.config.autoencoder.name
    if data not in ("latents", "arrays") and kind != "identity":
        yield f"pictures of {data!r} are encoded by {kind!r} in the run, which is left out here"
    if planned.config.diffusion.objective == "mean_flow":
        yield "the derivative by time that 'mean_flow' takes is left out: it needs and takes more"
    if planned.config.model.scan_blocks and planned.saving > planned.needed.step:
        yield "a save decides the memory: config.mesh.fsdp shares the state among devices"
