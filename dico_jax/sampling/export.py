"""A sampler as StableHLO with its weights beside it, which runs without this package."""

import dataclasses
import importlib.util
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import export

from dico_jax.autoencoders import to_uint8
from dico_jax.errors import UsageError, within
from dico_jax.experiment import sampling_from_config
from dico_jax.files import check_new, library_versions, new_file, new_folder
from dico_jax.models.class_names import ClassNames
from dico_jax.parallel.mesh import create_mesh
from dico_jax.sampling import run_exported
from dico_jax.sampling.checkpoint_sampler import CheckpointSampler
from dico_jax.sampling.programs import guided_steps, make_latents_fn

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
SYMBOLIC = "symbolic"


def export_sampler(
    source: str, out: str, *, batch_size: str = "8", platforms: Sequence[str] = ("cpu",), **how: Any
) -> str:
    """Writes sampler.stablehlo, weights.npz, meta.json and run.py, which makes images with them.

    Args:
      source: as of `Pretrained`.
      out: the folder to make.
      batch_size: a number, or "symbolic" for any.
      platforms: some of `PLATFORMS`.
      **how: options of `CheckpointSampler`.

    Returns what was done; after a UsageError nothing is left.
    """
    check_new(out, 0)
    if importlib.util.find_spec("flatbuffers") is None:
        raise UsageError("jax.export needs flatbuffers to write files: pip install flatbuffers")
    if unknown := [name for name in platforms if name not in PLATFORMS]:
        raise UsageError("--platforms", unknown[0], f"is unknown: use {', '.join(PLATFORMS)}")
    if batch_size != SYMBOLIC and not (batch_size.isdecimal() and 0 < int(batch_size) < 2**20):
        raise UsageError("--batch_size", batch_size, "must be a number from 1 on, or 'symbolic'")
    sampler = CheckpointSampler(source, **how, mesh=create_mesh(jax.local_devices()[:1]))
    made, sampling = sampler.experiment, sampler.config.sampling
    if made.model.asked_by != "classes":
        fix = f"is told a text ({sampler.config.model.name}), and an export has no encoder of texts"
        raise UsageError("--ckpt", source, fix)
    objective, options = sampling_from_config(sampler.config)
    scales = options.scales(objective)
    steps, guide = guided_steps(scales), sampler.guide
    parts = made.model, objective, made.latent_shape, options
    with within("config."):
        sample_latents = make_latents_fn(*parts, guide=guide and guide.experiment.model)

    def generate(weights, indices, labels, seed, scales):
        tree = unflatten_dict(weights, sep="/")
        how = {"label": labels}, seed, scales, steps, tree.get("guide")
        latents = sample_latents(tree["network"], indices, *how)
        decoded = made.autoencoder.decode(tree.get("decoder", {}), latents)
        finite = [jnp.isfinite(x).all(axis=(1, 2, 3)) for x in (latents, decoded)]
        return to_uint8(decoded), finite[0] & finite[1]

    trees = {"network": sampler.params, "decoder": made.autoencoder.params}
    trees |= {"guide": guide.params} if guide else {}
    weights = {name: np.asarray(x) for name, x in flatten_dict(trees, sep="/").items()}
    check_new(out, int(1.02 * sum(array.nbytes for array in weights.values())))
    count = export.symbolic_shape("n")[0] if batch_size == SYMBOLIC else int(batch_size)
    rows = jax.ShapeDtypeStruct((count,), np.int32)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), weights)
    asked = shapes, rows, rows, np.uint32(0), np.float32(scales)
    try:
        exported = export.export(jax.jit(generate), platforms=tuple(platforms))(*asked)
    except (jax.errors.InconclusiveDimensionOperation, TypeError, ValueError) as error:
        if batch_size != SYMBOLIC:
            raise
        reason = " ".join(str(error).split())[:200]
        fix = f"cannot be had of {sampler.config.model.name}: give a number ({reason})"
        raise UsageError("--batch_size", batch_size, fix) from error
    meta = {
        "batch_size": None if batch_size == SYMBOLIC else int(batch_size),
        "platforms": list(platforms),
        "num_classes": made.model.num_classes,
        "class_names": sampler.class_names,
        "names": ClassNames(made.model.num_classes, sampler.class_names).by_name,
        "guided": steps != "none",
        "cfg_scale": options.cfg_scale,
        # The share of the scale at every point of the path.
        "guidance": (dataclasses.replace(options, cfg_scale=2.0).scales(objective) - 1).tolist(),
        "made_of": sampler.about(),
        "sampling": json.loads(sampling.to_json_best_effort()),
        "versions": library_versions(),
    }
    with new_folder(out) as folder:
        (folder / "sampler.stablehlo").write_bytes(exported.serialize())
        with new_file(folder / "weights.npz", survives=False) as stream:
            np.savez(stream, allow_pickle=False, **weights)
        (folder / "run.py").write_bytes(pathlib.Path(run_exported.__file__).read_bytes())
        (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
    batch = "any batch size" if batch_size == SYMBOLIC else f"batches of {batch_size}"
    return f"{out} is written: {batch}, {', '.join(platforms)}; python {out}/run.py --classes=0"
