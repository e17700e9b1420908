"""Makes images: python -m dico_jax.sample --ckpt=DIR --out=DIR"""

from absl import flags

from dico_jax import cli

_CKPT = flags.DEFINE_string(
    "ckpt", None, "Workdir of a run, or a converted checkpoint.", required=True
)
_OUT = flags.DEFINE_string("out", None, "Folder for 000000.png and on, grid.png.", required=True)
_STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; the newest if not given.")
_WEIGHTS = flags.DEFINE_enum("weights", "ema", ["ema", "params"], "Averaged or raw weights.")
_EMA_WIDTH = flags.DEFINE_float(
    "ema_width", None,
    "In place of --weights: an average of this relative width, such as 0.08, rebuilt from the "
    "snapshots of the run (config.training.ema_snapshot_every_steps); --step is one of theirs.",
)  # fmt: skip
_NUM_IMAGES = flags.DEFINE_integer("num_images", 100, "Number of images.", lower_bound=1)
_CLASSES = flags.DEFINE_string(
    "classes", "all",
    "Classes by number or name, such as 1,2,3 or cat,dog, taken in turn; 'all' for every class in "
    "turn; 'random' for classes drawn from the seed.",
)  # fmt: skip
_VAE = flags.DEFINE_string(
    "vae", None,
    "Weights of the autoencoder: a file, a folder or hf://OWNER/REPO/FILE; or 'preview' for small "
    "false-colour pictures [config].",
)  # fmt: skip
_CFG_SCALE = flags.DEFINE_float("cfg_scale", None, "Guidance scale, 1 for none [config].")
_CFG_CHANNELS = flags.DEFINE_string(
    "cfg_channels", None, "Guided noise channels: first_three (as released) or all [config]."
)
_SAMPLER = flags.DEFINE_string("sampler", None, "ddpm or ddim [config].")
_STEPS = flags.DEFINE_integer("steps", None, "Sampling steps [config].")
_DDIM_ETA = flags.DEFINE_float("ddim_eta", None, "Noise of DDIM, 0 to 1 [config].")
_SEED = flags.DEFINE_integer("seed", 0, "Decides, with an image's index, all its noise.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Images at a time [config].", lower_bound=1)
_NPZ = flags.DEFINE_string(
    "npz", None, "Also write arr_0 (uint8 NHWC) and arr_1 (labels) here, as ADM's evaluator reads."
)


def main() -> None:
    """Parses flags, samples and saves."""
    # Late imports: --help answers before JAX is imported.
    from dico_jax.inference import CheckpointSampler

    overrides = {
        "cfg_scale": _CFG_SCALE.value,
        "cfg_channels": _CFG_CHANNELS.value,
        "sampler": _SAMPLER.value,
        "num_steps": _STEPS.value,
        "ddim_eta": _DDIM_ETA.value,
        "batch_size": _BATCH_SIZE.value,
    }
    sampler = CheckpointSampler(
        _CKPT.value,
        step=_STEP.value,
        weights=_WEIGHTS.value,
        ema_width=_EMA_WIDTH.value,
        seed=_SEED.value,
        overrides={k: v for k, v in overrides.items() if v is not None},
        vae=_VAE.value,
    )
    sampler.save(_OUT.value, num_images=_NUM_IMAGES.value, classes=_CLASSES.value, npz=_NPZ.value)
    print(f"{_NUM_IMAGES.value} images and grid.png are in {_OUT.value}")


if __name__ == "__main__":
    cli.run(main)
