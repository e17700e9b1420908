"""What every command shares: flags, one-line errors, exit statuses. It imports no JAX."""

import ast
import errno
import functools
import os
import pathlib
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NoReturn

from absl import app, flags, logging

from dico_jax.errors import TrainingStopped, UsageError, one_line

_CONFIGS = pathlib.Path(__file__).parent / "configs"
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EROFS)  # no one's mistake
_NO_MEMORY = "(?i)RESOURCE_EXHAUSTED|out of memory"
_FIELDS: dict[str, str] = {}  # that flags are, by the name of the flag
# What no name of a class, file or tensor does to a terminal; bars go up by lines.
_ESCAPES = re.compile(r"\x1b(?!\[A)|[\x00-\x08\x0b\x0c\x0e-\x1a\x1c-\x1f\x7f-\x9f]")
_WRITTEN, _BUCKETS = ("workdir", "out", "npz"), ("gs://", "s3://")
_UNSET: list[str] = []  # fields that the command line sets to None
_MEANT = {"checkpoint": "ckpt", "workdir": "ckpt", "output": "out workdir", "out": "workdir"}
_MEANT |= {"num_samples": "num_images", "num_images": "num_samples", "guidance_scale": "cfg_scale"}

# Per action of a command, which `main` gets, the flags that it needs, and those that it may have.
Actions = Mapping[str, tuple[str, str]]


