r"""DiCo-XL (701.2M parameters) on ImageNet 256x256.

    python -m dico_jax.main --config=configs/xl256.py --workdir=DIR \
        --config.data.path=LATENTS --config.model.dtype=bfloat16

Data: LATENTS made by `python -m dico_jax.prepare latents --image_size=256`, see docs/recipes.md.
Hardware: 8 GPUs with 80 GB, or a TPU slice (not measured yet).
Slice: v5e:4x4 --config.model.dtype=bfloat16 --config.model.scan_blocks=True
    --config.model.remat=dots --config.mesh.fsdp=16
Expected: FID 11.67, IS 100.42 at 400K steps without guidance; FID 2.05, IS 282.17 at
    3,750K steps with guidance 1.4 (paper).
"""

from dico_jax.configs import default


def get_config():
    config = default.get_config()
    config.model.name = "DiCo-XL"
    config.training.num_steps = 3_750_000
    config.training.checkpoint_every_steps = 50_000
    config.sampling.grid_every_steps = 50_000
    return config
