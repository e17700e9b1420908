"""Makes images: python -m dico_jax.sample --ckpt=DIR --out=DIR

docs/sampling.md explains what lies in the folder.
"""

import sys
from typing import Any

from absl import flags

from dico_jax import cli
from dico_jax.errors import UsageError
from dico_jax.sampling import flags as sampler_flags

_CKPT = flags.DEFINE_string(
    "ckpt", None,
    "Workdir of a run, a converted checkpoint, or a file of PyTorch weights; also hf://OWNER/REPO.",
    required=True,
)  # fmt: skip
_OUT = flags.DEFINE_string("out", None, "Folder for 000000.png and on, grid.png.")
_NUM_IMAGES = flags.DEFINE_integer(
    "num_images", None, "Number of images [100; one of each of --prompts].", 1, 10_000_000
)
_PER_CLASS = flags.DEFINE_integer(
    "per_class", None, "In place of --num_images: images of each of --classes.", 1, 10_000_000
)
_LIST_CLASSES = flags.DEFINE_bool(
    "list_classes", False, "Print the numbers and names of the classes, and make no images."
)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Images at a time [config].", lower_bound=1)
_NPZ = flags.DEFINE_string(
    "npz", None, "Also write arr_0 (uint8 NHWC) and arr_1 (labels) here, as ADM's evaluator reads."
)
_SAVE_LATENTS = flags.DEFINE_bool(
    "save_latents", False, "Also write latents.npy, what the network makes: float32 (N, H, W, C)."
)
_TRAJECTORY = flags.DEFINE_bool(
    "trajectory", False, "Also write trajectory.gif and trajectory.png: how the first images arise."
)
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace the file of --npz.")
_JOIN = cli.define_distributed_flags()
for _module in (cli, sampler_flags):
    flags.adopt_module_key_flags(_module)  # so that --help shows them


def main() -> None:
    """Parses flags, samples and saves."""
    if _LIST_CLASSES.value:
        _list_classes()
        return
    asked: Any = sampler_flags.asked()
    if _OUT.value is None:
        raise UsageError("--out is missing: name a folder for the images")
    if _PER_CLASS.value and _NUM_IMAGES.value:
        raise UsageError("--per_class and --num_images: give one of them")
    if _PER_CLASS.value and ("prompts" in asked or asked.get("classes") == "random"):
        raise UsageError("--per_class", _PER_CLASS.value, "is for --classes that are named, or all")
    # Late imports: --help answers before JAX is imported.
    from dico_jax.sampling import image_folder

    image_folder.check_outputs(_OUT.value, _NPZ.value, _OVERWRITE.value, _SAVE_LATENTS.value)
    sampler_flags.use_all_cores(_CKPT.value)  # which may fetch the weights
    _JOIN()
    import jax

    from dico_jax.parallel.mesh import create_mesh
    from dico_jax.parallel.processes import Heartbeat
    from dico_jax.sampling.checkpoint_sampler import CheckpointSampler

    with Heartbeat(lambda: "the same command goes on with the images that are missing"):
        how: Any = sampler_flags.sampler_arguments(_BATCH_SIZE.value)
        mesh = create_mesh(jax.local_devices())  # each process makes images of its own
        sampler = CheckpointSampler(_CKPT.value, **how, mesh=mesh, with_latents=_SAVE_LATENTS.value)
        is_first = jax.process_index() == 0
        scale = sampler.about()["sampling"]["cfg_scale"]
        if scale < 1 and is_first:
            said = "leads away from what is asked for; 1 is without guidance"
            print(f"warning: --cfg_scale={scale} is below 1: it {said}", file=sys.stderr)
        how = {"npz": _NPZ.value, "trajectory": _TRAJECTORY.value}
        how |= {"num_images": _NUM_IMAGES.value, "per_class": _PER_CLASS.value}
        count = image_folder.save(sampler, _OUT.value, **how, **asked)
        if is_first:
            print(f"{count} images and grid.png are in {_OUT.value}")


def _list_classes() -> None:
    from ml_collections import ConfigDict

    from dico_jax.experiment import model_from_config
    from dico_jax.models.class_names import ClassNames
    from dico_jax.sampling.pretrained import open_weights

    saved = open_weights(_CKPT.value)  # which reads no weights
    model = model_from_config(ConfigDict(saved.config))
    if model.asked_by != "classes":
        raise UsageError("--list_classes", True, f": {type(model).__name__} has no classes")
    print("\n".join(ClassNames(model.num_classes, saved.class_names).lines()))


if __name__ == "__main__":
    cli.run(main)
