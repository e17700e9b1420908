"""How fast the networks are, and what they need; what `python -m dico_jax.benchmark` runs."""
