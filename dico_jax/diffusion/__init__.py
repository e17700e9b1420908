"""Diffusion: schedules, the Gaussian process, objectives, guidance, solvers, noise of images."""
# ruff: noqa: F401, I001
# fmt: off

from dico_jax.diffusion.gaussian import (
    GaussianMoments, ModelMoments, discretized_gaussian_log_likelihood, noise_from_x0, normal_kl,
    original_timesteps, p_mean_variance, q_mean_variance, q_posterior, q_sample, split_output,
    training_losses, vb_terms, x0_from_noise,
)
from dico_jax.diffusion.guidance import CFG_CHANNELS, classifier_free_guidance, guided_model_fn
from dico_jax.diffusion.image_noise import image_keys, initial_noise, step_noise
from dico_jax.diffusion.flow import Flow
from dico_jax.diffusion.mean_flow import MeanFlow
from dico_jax.diffusion.objectives import Diffusion, Estimate, Objective, create_diffusion
from dico_jax.diffusion.registry import OBJECTIVES, create_objective
from dico_jax.diffusion.schedule import Schedule, beta_schedule, make_schedule, respaced_timesteps
from dico_jax.diffusion.paths import Path, Solver, Trajectory
from dico_jax.diffusion.solvers import SOLVERS, ddim_step, ddpm_step, sample_loop, solver_loop
from dico_jax.diffusion.spacing import SPACINGS, continuous_times, spaced_timesteps
from dico_jax.diffusion.options import CFG_SCHEDULES, SamplingOptions
