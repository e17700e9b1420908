"""Versions of the libraries that decide a run's numbers."""

import importlib.metadata

_PACKAGES = ("dico_jax", "jax", "flax", "optax", "orbax-checkpoint", "numpy")


def library_versions() -> dict[str, str]:
    """The version of every one of them by the name of its package, this project's included."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # run from a checkout, not installed
            versions[package] = "not installed"
    return versions
