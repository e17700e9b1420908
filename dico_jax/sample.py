"""Makes images: python -m dico_jax.sample --ckpt=DIR --out=DIR"""

from absl import flags

from dico_jax import cli
from dico_jax.sampling import flags as sampler_flags

_CKPT = flags.DEFINE_string(
    "ckpt", None,
    "Workdir of a run, a converted checkpoint, or a file of PyTorch weights; also hf://OWNER/REPO.",
    required=True,
)  # fmt: skip
_OUT = flags.DEFINE_string("out", None, "Folder for 000000.png and on, grid.png.", required=True)
_NUM_IMAGES = flags.DEFINE_integer(
    "num_images", None, "Number of images [100; one of each of --prompts].", 1, 10_000_000
)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Images at a time [config].", lower_bound=1)
for _module in (cli, sampler_flags):
    flags.adopt_module_key_flags(_module)  # so that --help shows them
_NPZ = flags.DEFINE_string(
    "npz", None, "Also write arr_0 (uint8 NHWC) and arr_1 (labels) here, as ADM's evaluator reads."
)
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace the file of --npz.")


def main() -> None:
    """Parses flags, samples and saves."""
    # Late imports: --help answers before JAX is imported.
    sampler_flags.use_all_cores(_CKPT.value)
    from dico_jax.sampling import image_folder
    from dico_jax.sampling.checkpoint_sampler import CheckpointSampler

    image_folder.check_outputs(_OUT.value, _NPZ.value, _OVERWRITE.value)
    how = sampler_flags.sampler_arguments(_BATCH_SIZE.value)
    sampler = CheckpointSampler(_CKPT.value, **how)
    asked = sampler_flags.asked()
    count = _NUM_IMAGES.value or sampler.default_number(**asked)
    image_folder.save(sampler, _OUT.value, num_images=count, npz=_NPZ.value, **asked)
    print(f"{count} images and grid.png are in {_OUT.value}")


if __name__ == "__main__":
    cli.run(main)
