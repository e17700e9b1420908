"""Compiled programs that outlive the process: config.training.compilation_cache."""

import os
import pathlib
import sys
import tempfile

import jax
from jax.experimental.compilation_cache import compilation_cache

_CACHE_DIR = "jax_compilation_cache_dir"


def enable_compilation_cache(setting: str, min_compile_seconds: float = 1.0) -> str | None:
    """Makes JAX keep compiled programs in a folder; to be called before the first compilation.

    Whoever can write to the folder can run code as the user of the run, so it must not be shared
    with strangers. In a run of many processes the first one writes; a folder that all of them can
    read saves all of them the compilation.

    Args:
      setting: a folder, local or gs://; "" for none; or "default": where the environment variable
        JAX_COMPILATION_CACHE_DIR says, or $XDG_CACHE_HOME/dico_jax/xla, or ~/.cache/dico_jax/xla.
        On CPUs "default" is none: XLA compiles for one model of processor, which a home folder
        on several machines does not keep apart, and loading rejects or mistrusts what it finds
        (jax-ml/jax#38445).
      min_compile_seconds: what compiles faster is not kept.

    Returns:
      The folder in use, or None. A folder that cannot be written is told on stderr, and not used.
    """
    folder = _resolve(setting)
    if folder is None:
        return None
    if "://" not in folder:
        try:
            pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            print(
                f"warning: config.training.compilation_cache={setting!r}: {folder} cannot be "
                f"written ({error.strerror or error}); programs are compiled anew in every run",
                file=sys.stderr,
            )
            return None
    jax.config.update(_CACHE_DIR, folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", min_compile_seconds)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)  # JAX knows the filesystem
    compilation_cache.reset_cache()  # or a folder that was in use before would stay
    return folder


def _resolve(setting: str) -> str | None:
    if not setting:
        return None
    if setting != "default":
        return setting if "://" in setting else str(pathlib.Path(setting).expanduser().absolute())
    if jax.default_backend() == "cpu":
        return None
    given = getattr(jax.config, _CACHE_DIR)
    if given:
        return given
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return str(pathlib.Path(base) / "dico_jax" / "xla")
