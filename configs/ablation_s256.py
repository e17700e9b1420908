r"""The rows of the paper's tables 4 and 5: networks of DiCo-S's size on ImageNet 256x256.

    python -m dico_jax.main --config=configs/ablation_s256.py --workdir=DIR \
        --config.data.path=LATENTS --config.model.dtype=bfloat16

is DiCo-S, and --config=configs/ablation_s256.py:kernel_7 another row, by a name below.

Data: LATENTS as for configs/s256.py.
Hardware: one GPU with 40 GB or more, or a TPU slice (not measured yet).
Slice: v5e:2x2 --config.model.dtype=bfloat16
Expected: FIDs of the paper at 400K steps without guidance, see docs/ablations.md.
Chosen here: depths and widths of the rows that the paper changes to keep parameters and
    multiply-adds equal, as it does not say them.
"""

from dico_jax.configs import default
from dico_jax.errors import UsageError

DICO = {"name": "DiCo", "hidden_size": 128, "depth": (5, 4, 4, 4, 4), "mlp_ratio": 2.0}
DIT = {"name": "DiT", "hidden_size": 384, "depth": 12, "num_heads": 6, "patch_size": 2}
ISO = {"name": "DiCo", "patch_size": 2, "mlp_ratio": 6.5}

# By name, the fields of `config.model`.
ROWS = {
    # Table 4: layouts of DiT and DiCo. "dit_u" is table 5's self-attention as well.
    "dit_isotropic": DIT,
    "dit_isotropic_skip": DIT | {"layout": "isotropic_skip"},
    "dit_u": DICO
    | {"mixer": "attention", "hidden_size": 112, "depth": (2, 2, 6, 2, 1), "mlp_ratio": 4.0},
    "dico_isotropic": ISO | {"layout": "isotropic", "hidden_size": 384, "depth": 10},
    "dico_isotropic_skip": ISO | {"layout": "isotropic_skip", "hidden_size": 352, "depth": 12},
    "dico_u": DICO,
    # Table 5: parts of DiCo's block.
    "relu": DICO | {"activation": "relu"},
    "kernel_5": DICO | {"kernel_size": 5},
    "kernel_7": DICO | {"kernel_size": 7},
    "no_channel_attention": DICO | {"channel_attention": "none", "depth": (6, 3, 5, 3, 4)},
    "squeeze_excite": DICO | {"channel_attention": "squeeze_excite", "depth": (3, 5, 4, 5, 4)},
    "channel_self_attention": DICO
    | {"channel_attention": "self_attention", "hidden_size": 96, "depth": (4, 7, 8, 7, 4)},
    "window_attention": DICO
    | {"mixer": "window_attention", "hidden_size": 96, "depth": (5, 6, 9, 6, 5)},
}


def get_config(row="dico_u"):
    if row not in ROWS:
        raise UsageError("--config", f"ablation_s256:{row}", f"is no row: use {', '.join(ROWS)}")
    config = default.get_config()
    config.model.update(ROWS[row])
    return config
