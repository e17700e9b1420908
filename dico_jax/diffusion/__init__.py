"""Diffusion: schedules, the Gaussian process, objectives, guidance, solvers, noise of images."""
# ruff: noqa: F403

from dico_jax.diffusion.gaussian import *
from dico_jax.diffusion.guidance import *
from dico_jax.diffusion.image_noise import *
from dico_jax.diffusion.objectives import *
from dico_jax.diffusion.schedule import *
from dico_jax.diffusion.solvers import *
