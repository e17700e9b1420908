"""Sampling trajectories against the published PyTorch code, step by step."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dico_jax.diffusion import create_diffusion, guided_model_fn, sample_loop
from dico_jax.models import create_model
from tests import golden
from tests.golden import TINY, TINY_DRAWS, distance, nhwc

pytestmark = golden.requires_golden
CONFIG = json.loads(str(golden.load("sampling.npz")["config"])) if golden.FOLDER.is_dir() else {}
LOOPS = {loop["name"]: loop for loop in CONFIG.get("loops", [])}
# All in float64, which is the strict one; in float32 one of each sampler, the clipped one too.
FLOAT32 = {("r10", "ddpm_clip_cfg"), ("r10", "ddim1"), ("r25", "ddpm_cfg"), ("r25", "ddim0")}
CASES = [
    pytest.param(
        name, kind, dtype,
        marks=pytest.mark.slow if dtype == "float32" and (name, kind) not in FLOAT32 else (),
    )
    for name in LOOPS
    for kind in CONFIG.get("kinds", [])
    for dtype in ("float32", "float64")
]  # fmt: skip


@pytest.mark.parametrize(("name", "kind", "dtype"), CASES)
def test_trajectory(name, kind, dtype):
    g, loop = golden.load("sampling.npz"), LOOPS[name]
    guided, clip = kind.endswith("_cfg"), kind.startswith("ddpm_clip")
    bar = 1e-9 if dtype == "float64" else 5e-5 if clip else 1e-5
    with jax.enable_x64(dtype == "float64"):
        model = create_model("DiCo", dtype=dtype, **TINY)
        draw = loop["rec"]
        params = golden.drawn_params(model, TINY_DRAWS[draw][0], draw)
        params = jax.tree.map(lambda p: jnp.asarray(p, dtype), params)
        z = jnp.asarray(nhwc(g[f"{name}/z"]), dtype)
        # Noise of the first half of the guided batch, in order of use: the last timestep first.
        noise = jnp.asarray(nhwc(g[f"{name}/NOISE"])[:, : len(z)], dtype)
        diffusion = create_diffusion(timestep_respacing=loop["respacing"])

        @jax.jit
        def run(z):
            model_fn = guided_model_fn(
                lambda x, t, y: model.apply({"params": params}, x, t, y),
                jnp.asarray(g[f"{name}/y"]),
                model.null_class,
                CONFIG["scale"] if guided else 1.0,
                num_channels=4,
                cfg_channels="first_three",
            )
            return sample_loop(
                diffusion,
                model_fn,
                z,
                lambda i: noise[len(noise) - 1 - i],
                sampler="ddim" if kind.startswith("ddim") else "ddpm",
                eta=1.0 if kind.startswith("ddim1") else 0.0,
                clip_denoised=clip,
                return_trajectory=True,
            )

        samples, trajectory = run(z)
    steps = nhwc(g[f"{name}/{kind}/steps_f64"])[:, : len(z)]
    assert trajectory[0].shape == steps.shape
    for i, (ours, reference) in enumerate(zip(trajectory[0], steps, strict=True)):
        assert distance(ours, reference) < bar, f"step {i}"
    first = nhwc(g[f"{name}/{kind}/first_pred_x0_f64"])[: len(z)]
    # x_0 from noise at the last timestep is 50 to 160 times x before it is clipped to 1.
    assert distance(trajectory[1][0], first) < bar * (160 if clip and dtype == "float32" else 1)
    assert distance(samples, nhwc(g[f"{name}/{kind}/final_f64"])) < bar
    np.testing.assert_array_equal(samples, trajectory[0][-1])
