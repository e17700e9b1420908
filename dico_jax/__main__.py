"""All commands by one name: `dico-jax train ...`, or `python -m dico_jax train ...`."""

import runpy
import sys

COMMANDS = {
    "train": "trains what a config describes",
    "sample": "makes images from a checkpoint",
    "evaluate": "measures images",
    "prepare": "encodes data sets, and measures references",
    "export": "writes a sampler that runs with JAX alone",
    "convert": "brings PyTorch weights in and out",
    "benchmark": "measures speed and memory",
    "show": "says what a file or folder is",
    "plan": "says whether a run fits a slice, how long it takes and what it costs",
    "analyze": "measures what a network does inside, and what its stages cost",
    "report": "writes the page of a run, or of several",
    "app": "serves a page to try checkpoints",
    "sweep": "trains variants with several seeds, and compares them",
}


def main() -> None:
    """Runs the command that is named first, with the arguments that follow; else lists them."""
    name = sys.argv[1] if len(sys.argv) > 1 else "help"
    if name in ("help", "-h", "--help", "--helpfull"):
        print("use: dico-jax COMMAND --help")
        print(*(f"  {command:10} {text}" for command, text in COMMANDS.items()), sep="\n")
    elif name not in COMMANDS:
        print(f"error: {name!r} is no command: use one of {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    else:
        del sys.argv[1]
        module = "main" if name == "train" else name
        runpy.run_module(f"dico_jax.{module}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
