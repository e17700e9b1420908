"""The flags of commands that sample a checkpoint: which weights, and how."""

import functools
from typing import Any

from absl import flags

from dico_jax import cli
from dico_jax.errors import UsageError

_CLASSES = flags.DEFINE_string(
    "classes", None,
    "Classes by number from 0 or by name, such as 1,2,3 or cat,dog, taken in turn (#1 is a number "
    "where a class is named 1); 'all' for every class in turn [all]; 'random' for draws from the "
    "seed.",
)  # fmt: skip
_PROMPTS = flags.DEFINE_string(
    "prompts", None,
    "Of a model that is told a text: prompts, taken in turn, between semicolons; a file of one a "
    "line; a file of captions (.json, .jsonl, .csv), of which one of every picture is drawn; or "
    "the validation captions of a protocol of MS-COCO, coco_uvit:FILE (30,000) or coco_repa:FILE "
    "(40,192).",
)  # fmt: skip
_TEXT_ENCODER = flags.DEFINE_string(
    "text_encoder", None, "Weights of CLIP: a folder, a file or hf://OWNER/REPO/FILE [config]."
)
_STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; the newest if not given.")
_WEIGHTS = flags.DEFINE_enum("weights", "ema", ["ema", "params"], "Averaged or raw weights.")
_EMA_WIDTH = flags.DEFINE_float(
    "ema_width", None,
    "In place of --weights: an average of this relative width, such as 0.08, rebuilt from the "
    "snapshots of the run (config.training.ema_snapshot_every_steps); --step is one of theirs.",
)  # fmt: skip
_VAE = flags.DEFINE_string(
    "vae", None,
    "Weights of the autoencoder: a file, a folder or hf://OWNER/REPO/FILE; or 'preview' for small "
    "false-colour pictures [config].",
)  # fmt: skip
_GUIDE = flags.DEFINE_string(
    "guide", None,
    "Autoguidance: a weaker checkpoint, which images are guided away from, in place of no class.",
)  # fmt: skip
_GUIDE_STEP = flags.DEFINE_integer("guide_step", None, "Step of --guide; its newest if not given.")
_SEED = flags.DEFINE_integer(
    "seed", 0, "Decides, with an image's index, all its noise.", 0, 2**32 - 1
)

_USE_ALL_CORES = cli.define_cpu_tuning()

_NAMES = {"num_steps": "steps"}  # of flags, where the field is named otherwise
# A flag for every field of config.sampling that changes an image.
_FIELDS = [name.removeprefix("sampling.") for name in cli.config_fields() if "sampling." in name]
_FIELDS = [f for f in _FIELDS if f != "batch_size" and "grid_" not in f]
_OVERRIDES = cli.define_fields({_NAMES.get(f, f): f"sampling.{f}" for f in _FIELDS}, " [config]")

_WHICH = _CLASSES, _PROMPTS, _TEXT_ENCODER, _STEP, _WEIGHTS, _EMA_WIDTH, _VAE, _GUIDE, _GUIDE_STEP
NAMES = tuple(flag.name for flag in (*_WHICH, _SEED, *_OVERRIDES.values()))


def use_all_cores(*ckpts: str | None) -> None:
    """Does what --cpu_tuning says, before JAX is used, for the weights of checkpoints."""
    from dico_jax.ops.cpu import copies_fit  # late: --help answers before JAX
    from dico_jax.sampling.pretrained import weights_size

    given = *((ckpt, _STEP.value) for ckpt in ckpts), (_GUIDE.value, _GUIDE_STEP.value)
    _USE_ALL_CORES(functools.partial(copies_fit, sum(weights_size(*one) for one in given)))


def asked() -> dict[str, str]:
    """What images are of: {"classes": ...} or {"prompts": ...}, or {} where nothing is said."""
    given = {f.name: f.value for f in (_CLASSES, _PROMPTS) if f.value is not None}
    if len(given) > 1:
        raise UsageError("--classes and --prompts: a model is told one of them")
    return given


def sampler_arguments(batch_size: int | None) -> dict[str, Any]:
    """The arguments of `CheckpointSampler`, but for the checkpoint."""
    overrides = {f: _OVERRIDES[_NAMES.get(f, f)].value for f in _FIELDS}
    overrides["batch_size"] = batch_size
    return {
        "step": _STEP.value,
        "weights": _WEIGHTS.value,
        "ema_width": _EMA_WIDTH.value,
        "seed": _SEED.value,
        "overrides": {name: value for name, value in overrides.items() if value is not None},
        "vae": _VAE.value,
        "text_encoder": _TEXT_ENCODER.value,
        "guide": _GUIDE.value,
        "guide_step": _GUIDE_STEP.value,
    }
