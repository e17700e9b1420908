r"""CIFAR-10 in pixels: a DiCo of 33M parameters at 32x32, without an autoencoder.

    python -m dico_jax.main --config=configs/cifar10.py --workdir=DIR \
        --config.data.path=CIFAR-10-images/train --config.model.dtype=bfloat16

Data: the 50,000 training pictures, in a folder or zip per class, or from TFDS: docs/recipes.md.
Hardware: one GPU (not measured yet).
Slice: v5e:2x2 --config.model.dtype=bfloat16
Expected: recognisable pictures of the ten classes (no FID measured yet).
"""

from dico_jax.configs import default


def get_config():
    config = default.get_config()
    config.data.source = "folder"
    config.data.image_size = 32
    config.autoencoder.name = "identity"

    config.model.name = "DiCo-S"
    config.model.in_channels = 3
    config.model.num_classes = 10

    config.optimizer.learning_rate = 2e-4
    config.training.num_steps = 200_000
    config.sampling.cfg_channels = "all"
    config.sampling.grid_rows = 10
    config.sampling.grid_columns = 10
    return config
