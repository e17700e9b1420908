"""All commands by one name: `dico-jax train ...`, or `python -m dico_jax train ...`.

`dico-jax train` is `python -m dico_jax.main`; the others have the same name in both.
"""

import runpy
import sys

COMMANDS = {
    "train": "trains what a config describes",
    "sample": "makes images from a checkpoint",
    "evaluate": "measures images",
    "prepare": "encodes data sets, and measures references",
    "convert": "brings PyTorch weights in and out",
    "benchmark": "measures speed and memory",
}


def main() -> None:
    """Runs the command that is named first, with the arguments that follow; else lists them."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in COMMANDS:
        asked = name in ("", "help", "-h", "--help", "--helpfull")
        lines = [f"  {command:10} {text}" for command, text in COMMANDS.items()]
        print(
            "\n".join(["use: dico-jax COMMAND --help", *lines])
            if asked
            else f"error: {name!r} is no command: use one of {', '.join(COMMANDS)}",
            file=sys.stdout if asked else sys.stderr,
        )
        sys.exit(0 if asked else 2)
    del sys.argv[1]
    module = "main" if name == "train" else name
    runpy.run_module(f"dico_jax.{module}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
