r"""DiCo-L (463.9M parameters) on ImageNet 256x256.

    python -m dico_jax.main --config=configs/l256.py --workdir=DIR \
        --config.data.path=LATENTS --config.model.dtype=bfloat16

Data: LATENTS made by `python -m dico_jax.prepare latents --image_size=256`, see docs/recipes.md.
Hardware: 8 GPUs with 80 GB, or a TPU slice (not measured yet).
Slice: v5e:4x4 --config.model.dtype=bfloat16 --config.model.scan_blocks=True
    --config.model.remat=dots --config.mesh.fsdp=16
Expected: FID 13.66, IS 91.37 at 400K steps without guidance (paper).
"""

from dico_jax.configs import default


def get_config():
    config = default.get_config()
    config.model.name = "DiCo-L"
    return config