def run(main: Callable[..., None], actions: Actions = MappingProxyType({})) -> None:
    """Runs `main()`; exits 0, 2 for wrong usage, 1 where training stopped itself, 130 at Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):  # names are printed whatever the locale can show
        getattr(stream, "reconfigure", dict)(errors="backslashreplace")
        stream.write = functools.partial(_write, stream.write)  # type: ignore[method-assign]
    given = [arg for arg in sys.argv[1:] if arg in actions]
    given += [arg for arg in sys.argv[1:2] if actions and arg[:1] != "-"]
    for action in given[:1]:
        sys.argv.remove(action)
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    threading.Thread(target=_watch_signals, args=[read], daemon=True).start()
    try:
        app.run(lambda _: _main(main, actions, given), flags_parser=_parse_flags)
    except SystemExit as ended:  # threads of compilers and readers crash or hang where Python ends
        _leave(ended.code) if ended.code and isinstance(ended.code, int) else sys.exit(ended.code)


def _write(write: Callable[[str], int], text: str) -> int:
    return write(_ESCAPES.sub(lambda match: ascii(match[0])[1:-1], text))


def name_arguments(flag: str, most: int = sys.maxsize) -> None:
    """Gives a flag what stands on the command line without a name, but for the values of flags.

    Of more than `most` the others stay, and are refused.
    """
    value = False
    for i, arg in enumerate(sys.argv[1:], 1):
        name = arg.lstrip("-")
        if value or arg.startswith("-"):
            known = name in flags.FLAGS and not flags.FLAGS[name].boolean
            value = not value and known  # "--out FILE"
        elif most > 0:
            sys.argv[i], most = f"--{flag}={arg}", most - 1


def read_flagfiles() -> None:
    """Puts what files of --flagfile hold in their place: ml_collections reads it on import."""
    try:
        sys.argv[1:] = flags.FLAGS.read_flags_from_files(sys.argv[1:], force_gnu=False)
    except (flags.Error, ValueError) as error:
        _fail(error)


def _watch_signals(pipe: int) -> None:
    """Ends the process where native code, such as a compiler, keeps Python from a signal."""
    plainly, again = {signal.SIGINT.value: 130}, False
    while number := os.read(pipe, 1)[0]:
        statuses = getattr(signal.getsignal(number), "at_once", plainly)
        if number in statuses or (again and number == signal.SIGINT):
            time.sleep(3 if statuses is plainly and not again else 0)  # it may well end by itself
            os.write(2, b"\ninterrupted\n")
            _leave(statuses.get(number, 130))
        again |= number == signal.SIGINT


def _leave(status: int) -> NoReturn:
    import multiprocessing  # late: --help does without

    if (beat := sys.modules.get("dico_jax.parallel.processes")) and beat.Heartbeat.current:
        beat.Heartbeat.current.leave(status)  # the other processes end as well
    for worker in multiprocessing.active_children():  # before they can say that it is gone
        worker.kill()
    if hub := sys.modules.get("dico_jax.pytorch.hub"):
        hub.forget()
    sys.stdout.flush()
    os._exit(status)


def _main(main: Callable[..., None], actions: Actions, given: list[str]) -> None:
    try:
        main(*([_check_action(given, actions)] if actions else []))
    except (UsageError, TrainingStopped) as error:
        _fail(error, status=1 if isinstance(error, TrainingStopped) else 2)
    except OSError as error:  # of a file that the user has named, or of a disk
        if error.filename is None and error.errno not in _DISK:
            _fail_of_bucket(error)
            raise
        status = 1 if error.errno in _DISK else 2
        _fail(f"{error.filename or 'a disk'}: {error.strerror}", status)
    except Exception as error:
        _fail_of_bucket(error)
        if "os_error_code" in (text := str(error.__cause__ or error)):  # TensorStore's, in Orbax's
            _fail(text, status=1)
        if not isinstance(error, MemoryError) and not re.search(_NO_MEMORY, str(error)):
            raise
        _fail(_too_large(str(error)), status=1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _fail_of_bucket(error: Exception) -> None:
    files: Any = sys.modules.get("dico_jax.files")
    if files and files.of_bucket(error):
        _fail(f"a bucket: {type(error).__name__}: {error}", status=1)


def _too_large(text: str) -> str:
    """What is said of memory that does not suffice: what was asked, what there is, what helps."""
    import jax  # late: it is there now

    asked = re.search(r"(?:llocat\w*|Used) ([\d.]+ ?\w+)", text)
    there = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    there = there or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    by: dict[str, Any] = {"a smaller --batch_size": True}
    if "config" in flags.FLAGS and (config := flags.FLAGS["config"].value):
        by = {"a smaller --config.data.batch_size or more --config.training.accumulation_steps": 1}
        by |= {"--config.model.remat=blocks": config.model.remat != "blocks"}
        by |= {"--config.mesh.fsdp": jax.device_count() > config.mesh.fsdp}
        by |= {"--config.model.dtype=bfloat16": config.model.dtype != "bfloat16"}
        by |= {"--config.autoencoder.tile_size": config.autoencoder.name != "identity"}
    said = f"out of memory: {asked[1] if asked else 'more'} was asked for, {there / 1e9:,.1f} GB"
    return f"{said} are there: try {' or '.join(way for way, helps in by.items() if helps)}"


def _fail(message, status: int = 2) -> NoReturn:
    print("error:", one_line(message), file=sys.stderr)
    sys.exit(status)


def _parse_flags(argv: list[str]) -> list[str]:
    """Parses flags, and checks what holds of every text, path and number that was given."""
    logging.set_verbosity(logging.WARNING)  # Orbax tells every file it writes
    argv[:] = ["--help" if arg == "-h" else arg for arg in argv]
    path = ""
    try:
        path = _find_config(argv)
        rest = flags.FLAGS(argv)
        for name in flags.FLAGS:
            if flags.FLAGS[name].present and not name.startswith("config"):
                _check_flag(argv[0], flags.FLAGS[name])
    except SystemExit:  # absl has shown the help
        sys.exit(0)
    except flags.UnrecognizedFlagError as error:
        fields = [f"config.{f}" for f in config_fields()] if "config" in flags.FLAGS else []
        meant = [name for name in fields if name.endswith(f".{error.flagname}")]
        meant = meant or [n for n in _MEANT.get(error.flagname, "").split() if n in flags.FLAGS]
        _fail(f"{error}{'; did you mean --' * bool(meant)}{' or --'.join(meant)}")
    except Exception as error:  # of a config file, whose lines are in the traceback
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
        where = f"--config={path}, line {lines[-1]}: {type(error).__name__}: " if lines else ""
        text = re.sub("Traceback .*\n", "", str(error).strip(), flags=re.DOTALL)
        _fail(where + text.rpartition(f"{UsageError.__module__}.{UsageError.__name__}: ")[2])
    if len(rest) > 1:
        _fail(f"unexpected argument {rest[1]!r}: flags are written --name=value")
    return rest


def _find_config(argv: list[str]) -> str:
    """Puts --config=FILE first, FILE found where it is: its path, or ""; checks names of fields."""
    at = [i for i, arg in enumerate(argv) if re.fullmatch("--?config(=.*)?", arg, re.DOTALL)]
    if not at or "config" not in flags.FLAGS:
        return ""
    arg = argv.pop(at[-1])
    if "=" not in arg and at[-1] < len(argv):
        arg = f"--config={argv.pop(at[-1])}"
    from dico_jax.config import check_name, expanded  # late: --help answers before they are there

    for other in argv[1:]:
        if match := re.match(r"--?config\.([\w.]+)(=None$)?", other):
            check_name(match[1])
            if match[2]:
                _UNSET.append(match[1])
                argv.remove(other)
    path, colon, rest = expanded("--config", "config", arg.partition("=")[2]).partition(":")
    name = path.removeprefix("configs/").removesuffix(".py")
    if not pathlib.Path(path).exists():
        if not (_CONFIGS / f"{name}.py").is_file() or "/" in name:
            there = ", ".join(sorted(f.stem for f in _CONFIGS.glob("[a-z]*.py")))
            raise UsageError("--config", path, f"cannot be read: give a file, or one of {there}")
        path = str(_CONFIGS / f"{name}.py")
    pathlib.Path(path).read_bytes()  # or an OSError
    if path.endswith(".json"):  # a run's
        path, colon, rest = str(_CONFIGS / "_saved.py"), ":", path
    # It may import the ones beside it as `configs.x` from anywhere.
    sys.path.append(str(pathlib.Path(path).resolve().parent.parent))
    argv.insert(1, f"--config={path}{colon}{rest}")
    return path


def _check_flag(command: str, flag: flags.Flag) -> None:
    from dico_jax.config import RANGE, SCHEMES, check_item, expanded

    given: Any = flag.value
    said, bounds = f"--{flag.name}", RANGE.get(_FIELDS.get(flag.name, ""), (None, 2**32 - 1))
    values = given if isinstance(given, list) else [given]
    for value in values:
        check_item(said, value, *bounds)
    name = f"{pathlib.Path(command).stem}.{flag.name}"
    if (name := name if name in SCHEMES else flag.name) in SCHEMES:
        paths = [expanded(said, name, path) for path in values]
        flag.value = paths if isinstance(given, list) else paths[0]
        for path in paths:
            if path.startswith(_BUCKETS):  # before anything is loaded or compiled
                from dico_jax.files import check_bucket

                check_bucket(said, path, write=flag.name in _WRITTEN)


@functools.cache
def config_fields() -> dict[str, tuple[str, str]]:
    """Per field "section.name" of configs/default.py its value and comment, as written there."""
    # The file is read, not run: --help answers before ml_collections is imported.
    text = (pathlib.Path(__file__).parent / "configs" / "default.py").read_text()
    found = re.findall(r"((?: *#.*\n)*)    config\.(\w+\.\w+) = (.*)", text)
    return {field: (value, comment) for comment, field, value in found}


def define_fields(fields: Mapping[str, str], note: str = "") -> dict[str, flags.FlagHolder]:
    """Defines a flag per field, explained as it is there; with a `note` its default is None."""
    known, found = config_fields(), {}
    kinds: dict[type, str] = {bool: "bool", int: "integer", float: "float"}
    for name, (value, comment) in {name: known[field] for name, field in fields.items()}.items():
        default = None if "config_dict." in value else ast.literal_eval(value)
        meaning = " ".join(comment.replace("#", " ").split())
        define = getattr(flags, f"DEFINE_{kinds.get(type(default), 'string')}")
        found[name] = define(name, None if note else default, f"{meaning}{note}")
    _FIELDS.update(fields)
    return found


def load_config(config) -> None:
    """Sets what the command line says is None in the ConfigDict of --config, and checks it."""
    from dico_jax.config import SCHEMES, check_fields, flatten

    for section, _, name in (field.rpartition(".") for field in _UNSET):
        (config[section] if section else config)[name] = None
    check_fields(config)
    for field, value in flatten(config.to_dict()).items():
        if field in SCHEMES and str(value).startswith(_BUCKETS):
            from dico_jax.files import check_bucket

            check_bucket(f"config.{field}", value, write=False)


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
        "distributed_timeout", 300, "Seconds to wait for others or their heartbeats.", lower_bound=1
    )

    def join() -> None:
        from dico_jax.parallel import processes  # late: --help answers before JAX is imported

        processes.initialize(address.value, count.value, index.value, timeout.value)

    return join


def define_cpu_tuning() -> Callable[..., None]:
    """Defines the flag that says whether to use all cores; returns what calls `use_all_cores`."""
    flag = flags.DEFINE_bool(
        "cpu_tuning", True,
        "Without an accelerator: make a device of every core, each with a copy of the weights, and "
        "keep memory from step to step. A number of devices that XLA_FLAGS names stays.",
    )  # fmt: skip

    def tune(fits: Callable[[int], bool] | None = None) -> None:
        from dico_jax.ops.cpu import use_all_cores

        if flag.value:
            use_all_cores(keep_memory=True, fits=fits)

    return tune


def _check_action(given: list[str], actions: Actions) -> str:
    """The action, if it is there and has the flags that it needs, and no other's."""
    if not given or (action := given[0]) not in actions:
        said = f"{given[0]!r} is unknown" if given else "what to do is missing"
        command = pathlib.Path(sys.argv[0]).stem
        raise UsageError(f"{said}: use {' or '.join(f'{command} {name}' for name in actions)}")
    needed, optional = (names.split() for names in actions[action])
    for name in needed:
        if not flags.FLAGS[name].value:
            raise UsageError(f"{action} needs --{name}")
    for other, names in actions.items():
        for name in " ".join(names).split():
            if flags.FLAGS[name].present and name not in needed + optional:
                raise UsageError(f"--{name} is for {other}, not for {action}")
    return action
