"""The training step of a config on a mesh, and how its state lies there: a run's, or a plan's."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dico_jax.checkpoints.state import TrainState, initializer, parse_widths
from dico_jax.errors import UsageError, within
from dico_jax.experiment import Experiment
from dico_jax.models.block_stacks import map_stacks, stack_shardings
from dico_jax.parallel.mesh import AXES, check_batch_size, create_mesh, num_batch_shards
from dico_jax.parallel.sharding import DEFAULT_RULES, parse_rules, state_sharding
from dico_jax.training.optimizer import create_optimizer
from dico_jax.training.step import TrainStep, make_train_step


class TrainingProgram(NamedTuple):
    """What a run compiles first; nothing is computed yet."""

    init: Callable[[jax.Array], TrainState]  # from a key to a fresh state, blocks apart
    target: TrainState  # shapes and shardings of a state of checkpoints
    stacked: TrainState  # those of the state that the step takes
    step: TrainStep


def mesh_from_config(config: ConfigDict, devices: Any = None) -> Mesh:
    """The mesh of a run on all devices, or these; UsageError where its batch does not divide."""
    with within("config."):
        mesh = create_mesh(devices, **{axis: config.mesh[axis] for axis in AXES})
        parse_rules(config.mesh.rules)
    shards, parts = num_batch_shards(mesh), config.training.accumulation_steps
    check_batch_size(size := config.data.batch_size, shards, "config.data.batch_size")
    if size % (shards * parts):
        fix = f"does not divide the {size // shards} examples of a batch on each device"
        raise UsageError("config.training.accumulation_steps", parts, fix)
    return mesh


def state_of(config: ConfigDict, experiment: Experiment) -> tuple[Any, tuple, Any]:
    """The optimizer, the relative widths of averages, and what makes a fresh state from a key."""
    training = config.training
    optimizer = create_optimizer(config.optimizer, training.num_steps)
    widths = parse_widths(training.ema_widths, training.ema_snapshot_every_steps)
    return (
        optimizer,
        widths,
        initializer(experiment.model, optimizer, experiment.latent_shape, widths),
    )


def training_program(config: ConfigDict, experiment: Experiment, mesh: Mesh) -> TrainingProgram:
    """The program of a checked config; UsageError for a field of it that cannot work."""
    training, model = config.training, experiment.model
    with within("config."):
        rules = parse_rules(config.mesh.rules) or DEFAULT_RULES
        optimizer, widths, init = state_of(config, experiment)
        abstract = jax.eval_shape(init, jax.random.key(0))
        sharding = state_sharding(abstract, mesh, rules)
    stages = model.stacked_stages
    stacked = jax.eval_shape(
        lambda state: map_stacks(lambda *leaves: jnp.stack(leaves), state, stages), abstract
    )
    places = stack_shardings(sharding, stages)
    options: dict[str, Any] = {"seed": config.seed, "mesh": mesh, "sharding": places}
    options |= {"ema_widths": widths, "skip_bad_steps": training.on_nan == "skip"}
    options |= {name: training[name] for name in ("ema_decay", "accumulation_steps")}
    step = make_train_step(model, experiment.diffusion, optimizer, **options)
    return TrainingProgram(init, placed(abstract, sharding), placed(stacked, places), step)


def placed(abstract: Any, sharding: Any) -> Any:
    """Shapes with the shardings of a tree like them."""
    return jax.tree.map(lambda a, s: a.update(sharding=s), abstract, sharding)
