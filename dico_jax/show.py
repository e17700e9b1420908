"""Says what a file or folder is: python -m dico_jax.show FILE|DIR

Weights, checkpoints, workdirs, prepared latents, statistics, samples, results, pictures: network
and sizes, steps, versions, norms, NaN counts, shapes. It reads for about half a second, and writes
nothing.
"""

import sys

from absl import flags

from dico_jax import cli
from dico_jax.errors import UsageError, shown

_FILE = flags.DEFINE_string(
    "file",
    None,
    "What is shown: a file or a folder, also gs://, s3:// and hf://. It needs no name.",
)
_FULL = flags.DEFINE_bool("full", False, "Read all numbers, and compare all checksums.")
_PICTURE = flags.DEFINE_bool(
    "picture", True, "Where there is a picture, draw it, in a terminal that has the colours."
)
_LONGEST = 400  # characters of a line
flags.adopt_module_key_flags(cli)  # so that --help shows them


def main() -> None:
    """Looks, and prints a screen."""
    if not _FILE.value:
        raise UsageError("what to show is missing: python -m dico_jax.show FILE|DIR")
    from dico_jax.showing import describe  # late: --help answers before NumPy is there
    from dico_jax.terminal import colours, half_blocks

    found = describe(_FILE.value, _FULL.value)
    print(f"{_FILE.value}: {found.title}")
    width = max([len(name) for name, _ in found.rows], default=0)
    for name, text in found.rows:
        print(f"  {name:{width}}  {shown(text[:_LONGEST])}".rstrip())
    if found.file:
        print(f"  {'picture':{width}}  {found.file}")
    if _PICTURE.value and found.picture is not None and (number := colours()):
        sys.stdout.flush()  # what is printed has no escapes
        sys.stdout.buffer.write(half_blocks(found.picture, number).encode())


if __name__ == "__main__":
    cli.name_arguments("file", most=1)
    cli.run(main)
