"""Other meshes, batches, parts, rematerialisation and dtypes for a run on a slice, ranked."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from dico_jax.checkpoints.state import TrainState
from dico_jax.experiment import Experiment, experiment_from_config
from dico_jax.parallel.mesh import create_mesh, mesh_fits
from dico_jax.parallel.sharding import DEFAULT_RULES, parse_rules, state_sharding
from dico_jax.planning import aot
from dico_jax.planning.chips import Slice
from dico_jax.planning.planner import Planned, compile_step, estimate, prepare
from dico_jax.training.program import placed, state_of

_MARGIN = 1.1  # of what is estimated, before it counts as fitting
SHOWN = 12  # rows of the table


class Candidate(NamedTuple):
    """Fields that differ from the config's, and what is estimated with them."""

    flags: dict[str, Any]
    planned: Planned
    fits: bool
    by: str = "analytic"
    memory: float = 0.0  # of a device, bytes

    def row(self) -> dict[str, Any]:
        """The candidate as JSON."""
        least, most = self.planned.time.total
        images = self.planned.config.data.batch_size
        return {
            "flags": " ".join(f"--config.{k}={v}" for k, v in self.flags.items()) or "as it is",
            "fits": self.fits,
            "memory_by": self.by,
            "memory_bytes": self.memory,
            "step_seconds": [least, most],
            "images_per_second": [images / most, images / least],
        }


def search(
    config: ConfigDict, where: Slice, compiled: int = 0, say: Callable[[str], Any] = str
) -> dict[str, Any]:
    """All candidates estimated, the best `compiled` ones compiled; the fastest that fit first."""
    found = sorted(_candidates(config, where), key=_rank)
    best = [_compiled(candidate, say) for candidate in found[:compiled]]
    ranked = sorted([*best, *found[compiled:]], key=_rank)
    fitting = [candidate for candidate in ranked if candidate.fits]
    return {
        "candidates": len(ranked),
        "best": fitting[0].row()["flags"] if fitting else None,
        "ranked": [candidate.row() for candidate in ranked[:SHOWN]],
    }


def _rank(candidate: Candidate) -> tuple:
    """What fits, by the time of an image, then with few changes, then by memory."""
    time, size = candidate.planned.time.total, candidate.planned.config.data.batch_size
    image = (time[0] * time[1]) ** 0.5 / size
    other_batch = "data.batch_size" in candidate.flags  # which changes what is learned
    return (
        not candidate.fits,
        other_batch,
        float(f"{image:.2g}"),
        len(candidate.flags),
        candidate.memory,
    )


def _candidates(config: ConfigDict, where: Slice) -> Iterator[Candidate]:
    config = config.copy_and_resolve_references()
    experiment = experiment_from_config(config, sizes_alone=True)
    rules = parse_rules(config.mesh.rules) or DEFAULT_RULES
    abstract = jax.eval_shape(state_of(config, experiment)[2], jax.random.key(0))
    made: dict[tuple, Experiment] = {}
    powers = [2**i for i in range(where.devices.bit_length())]
    for fsdp, tensor in itertools.product(powers, (1, 2, 4)):
        if not mesh_fits(where.devices, 0, fsdp=fsdp, tensor=tensor):
            continue
        mesh = create_mesh(where.devices, fsdp=fsdp, tensor=tensor)
        lie = placed(abstract, state_sharding(abstract, mesh, rules))
        for fields in _choices(config):
            fields = {"mesh.data": -1, "mesh.fsdp": fsdp, "mesh.tensor": tensor} | fields
            shards = where.devices // tensor * fields["training.accumulation_steps"]
            if fields["data.batch_size"] % shards == 0:
                yield _candidate(config, where, mesh, lie, fields, made)


def _choices(config: ConfigDict) -> Iterator[dict[str, Any]]:
    batch = config.data.batch_size
    dtypes, parts = {config.model.dtype, "bfloat16"}, {1, 2, 4, config.training.accumulation_steps}
    more = sorted(dtypes), sorted(parts), sorted({batch // 2 or 1, batch, 2 * batch})
    options = (("none", "dots", "blocks"), (False, True), *more)
    names = "model.remat", "model.scan_blocks", "model.dtype", "training.accumulation_steps"
    for values in itertools.product(*options):
        yield dict(zip((*names, "data.batch_size"), values, strict=True))


def _candidate(
    config: ConfigDict, where: Slice, mesh: Any, lie: TrainState, fields: dict, made: dict
) -> Candidate:
    """The candidate with these fields; `made` keeps the networks of all."""
    changed, flags = config.copy_and_resolve_references(), {}
    for field, value in fields.items():
        section, name = field.split(".")
        if changed[section][name] != value:
            changed[section][name] = flags[field] = value
    options = "model.remat", "model.scan_blocks", "model.dtype"
    key = tuple(fields[name] for name in options)
    if key not in made:
        made[key] = experiment_from_config(changed, sizes_alone=True)
    planned = estimate(changed, where, mesh, made[key], lie)
    memory = planned.memory
    return Candidate(flags, planned, _MARGIN * memory <= where.chip.memory, memory=memory)


def _compiled(candidate: Candidate, say: Callable[[str], Any]) -> Candidate:
    """The candidate with the compiler's account of its memory."""
    say(f"compiling the step with {candidate.row()['flags']}")
    planned, program = prepare(candidate.planned.config, candidate.planned.where, compiles=True)
    found = compile_step(planned, program)
    step = found.needed if isinstance(found, aot.DoesNotFit) else found.memory
    memory = max(step, planned.saving)
    fits = isinstance(found, aot.Found) and memory <= planned.where.chip.memory
    return candidate._replace(fits=fits, memory=memory, by="compiled")
