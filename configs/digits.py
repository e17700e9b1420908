"""Handwritten digits on a laptop: a small DiCo of pixels, trained and judged in minutes.

    python -m dico_jax.main --config=configs/digits.py --workdir=DIR

Data: the 1,797 digits of 8x8 pixels that come with scikit-learn (pip install -e '.[demo]').
Hardware: two CPU cores, under 4 minutes.
Slice: v5e:1x1
Expected: of 500 guided samples at least 98% are taken for the digit that was asked for, by a
classifier that knows the real ones; their spread within a class is at least 0.8 of the real ones'.
"""

from dico_jax.configs import default


def get_config():
    config = default.get_config()
    config.data.source = "digits"
    config.data.image_size = 8
    config.data.batch_size = 64
    config.data.horizontal_flip = False
    config.autoencoder.name = "identity"

    config.model.name = "DiCo"
    config.model.hidden_size = 24
    config.model.depth = (1, 1, 1, 1, 1)
    config.model.mlp_ratio = 2.0
    config.model.in_channels = 1
    config.model.num_classes = 10

    config.optimizer.learning_rate = 2e-3
    config.training.num_steps = 1_500
    config.training.ema_decay = 0.99
    config.training.log_every_steps = 50
    config.training.checkpoint_every_steps = 500

    config.sampling.num_steps = 100
    config.sampling.cfg_scale = 1.4
    config.sampling.cfg_channels = "all"
    config.sampling.batch_size = 100
    config.sampling.grid_every_steps = 500
    config.sampling.grid_rows = 10
    config.sampling.grid_columns = 10

    config.eval.class_agreement_samples = 500
    return config
