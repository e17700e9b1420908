"""The handwritten digits of configs/digits.py by flow matching.

    python -m dico_jax.main --config=configs/digits_flow.py --workdir=DIR

Data: the 1,797 digits of 8x8 pixels that come with scikit-learn (pip install -e '.[demo]').
Hardware: two CPU cores, under 4 minutes.
Slice: v5e:1x1
Expected: of 500 guided samples at least 98% are taken for the digit that was asked for, by a
classifier that knows the real ones; their spread within a class is at least 0.8 of the real ones'.
Also with --config.sampling.sampler=heun --config.sampling.num_steps=10, of 19 evaluations.
"""

from dico_jax.configs import digits


def get_config():
    config = digits.get_config()
    config.model.learn_sigma = False
    config.diffusion.objective = "flow"
    config.diffusion.time_sampling = "logit_normal"
    config.sampling.sampler = "euler"
    config.sampling.num_steps = 50
    return config
