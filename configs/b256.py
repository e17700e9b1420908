r"""DiCo-B (130.0M parameters) on ImageNet 256x256.

    python -m dico_jax.main --config=configs/b256.py --workdir=DIR \
        --config.data.path=LATENTS --config.model.dtype=bfloat16

Data: LATENTS made by `python -m dico_jax.prepare latents --image_size=256`, see docs/recipes.md.
Hardware: one GPU with 80 GB or more, or a TPU slice (not measured yet).
Slice: v5e:2x4 --config.model.dtype=bfloat16 --config.model.remat=dots
Expected: FID 27.20, IS 56.52 at 400K steps without guidance (paper).
"""

from dico_jax.configs import default


def get_config():
    config = default.get_config()
    config.model.name = "DiCo-B"
    return config
