r"""Writes a sampler that runs with JAX alone: python -m dico_jax.export --ckpt=DIR --out=DIR

sampler.stablehlo, weights.npz, meta.json and run.py, which makes images with them. Seed, classes
and guidance scale are its arguments; steps, solver and what else samples are chosen here.
"""

from absl import flags

from dico_jax import cli
from dico_jax.errors import UsageError
from dico_jax.sampling import flags as sampler_flags

_CKPT = flags.DEFINE_string(
    "ckpt", None,
    "Workdir of a run, a converted checkpoint, or a file of PyTorch weights; also hf://OWNER/REPO.",
    required=True,
)  # fmt: skip
_OUT = flags.DEFINE_string("out", None, "The folder to make.", required=True)
_BATCH_SIZE = flags.DEFINE_string("batch_size", "8", "Images at a time, or 'symbolic' for any.")
_PLATFORMS = flags.DEFINE_list("platforms", ["cpu"], "Some of cpu, cuda, rocm, tpu.")
for _module in (cli, sampler_flags):
    flags.adopt_module_key_flags(_module)  # so that --help shows them
_OF_RUNS = ("classes", "prompts", "seed")


def main() -> None:
    """Parses flags and exports."""
    for name in _OF_RUNS:
        if flags.FLAGS[name].present:
            raise UsageError(f"--{name}", flags.FLAGS[name].value, "is for run.py in the folder")
    # A late import: --help answers before JAX is imported.
    from dico_jax.sampling.export import export_sampler

    how = sampler_flags.sampler_arguments(None) | {"batch_size": _BATCH_SIZE.value}
    print(export_sampler(_CKPT.value, _OUT.value, platforms=_PLATFORMS.value, **how))


if __name__ == "__main__":
    cli.run(main)
