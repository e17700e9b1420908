r"""DiCo-H (1.04B parameters) on ImageNet 256x256.

    python -m dico_jax.main --config=configs/h256.py --workdir=DIR \
        --config.data.path=LATENTS --config.model.dtype=bfloat16

Data: LATENTS made by `python -m dico_jax.prepare latents --image_size=256`, see docs/recipes.md.
Hardware: 8 GPUs with 80 GB, or a TPU slice (not measured yet).
Slice: v5e:8x8 --config.model.dtype=bfloat16 --config.model.scan_blocks=True
    --config.model.remat=dots --config.mesh.fsdp=32
Expected: FID 1.90, IS 284.31 at 1,000K steps of batch 1024 with guidance (paper).
"""

from dico_jax.configs import default


def get_config():
    config = default.get_config()
    config.model.name = "DiCo-H"
    config.data.batch_size = 1024
    config.optimizer.learning_rate = 2e-4
    config.optimizer.b1 = config.optimizer.b2 = 0.99
    config.optimizer.warmup_steps = 5_000
    config.training.num_steps = 1_000_000
    config.training.checkpoint_every_steps = 50_000
    config.sampling.grid_every_steps = 50_000
    return config
