r"""Your own pictures at 256x256: a DiCo-S of latents that are encoded as training goes.

    python -m dico_jax.main --config=configs/folder.py --workdir=DIR --config.data.path=PICTURES

Data: PICTURES has a subfolder per class (one is enough) with pictures of any size and format in it.
    The classes are counted, nothing else has to be set. For long runs encode ahead instead:
    docs/recipes.md.
Hardware: one GPU (not measured yet).
Slice: v5e:2x2 --config.model.dtype=bfloat16 --config.model.num_classes=10
Expected: depends on the pictures.
"""

from dico_jax.configs import default


def get_config():
    config = default.get_config()
    config.data.source = "folder"
    config.data.batch_size = 64
    config.data.exif_rotation = True
    config.data.max_bad_fraction = 0.05
    config.model.name = "DiCo-S"
    config.model.num_classes = None
    config.training.num_steps = 100_000
    config.training.checkpoint_every_steps = 5_000
    config.sampling.grid_every_steps = 5_000
    return config
