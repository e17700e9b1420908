"""Diffusion: schedules, the Gaussian process, losses, guidance and samplers."""

from dico_jax.diffusion.gaussian import (
    LOSSES,
    PREDICTIONS,
    VARIANCES,
    Diffusion,
    GaussianMoments,
    ModelMoments,
    create_diffusion,
    noise_from_x0,
    original_timesteps,
    p_mean_variance,
    q_mean_variance,
    q_posterior,
    q_sample,
    split_output,
    x0_from_noise,
)
from dico_jax.diffusion.guidance import CFG_CHANNELS, classifier_free_guidance, guided_model_fn
from dico_jax.diffusion.losses import (
    discretized_gaussian_log_likelihood,
    normal_kl,
    training_losses,
    vb_terms,
)
from dico_jax.diffusion.samplers import (
    SAMPLERS,
    Step,
    Trajectory,
    ddim_step,
    ddpm_step,
    image_keys,
    initial_noise,
    sample_loop,
    step_noise,
)
from dico_jax.diffusion.schedule import Schedule, beta_schedule, make_schedule, respaced_timesteps

__all__ = [  # noqa: RUF022  (grouped by module, in the order of reading)
    # schedule
    "Schedule",
    "beta_schedule",
    "make_schedule",
    "respaced_timesteps",
    # gaussian
    "Diffusion",
    "GaussianMoments",
    "ModelMoments",
    "LOSSES",
    "PREDICTIONS",
    "VARIANCES",
    "create_diffusion",
    "noise_from_x0",
    "original_timesteps",
    "p_mean_variance",
    "q_mean_variance",
    "q_posterior",
    "q_sample",
    "split_output",
    "x0_from_noise",
    # losses
    "discretized_gaussian_log_likelihood",
    "normal_kl",
    "training_losses",
    "vb_terms",
    # guidance
    "CFG_CHANNELS",
    "classifier_free_guidance",
    "guided_model_fn",
    # samplers
    "SAMPLERS",
    "Step",
    "Trajectory",
    "ddim_step",
    "ddpm_step",
    "image_keys",
    "initial_noise",
    "sample_loop",
    "step_noise",
]
