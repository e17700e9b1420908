"""Exponential moving averages of parameters."""

import jax


def update_ema(ema, params, decay):
    """Ema * decay + params * (1 - decay), leaf by leaf, in the leaves' own dtype (float32).

    The published code starts from the initial parameters and updates after each optimizer step.
    """
    return jax.tree.map(lambda e, p: e * decay + p * (1 - decay), ema, params)
