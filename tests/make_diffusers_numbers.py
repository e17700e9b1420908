"""Records trajectories of diffusers' schedulers into tests/data/diffusers_solvers.npz.

    python tests/make_diffusers_numbers.py        (with diffusers and torch installed)

The network is a formula, `prediction` below; timesteps are those of the schedulers.
"""

import inspect
import pathlib

import numpy as np
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

OUT = pathlib.Path(__file__).parent / "data" / "diffusers_solvers.npz"
BETAS = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02}
BETAS |= {"beta_schedule": "linear"}


def prediction(x, t):
    """A stand-in for a network: of x (N, C) and the share t of the way to noise."""
    w = np.array([[0.6, -0.3, 0.2], [0.1, 0.5, -0.4], [-0.2, 0.3, 0.7]])
    return np.tanh(x @ w + np.cos(3 * t)) + 0.3 * x


class Recorded:
    """The steps of one scheduler, from a start that all share."""

    def __init__(self):
        self.arrays = {}
        self.start = np.random.default_rng(0).normal(size=(4, 3))

    def run(self, name, scheduler, scale=1000.0, fresh=None):
        x, states, timesteps = torch.tensor(self.start), [], []
        if "Heun" in type(scheduler).__name__ and scale != 1.0:
            x = x * scheduler.init_noise_sigma
        for k, t in enumerate(scheduler.timesteps):
            given = x
            if hasattr(scheduler, "scale_model_input"):
                given = scheduler.scale_model_input(x, t)
            output = torch.tensor(prediction(given.numpy(), float(t) / 1000.0))
            how = {}
            if (
                fresh is not None
                and "variance_noise" in inspect.signature(scheduler.step).parameters
            ):
                how["variance_noise"] = torch.tensor(fresh[k])
            x = scheduler.step(output, t, x, **how).prev_sample
            states.append(x.numpy().copy())
            timesteps.append(float(t))
        self.arrays |= {f"{name}/x": np.stack(states), f"{name}/timesteps": np.array(timesteps)}


def exact(scheduler, steps):
    """The scheduler with its noise levels in float64; in float32 they are off by 1e-5."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    alphas_cumprod = torch.cumprod(1.0 - betas, dim=0)
    scheduler.set_timesteps(steps)
    kept = alphas_cumprod[scheduler.timesteps.long()]
    sigmas = torch.sqrt(1.0 / kept - 1.0)
    scheduler.sigmas = torch.cat([sigmas, torch.zeros(1, dtype=torch.float64)])
    return scheduler


def main():
    recorded = Recorded()
    noise = np.random.default_rng(1).normal(size=(20, 4, 3))
    common = {**BETAS, "prediction_type": "epsilon", "timestep_spacing": "trailing"}
    for steps in (8, 20):
        for order in (2, 3):
            dpm = DPMSolverMultistepScheduler(
                **common, solver_order=order, algorithm_type="dpmsolver++",
                solver_type="midpoint", final_sigmas_type="zero",
            )  # fmt: skip
            recorded.run(f"dpmpp_{order}m/{steps}", exact(dpm, steps))
            unipc = UniPCMultistepScheduler(
                **common, solver_order=order, solver_type="bh2", final_sigmas_type="zero"
            )
            recorded.run(f"unipc_{order}/{steps}", exact(unipc, steps))
        sde = DPMSolverMultistepScheduler(
            **common, solver_order=2, algorithm_type="sde-dpmsolver++", final_sigmas_type="zero"
        )
        recorded.run(f"dpmpp_2m_sde/{steps}", exact(sde, steps), fresh=noise)
        heun = HeunDiscreteScheduler(**common)
        recorded.run(f"heun/{steps}", exact(heun, steps))
    recorded.arrays |= {"start": recorded.start, "noise": noise}
    flow = FlowMatchHeunDiscreteScheduler()
    flow.set_timesteps(10)
    recorded.run("heun_flow/10", flow, scale=1.0)
    recorded.arrays["heun_flow/10/sigmas"] = flow.sigmas.numpy().astype(np.float64)
    np.savez_compressed(OUT, **recorded.arrays)
    print({name: array.shape for name, array in recorded.arrays.items()})


if __name__ == "__main__":
    main()
