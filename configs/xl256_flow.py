r"""DiCo-XL (701.2M parameters) on ImageNet 256x256 by flow matching, as SiT and REPA train.

    python -m dico_jax.main --config=configs/xl256_flow.py --workdir=DIR \
        --config.data.path=LATENTS --config.model.dtype=bfloat16

Data: LATENTS made by `python -m dico_jax.prepare latents --image_size=256`, see docs/recipes.md.
Hardware: 8 GPUs with 80 GB, or a TPU slice (not measured yet).
Slice: v5e:4x4 --config.model.dtype=bfloat16 --config.model.scan_blocks=True
    --config.model.remat=dots --config.mesh.fsdp=16
Expected: unknown: nobody has published DiCo-XL with this objective. SiT-XL/2 has FID 8.3 after
    7,000K steps without guidance, and 2.06 with guidance 1.5 (arXiv 2401.08740).
Facts: the linear path, its velocity, uniform times, AdamW with 1e-4, no decay, batch 256, EMA
    0.9999 and 250 steps of Euler-Maruyama on the SDE are SiT's and REPA's; clipping at norm 1 is
    REPA's alone.
"""

from dico_jax.configs import xl256


def get_config():
    config = xl256.get_config()
    config.model.learn_sigma = False
    config.diffusion.objective = "flow"
    config.diffusion.time_sampling = "uniform"
    config.optimizer.clip_norm = 1.0
    config.sampling.sampler = "euler_maruyama"
    config.sampling.cfg_scale = 1.5
    config.sampling.cfg_channels = "all"
    return config
