r"""DiCo-XL (701.2M parameters) on ImageNet 512x512.

    python -m dico_jax.main --config=configs/xl512.py --workdir=DIR \
        --config.data.path=LATENTS --config.model.dtype=bfloat16

Data: LATENTS made by `python -m dico_jax.prepare latents --image_size=512`, see docs/recipes.md.
Hardware: 8 GPUs with 80 GB, or a TPU slice (not measured yet).
Slice: v5e:8x8 --config.model.dtype=bfloat16 --config.model.scan_blocks=True
    --config.model.remat=dots --config.mesh.fsdp=32
Expected: FID 7.48 at 3,000K steps without guidance, 2.53 with guidance (paper).
"""

from dico_jax.configs import default


def get_config():
    config = default.get_config()
    config.model.name = "DiCo-XL"
    config.data.image_size = 512
    config.training.num_steps = 3_000_000
    config.training.checkpoint_every_steps = 50_000
    config.sampling.grid_every_steps = 50_000
    return config
