"""DiCo, the Diffusion ConvNet, in JAX and Flax."""
