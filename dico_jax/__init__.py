"""DiCo, the Diffusion ConvNet, in JAX and Flax.

The names below are imported when they are used: the commands answer --help before JAX is loaded.
"""

import importlib

__version__ = "0.2.0"
_HOMES = {
    "Sampler": "dico_jax.sampling.sampler",
    "create_diffusion": "dico_jax.diffusion",
    "create_model": "dico_jax.models",
    "fid": "dico_jax.evaluation.fid",
    "load_pytorch": "dico_jax.pytorch.conversion",
    "train": "dico_jax.training.python",
}
__all__ = ["Sampler", "create_diffusion", "create_model", "fid", "load_pytorch", "train"]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
