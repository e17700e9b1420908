"""What every command shares: flag parsing, one-line errors, exit statuses.

Light on purpose: `--help` answers before JAX is imported.
"""

import pathlib
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NoReturn

from absl import app, flags, logging

from dico_jax.errors import TrainingStopped, UsageError


def run(main: Callable[[], None]) -> None:
    """Parses the flags and runs `main()`.

    Exits 0 when done, 2 for wrong usage, 1 when training has stopped itself, 130 for Ctrl-C.

    A `UsageError` or `TrainingStopped` is printed as one line on stderr, any other exception is a
    bug and keeps its traceback. A `SystemExit` passes, such as `training.preemption.Preempted` with
    status 143.
    """
    app.run(lambda _: _main(main), flags_parser=_parse_flags)


def _main(main: Callable[[], None]) -> None:
    try:
        main()
    except UsageError as error:
        _fail(error)
    except TrainingStopped as error:
        _fail(error, status=1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _fail(message, status: int = 2) -> NoReturn:
    line = " ".join(str(message).split())
    print(f"error: {line}", file=sys.stderr)
    sys.exit(status)


def _parse_flags(argv: Sequence[str]) -> list[str]:
    _make_sibling_configs_importable(argv)
    logging.set_verbosity(logging.WARNING)  # Orbax tells every file it writes
    try:
        rest = flags.FLAGS(argv)
    except OSError as error:
        _fail(_unreadable_config(argv, error))
    except (AttributeError, KeyError) as error:  # how config_flags reports an unknown field
        _fail(_unknown_field(argv, str(error)))
    except (flags.Error, TypeError, ValueError) as error:
        _fail(error)
    if len(rest) > 1:
        _fail(f"unexpected argument {rest[1]!r}: flags are written --name=value")
    return rest


def define_distributed_flags() -> Callable[[], None]:
    """Defines the flags of several processes; returns what joins them, before JAX is used."""
    address = flags.DEFINE_string(
        "coordinator_address", None,
        "Several processes as one run: HOST:PORT of process 0. On Cloud TPU, GKE with TPUs, Slurm "
        "and Open MPI the processes find each other; elsewhere give this and the next two to all.",
    )  # fmt: skip
    count = flags.DEFINE_integer("num_processes", None, "Number of processes.", lower_bound=1)
    index = flags.DEFINE_integer("process_id", None, "Number of this process, from 0.")
    timeout = flags.DEFINE_integer(
        "distributed_timeout", 300, "Seconds to wait for the other processes.", lower_bound=1
    )

    def join() -> None:
        from dico_jax.parallel import processes  # late: --help answers before JAX is imported

        processes.initialize(address.value, count.value, index.value, timeout.value)

    return join


def define_cpu_tuning() -> flags.FlagHolder[bool]:
    """Defines the flag that says whether to call `dico_jax.ops.cpu.use_all_cores`."""
    return flags.DEFINE_bool(
        "cpu_tuning", True,
        "Without an accelerator: make a device of every core, each with a copy of the weights, and "
        "keep memory from step to step. A number of devices that XLA_FLAGS names stays.",
    )  # fmt: skip


def take_action(argv: list[str], actions: Collection[str]) -> str | None:
    """Removes what to do from the command line: its first argument that is no flag, or None."""
    action = next((arg for arg in argv[1:] if arg in actions), None)
    if action is None and len(argv) > 1 and not argv[1].startswith("-"):
        action = argv[1]
    if action is not None:
        argv.remove(action)
    return action


def check_action(command: str, action: str | None, actions: Collection[str]) -> None:
    """Raises UsageError unless the action is one of `actions`."""
    if action not in actions:
        said = f"{action!r} is unknown" if action else "what to do is missing"
        raise UsageError(f"{said}: use {' or '.join(f'{command} {name}' for name in actions)}")


def check_flags(action: str, actions: Mapping[str, tuple[str, str]]) -> None:
    """Raises UsageError for a flag that an action needs and lacks, or that is of another one.

    Args:
      action: one of `actions`.
      actions: per action, the names of the flags it needs, and of those it may have.
    """
    needed, optional = (names.split() for names in actions[action])
    for name in needed:
        if not flags.FLAGS[name].value:
            raise UsageError(f"{action} needs --{name}")
    for other, (first, second) in actions.items():
        for name in f"{first} {second}".split():
            if flags.FLAGS[name].present and name not in needed + optional:
                raise UsageError(f"--{name} is for {other}, not for {action}")


def _make_sibling_configs_importable(argv: Sequence[str]) -> None:
    """Lets a config file import the ones beside it as `configs.x`, wherever the command is run."""
    for arg in argv:
        match = re.match(r"--?config=([^:]+\.py)", arg)
        if match:
            sys.path.append(str(pathlib.Path(match[1]).resolve().parent.parent))


def _unknown_field(argv: Sequence[str], error: str) -> str:
    """One line for config_flags' error about an override of a field that does not exist."""
    name = re.search(r"""['"](\w+)['"]""", error.replace("\\", ""))
    suggestion = re.search(r'Did you mean "(\w+)"', error)
    for arg in argv:
        field = arg.lstrip("-").split("=")[0]
        if name and arg.startswith("--config.") and name[1] in field.split("."):
            hint = (
                f"did you mean {field.replace(name[1], suggestion[1])}?"
                if suggestion
                else "configs/default.py lists the fields"
            )
            return f"{arg.lstrip('-')}: no config field {field}; {hint}"
    return error


def _unreadable_config(argv: Sequence[str], error: OSError) -> str:
    paths = [arg.lstrip("-") for arg in argv if arg.lstrip("-").startswith("config=")]
    return f"--{paths[-1]} cannot be read ({error.strerror or 'no such file'})"


def load_config(flag: flags.FlagHolder):
    """The locked ConfigDict of a config_flags flag.

    Raises:
      UsageError: the file cannot be read. What the file itself raises when it is run is passed on.
    """
    config = flag.value
    try:
        config.to_dict()  # the flag keeps an error of the file until it is used
    except OSError as error:
        raise UsageError(_unreadable_config(sys.argv, error)) from error
    return config
