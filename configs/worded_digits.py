"""Digits from their description in words: text to image on a laptop, without any download.

    python -m dico_jax.main --config=configs/worded_digits.py --workdir=DIR
    python -m dico_jax.sample --ckpt=DIR --out=DIR/out --prompts="a thin seven leaning far right"

Data: the digits of scikit-learn (pip install -e '.[demo,text]'), with captions made of what is
measured on each: class, stroke thickness, slant, size and position (`dico_jax.data.worded_digits`).
Their words are read by a small encoder that is trained along.
Hardware: two CPU cores, under 6 minutes.
Slice: v5e:1x1
Expected: of 500 guided samples 95% show the digit asked for; Spearman's correlation of what is
    asked with what is drawn is 0.7 for stroke thickness and slant (benchmarks/worded_digits.py).
Options: --config.model.text_fusion=cross_attention.
"""

from dico_jax.configs import default
from dico_jax.data.worded_digits import VOCABULARY


def get_config():
    config = default.get_config()
    config.data.source = "worded_digits"
    config.data.image_size = 8
    config.data.batch_size = 32
    config.data.horizontal_flip = False
    config.autoencoder.name = "identity"

    config.model.name = "TextDiCo"
    config.model.hidden_size = 24
    config.model.depth = (1, 1, 1, 1, 1)
    config.model.mlp_ratio = 2.0
    config.model.in_channels = 1
    config.model.text_fusion = "dwc"
    config.model.text_length = 77
    config.model.text_width = 32
    config.model.pooled_width = 32
    config.text.encoder = "words"
    config.text.words = VOCABULARY

    config.optimizer.learning_rate = 2e-3
    config.training.num_steps = 2_000
    config.training.ema_decay = 0.99
    config.training.log_every_steps = 50
    config.training.checkpoint_every_steps = 1_000

    config.sampling.num_steps = 50
    config.sampling.cfg_scale = 2.0
    config.sampling.cfg_channels = "all"
    config.sampling.batch_size = 100
    config.sampling.grid_every_steps = 1_000
    config.sampling.grid_rows = 10
    config.sampling.grid_columns = 10

    config.eval.class_agreement_samples = 500
    return config
