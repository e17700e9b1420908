"""Test setup, done before jax is imported.

Eight CPU devices, so that meshes are really tested; and a compiler in a hurry: the tests compile
much and compute little. What takes it longest is kept for the other tests of the same session, its
workers and the commands that they start.
"""

import atexit
import os
import shutil
import tempfile

from tests.commands import HURRY

os.environ.setdefault("JAX_PLATFORMS", "cpu")
_FLAGS = ("--xla_force_host_platform_device_count=8", *HURRY.split())
_given = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = " ".join(
    [_given, *(flag for flag in _FLAGS if flag.split("=")[0] not in _given)]
).strip()

if "PYTEST_XDIST_WORKER" not in os.environ and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _compiled = tempfile.mkdtemp(prefix="dico_jax_tests_")
    atexit.register(shutil.rmtree, _compiled, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax  # noqa: E402
import pytest  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """Compiled programs of a module are of no use to the next one, and take gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture
def bucket():
    """The emulated bucket of this process; without gcsfs or the emulator the test is skipped."""
    from tests import buckets

    made = buckets.shared()
    made.requests.clear()
    yield made
    made.fault = lambda method, path: None


@pytest.fixture
def root(request):
    """A folder of this test in that bucket."""
    return f"gs://bkt/{request.node.name.partition('[')[0]}"
