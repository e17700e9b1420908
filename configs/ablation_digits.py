"""Parts of DiCo's block on the digits: eight variants, five seeds each, compared with intervals.

    python -m dico_jax.sweep --config=configs/ablation_digits.py --workdir=DIR

Data: the 1,797 digits of 8x8 pixels that come with scikit-learn (pip install -e '.[demo]').
Hardware: two CPU cores, about three minutes for each of the 40 runs.
Slice: v5e:1x1
Expected: docs/results.md.
Chosen here: widths and ratios that leave parameters and multiply-adds near those of the first.
"""

from dico_jax.configs import digits


def get_config():
    config = digits.get_config()
    config.training.num_steps = 600
    config.training.checkpoint_every_steps = 600
    config.training.log_every_steps = 20
    config.sampling.num_steps = 50
    config.sampling.grid_every_steps = 0
    config.eval.every_steps = 600
    config.eval.num_samples = 2_000
    config.eval.features = "classifier"
    config.logging.report = False
    return config


def get_sweep():
    attention = {"model.hidden_size": 22}  # which costs more multiply-adds
    return {
        "variants": {
            "compact": {},
            "squeeze_excite": {"model.channel_attention": "squeeze_excite"},
            "self_attention_of_channels": {"model.channel_attention": "self_attention"} | attention,
            "none": {"model.channel_attention": "none", "model.mlp_ratio": 2.25},
            "relu": {"model.activation": "relu"},
            "kernel_5": {"model.kernel_size": 5},
            "kernel_7": {"model.kernel_size": 7, "model.mlp_ratio": 1.5},
            "self_attention": {"model.mixer": "attention"} | attention,
        },
        "seeds": range(5),
        "metrics": (
            "classifier/fid", "agreement", "spread", "loss", "channels/effective_rank_share",
            "channels/mean_abs_correlation", "channels/dead_share",
        ),
    }  # fmt: skip
