"""Numbers recorded from the published PyTorch code, and the recipes that draw its weights.

The folder is `$DICO_JAX_GOLDEN`, or `shared/golden` beside the checkout. Tests that read it skip,
with that reason, where it is absent; `tests/data/` holds a small set that is always there.
"""

import hashlib
import math
import os
import pathlib

import numpy as np
import pytest

FOLDER = pathlib.Path(
    os.environ.get("DICO_JAX_GOLDEN")
    or pathlib.Path(__file__).resolve().parents[2] / "shared" / "golden"
)
requires_golden = pytest.mark.skipif(
    not FOLDER.is_dir(), reason=f"no golden numbers at {FOLDER}; set DICO_JAX_GOLDEN"
)


def load(name):
    """The arrays of golden file `name` (.npz) as a dict-like object."""
    return np.load(FOLDER / name)


def draw(shapes, seed, kind, std=0.05):
    """Weights of recipe A, B, I or V for `shapes` (PyTorch key -> shape), float32, as PyTorch."""
    rng = np.random.Generator(np.random.PCG64(seed))
    out = {}
    for key in sorted(shapes):
        shape = tuple(shapes[key])
        fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else 1
        uniform_keys = (".bn.weight", ".bn.running_var") if kind == "I" else ()
        if key.endswith(uniform_keys) or (
            kind == "V" and len(shape) == 1 and not key.endswith(".bias")
        ):
            out[key] = rng.uniform(0.5, 1.5, shape).astype(np.float32)
            continue
        z = rng.standard_normal(shape)
        if kind == "A":
            gain = std
        elif kind == "B":
            gain = (
                0.2
                if key.endswith(".bias")
                else 0.5
                if ".embedding_table" in key
                else math.sqrt(1.0 / fan_in)
            )
        elif kind == "I":
            gain = 0.1 if len(shape) == 1 else math.sqrt((1 if key == "fc.weight" else 2) / fan_in)
        elif kind == "V":
            gain = 0.1 if key.endswith(".bias") else math.sqrt(1.0 / fan_in)
        else:
            raise ValueError(f"unknown recipe {kind!r}")
        out[key] = (z * gain).astype(np.float32)
    return out


def digest(weights):
    """The sha256 that the golden files give with a set of weights."""
    h = hashlib.sha256()
    for key in sorted(weights):
        h.update(key.encode())
        h.update(np.ascontiguousarray(weights[key], dtype="<f4").tobytes())
    return h.hexdigest()


def distance(value, reference):
    """max |value - reference| / max |reference|."""
    reference = np.asarray(reference)
    return float(np.max(np.abs(np.asarray(value) - reference)) / np.max(np.abs(reference)))


def nhwc(x):
    """NCHW to NHWC (also with leading axes)."""
    return np.moveaxis(np.asarray(x), -3, -1)


def drawn_params(model, seed, kind, sha256=None):
    """The parameter tree of a DiCo or DiT with recipe weights, through the production key map."""
    from dico_jax.models import abstract_params
    from dico_jax.pytorch.key_maps import KEY_MAPS
    from tests.state_dicts import from_state_dict, state_dict_shapes

    key_map, abstract = KEY_MAPS[type(model).__name__], abstract_params(model)
    weights = draw(state_dict_shapes(abstract, key_map), seed, kind)
    if sha256 is not None:
        assert digest(weights) == sha256
    return from_state_dict(weights, abstract, key_map)


def flat_outputs(intermediates):
    """Captured module outputs, path joined with "/" to array."""
    import flax

    flat = flax.traverse_util.flatten_dict(intermediates)
    return {"/".join(path[:-1]): value[0] for path, value in flat.items()}


TINY = {
    "hidden_size": 32,
    "depth": (1, 2, 1, 2, 1),
    "mlp_ratio": 2,
    "in_channels": 4,
    "num_classes": 10,
}
TINY_DRAWS = {
    "A": (101, "fd2df2e031a0eee2fd4e5b944eb86b058182a4bb0d1a365ee66c9ea9ae16010a"),
    "B": (102, "de886d6c5e208ce23b6e84d02170cd5b411e88a979a3b9f52839114bb2a6a226"),
}
# max |difference| / max |reference| that the golden README allows, by draw and dtype.
TOLERANCE = {
    ("A", "float32"): 5e-6,
    ("B", "float32"): 1e-5,
    ("A", "float64"): 1e-11,
    ("B", "float64"): 1e-11,
}


INCEPTION_DRAW = (801, "46ea74490ecf7c7486791f3156b82f0f3b753bdfe2b3610e641c61eaa2ae4052")
