r"""Channel attention on CIFAR-10: three variants of a small DiCo of pixels at equal cost.

    python -m dico_jax.sweep --config=configs/ablation_cifar10.py --workdir=DIR \
        --config.data.path=CIFAR-10-images/train \
        --config.eval.features=classifier.npz --config.eval.reference=cifar10.npz

Data: the 50,000 training pictures, in a folder or zip per class: docs/recipes.md; what measures
samples is made once for all runs, see docs/ablations.md.
Hardware: two CPU cores, about thirteen minutes for each of the 3 runs.
Slice: v5e:1x1
Expected: docs/results.md; colours and textures of the classes, no shapes yet.
Chosen here: sizes that two cores train in that time; ratios that leave parameters and multiply-adds
within 4% of the first variant's.
"""

from dico_jax.configs import cifar10


def get_config():
    config = cifar10.get_config()
    config.data.batch_size = 64
    config.model.name = "DiCo"
    config.model.hidden_size = 16
    config.model.depth = (1, 1, 1, 1, 1)
    config.model.mlp_ratio = 2.0
    config.optimizer.learning_rate = 2e-3
    config.training.num_steps = 800
    config.training.ema_decay = 0.99
    config.training.log_every_steps = 20
    config.training.checkpoint_every_steps = 800
    config.sampling.sampler = "dpmpp_2m"
    config.sampling.num_steps = 20
    config.sampling.cfg_scale = 1.0
    config.sampling.batch_size = 100
    config.sampling.grid_every_steps = 800
    config.eval.every_steps = 800
    config.eval.num_samples = 2_000
    config.logging.report = False
    return config


def get_sweep():
    return {
        "variants": {
            "compact": {},
            "squeeze_excite": {"model.channel_attention": "squeeze_excite"},
            "none": {"model.channel_attention": "none", "model.mlp_ratio": 2.25},
        },
        "metrics": (
            "classifier/fid", "classifier/inception_score", "loss",
            "channels/effective_rank_share", "channels/mean_abs_correlation",
            "channels/dead_share",
        ),
    }  # fmt: skip
