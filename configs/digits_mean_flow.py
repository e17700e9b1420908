"""The handwritten digits of configs/digits.py in one evaluation of the network, by MeanFlow.

    python -m dico_jax.main --config=configs/digits_mean_flow.py --workdir=DIR

Data: the 1,797 digits of 8x8 pixels that come with scikit-learn (pip install -e '.[demo]').
Hardware: two CPU cores, under 5 minutes.
Slice: v5e:1x1
Expected: of 500 samples, of one evaluation each and without guidance, at least 93% are taken for
the digit that was asked for, by a classifier that knows the real ones (98% with two evaluations);
their spread within a class is at least 0.8 of the real ones'.
"""

from dico_jax.configs import digits


def get_config():
    config = digits.get_config()
    config.model.learn_sigma = False
    config.model.plain_ops = True
    config.model.two_times = True
    config.diffusion.objective = "mean_flow"
    config.diffusion.time_sampling = "logit_normal"
    config.diffusion.logit_mean = -0.4
    config.diffusion.time_scale = 1.0  # the target has the derivative by time, which grows with it
    config.training.num_steps = 1_000
    config.sampling.sampler = "jump"
    config.sampling.num_steps = 1
    config.sampling.cfg_scale = 1.0
    return config
