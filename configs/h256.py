r"""DiCo-H (1.04B parameters) on ImageNet 256x256.

    python -m dico_jax.main --config=configs/h256.py --workdir=DIR \
        --config.data.path=LATENTS --config.model.dtype=bfloat16

Data: LATENTS made by `python -m dico_jax.prepare latents --image_size=256`, see docs/recipes.md.
Hardware: 8 GPUs with 80 GB, or a TPU slice (not measured yet).
Expected: FID 1.90 with guidance (paper).
"""

from dico_jax.configs import default


def get_config():
    config = default.get_config()
    config.model.name = "DiCo-H"
    config.training.num_steps = 3_750_000
    config.training.checkpoint_every_steps = 50_000
    config.sampling.grid_every_steps = 50_000
    return config
