r"""DiCo's conv module at one resolution, by flow matching of VA-VAE latents of ImageNet 256x256.

    python -m dico_jax.main --config=configs/iso_flow.py --workdir=DIR \
        --config.data.path=LATENTS --config.model.dtype=bfloat16

Data: LATENTS, a folder of arrays (docs/data.md) with 16x16x32 latents of VA-VAE (f16d32), each
    channel normalised to mean 0 and deviation 1. This package has no VA-VAE: encode with its own
    code, and decode samples with it (grids show three channels).
Hardware: 8 GPUs with 80 GB, or a TPU slice (not measured yet).
Slice: v5e:4x4 --config.model.dtype=bfloat16 --config.model.scan_blocks=True
    --config.model.remat=dots --config.mesh.fsdp=16
Expected: FID 1.33 at 800 epochs (paper: its conv module in LightningDiT's setting, 679M parameters,
    118.3G multiply-adds, 201 images/s where attention has 73).
Known of that setting (arXiv 2501.01423): the latents, patches of one position, width 1152, batch
    1024, learning rate 2e-4, b2 0.95, the linear path and its velocity, logit-normal times, 250
    steps of Euler's method with guidance but for the noisiest times.
Chosen here: DiCo's block as it is, 23 of them with a feed-forward ratio of 6.5, for 677.7M
    parameters and 117.5G multiply-adds, as the paper does not say of what its numbers are made up.
    LightningDiT's SwiGLU, RMSNorm, shifted times of sampling and its loss of the direction of
    velocities are not here; the guidance scale is to be found.
"""

from dico_jax.configs import default


def get_config():
    config = default.get_config()
    config.data.source = "arrays"
    config.data.batch_size = 1024
    config.data.horizontal_flip = False  # latents cannot be mirrored
    config.autoencoder.name = "vavae_preview"

    config.model.name = "IsoDiCo"
    config.model.hidden_size = 1152
    config.model.depth = 23
    config.model.patch_size = 1
    config.model.mlp_ratio = 6.5
    config.model.in_channels = 32
    config.model.learn_sigma = False

    config.diffusion.objective = "flow"
    config.diffusion.time_sampling = "logit_normal"

    config.optimizer.learning_rate = 2e-4
    config.optimizer.b2 = 0.95
    config.training.num_steps = 1_000_000  # 800 epochs of 1,281,167 examples
    config.training.checkpoint_every_steps = 50_000
    config.sampling.sampler = "euler"
    config.sampling.cfg_channels = "all"
    config.sampling.cfg_interval = "0:7"  # LightningDiT's times from 0.125 on
    config.sampling.grid_every_steps = 50_000
    return config
