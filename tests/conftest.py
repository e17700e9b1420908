"""Test setup, done before jax is imported.

Eight CPU devices, so that meshes are really tested; and a compiler in a hurry: the tests compile
much and compute little.
"""

import os

from tests.commands import HURRY

os.environ.setdefault("JAX_PLATFORMS", "cpu")
_FLAGS = ("--xla_force_host_platform_device_count=8", *HURRY.split())
_given = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = " ".join(
    [_given, *(flag for flag in _FLAGS if flag.split("=")[0] not in _given)]
).strip()

import jax  # noqa: E402
import pytest  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """Compiled programs of a module are of no use to the next one, and take gigabytes."""
    yield
    jax.clear_caches()
