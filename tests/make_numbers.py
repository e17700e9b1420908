"""Writes tests/data/numbers.npz: what this project computes in float64, on weights drawn by recipe.

A small set of numbers that is always there. It was written when every test on the numbers of the
published code passed; write it again only then, and only if a number has to change:

    python -m tests.make_numbers
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dico_jax.checkpoints.state import TrainState
from dico_jax.diffusion import create_diffusion, guided_model_fn, sample_loop
from dico_jax.models import create_model
from dico_jax.training.step import apply_gradients, loss_fn
from tests.golden import drawn_params

FILE = pathlib.Path(__file__).parent / "data" / "numbers.npz"
MODELS = {
    "dico": ("DiCo", {"hidden_size": 8, "depth": (1, 2, 1, 2, 1), "num_classes": 10}),
    "dit": ("DiT", {"hidden_size": 16, "depth": 2, "num_heads": 2, "num_classes": 10}),
}


def compute(name, dtype):
    """Forward, losses, parameters after three steps, and samples of a tiny model, as NumPy."""
    family, options = MODELS[name]
    model = create_model(family, dtype=dtype, **options)
    params = jax.tree.map(lambda p: jnp.asarray(p, dtype), drawn_params(model, 7, "B"))
    rng = np.random.default_rng(0)
    x, noise, z = (jnp.asarray(rng.normal(size=(4, 8, 8, 4)), dtype) for _ in range(3))
    step_noise = jnp.asarray(rng.normal(size=(5, 4, 8, 8, 4)), dtype)
    t, y = jnp.array([1, 30, 500, 999]), jnp.array([0, 3, 10, 9])

    def forward(x, t, y):
        return model.apply({"params": params}, x, t, y)

    out = {"forward": jax.jit(forward)(x, t, y)}
    optimizer = optax.adamw(1e-3, weight_decay=0.0)
    state = TrainState(jnp.zeros((), jnp.int32), params, params, optimizer.init(params))

    @jax.jit
    def train_step(state):
        grads, terms = jax.grad(loss_fn, has_aux=True)(
            state.params, model, create_diffusion(), {"x": x, "condition": {"label": y}}, t, noise
        )
        return apply_gradients(state, grads, optimizer, 0.9)[0], terms

    losses = []
    for _ in range(3):
        state, terms = train_step(state)
        losses.append([terms[name].mean() for name in ("loss", "mse", "vb")])
    out["losses"] = np.array(losses)
    out["ema_norms"] = jnp.stack([jnp.linalg.norm(v) for v in jax.tree.leaves(state.ema_params)])
    model_fn = guided_model_fn(forward, y, 10, 1.5, num_channels=4, cfg_channels="first_three")
    for sampler in ("ddpm", "ddim"):
        out[sampler] = jax.jit(
            lambda z, sampler=sampler: sample_loop(
                create_diffusion("5"), model_fn, z, lambda i: step_noise[i], sampler=sampler,
                clip_denoised=True,
            )
        )(z)  # fmt: skip
    return {key: np.asarray(value) for key, value in out.items()}


def main():
    """Writes the file."""
    with jax.enable_x64(True):
        numbers = {
            f"{name}/{key}": value
            for name in MODELS
            for key, value in compute(name, "float64").items()
        }
    FILE.parent.mkdir(exist_ok=True)
    np.savez_compressed(FILE, **numbers)


if __name__ == "__main__":
    main()
