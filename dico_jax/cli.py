"""What every command shares: flags, one-line errors, exit statuses. It imports no JAX."""

import ast
import pathlib
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NoReturn

from absl import app, flags, logging

from dico_jax.errors import TrainingStopped, UsageError


def run(main: Callable[[], None]) -> None:
    """Runs `main()`; exits 0, 2 for wrong usage, 1 where training stopped itself, 130 at Ctrl-C."""
    app.run(lambda _: _main(main), flags_parser=_parse_flags)


def _main(main: Callable[[], None]) -> None:
    try:
        main()
    except (UsageError, TrainingStopped) as error:
        _fail(error, status=1 if isinstance(error, TrainingStopped) else 2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _fail(message, status: int = 2) -> NoReturn:
    print("error:", *str(message).split(), file=sys.stderr)
    sys.exit(status)


def _parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses flags; a config file may import the ones beside it as `configs.x` from anywhere."""
    for arg in argv:
        if match := re.match(r"--?config=([^:]+\.py)", arg):
            sys.path.append(str(pathlib.Path(match[1]).resolve().parent.parent))
    logging.set_verbosity(logging.WARNING)  # Orbax tells every file it writes
    try:
        rest = flags.FLAGS(argv)
    except OSError as error:
        _fail(_unreadable_config(argv, error))
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        _fail(_unknown_field(argv) or error)
    if len(rest) > 1:
        _fail(f"unexpected argument {rest[1]!r}: flags are written --name=value")
    return rest


def config_fields() -> dict[str, tuple[Any, str]]:
    """Per field "section.name" of configs/default.py its default, None if not set, and meaning."""
    # The file is read, not run: --help answers before ml_collections is imported.
    text = (pathlib.Path(__file__).parent / "configs" / "default.py").read_text()
    found = {}
    for comment, field, value in re.findall(r"((?: *#.*\n)*)    config\.(\w+\.\w+) = (.*)", text):
        default = None if "config_dict." in value else ast.literal_eval(value)
        found[field] = default, " ".join(comment.replace("#", " ").split())
    return found


def _unknown_field(argv: Sequence[str]) -> UsageError | None:
    """The error for the first override of a field of the config that there is not."""
    for arg in argv:
        if match := re.match(r"--?config\.([\w.]+)", arg):
            from dico_jax import config  # late: it needs JAX

            if match[1] not in config.flatten(config.DEFAULTS):
                return config.unknown_field(match[1])
    return None


def _unreadable_config(argv: Sequence[str], error: OSError) -> str:
    paths = [arg.lstrip("-") for arg in argv if arg.lstrip("-").startswith("config=")]
    return f"--{paths[-1]} cannot be read ({error.strerror or 'no such file'})"


def load_config(flag: flags.FlagHolder):
    """The locked ConfigDict of a config_flags flag; what the file raises is passed on."""
    config = flag.value
    try:
        config.to_dict()  # the flag keeps an error of the file until it is used
    except OSError as error:
        raise UsageError(_unreadable_config(sys.argv, error)) from error
    return config


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


def check_action(command: str, action: str | None, actions: Mapping[str, tuple[str, str]]) -> str:
    """The action, if it is there (with the flags it needs, may have) and has no other's flags."""
    if action not in actions:
        said = f"{action!r} is unknown" if action else "what to do is missing"
        raise UsageError(f"{said}: use {' or '.join(f'{command} {name}' for name in actions)}")
    assert action is not None
    needed, optional = (names.split() for names in actions[action])
    for name in needed:
        if not flags.FLAGS[name].value:
            raise UsageError(f"{action} needs --{name}")
    for other, names in actions.items():
        for name in " ".join(names).split():
            if flags.FLAGS[name].present and name not in needed + optional:
                raise UsageError(f"--{name} is for {other}, not for {action}")
    return action
