"""What runs have left in their workdirs, read while they may still be written."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import math
import re
import socket
import struct
import time
from collections.abc import Iterable, Sequence
from multiprocessing import get_context
from typing import Any

import numpy as np

from dico_jax.checkpoints.steps import FOLDER, read_meta, saved_steps
from dico_jax.config import expanded, flatten
from dico_jax.errors import UsageError
from dico_jax.files import as_path, check_bucket, is_remote, names_in, opened, size_of

_CHUNK = 8 << 20  # bytes of metrics.jsonl at a time
_WHOLE = 8 << 20  # bytes, about, of which all numbers are read
_BOTH = "step", "loss"
_FEW = 64  # lines that are read whole
_STEP = re.compile(rb'\{"step": (\d+),')  # as training writes it
_LOSS = re.compile(rb' "loss": (-?\d+\.?\d*(?:e[+-]?\d+)?)[,}]')
_SESSION = re.compile(rb"(?s)\x09(.{8})\x10([\x80-\xff]*[\0-\x7f])\x3a")
_MANY = 128 << 20  # bytes of several runs, from which on each has a process that reads it
_EVENTS = 100  # of a kind, at most
_SILENT = 600  # seconds without a line, after which a run of another machine is said to be silent


@dataclasses.dataclass
class Event:
    """Something that happened to a run, at a step where that is known."""

    kind: str
    step: int | None
    text: str


@dataclasses.dataclass
class Run:
    """A run as its files tell it. `values` are (n,) at `steps` (n,), NaN where a line has none."""

    name: str
    folder: Any
    config: dict[str, Any]  # flat
    steps: np.ndarray
    values: dict[str, np.ndarray]
    evaluations: dict[str, tuple[np.ndarray, np.ndarray]]  # by name: steps and numbers
    results: list[dict[str, Any]]  # of `evaluate --out`
    grids: list[tuple[int, Any]]
    checkpoints: list[int]
    events: list[Event]
    bad: list[dict[str, Any]]
    environment: dict[str, Any]
    state: str  # in words
    ended: bool  # whether no process takes its steps any more
    notes: list[str]  # what could not be read

    @property
    def batch_size(self) -> int:
        return int(self.config.get("data.batch_size") or 1)

    @property
    def last(self) -> int:
        return int(self.steps[-1]) if len(self.steps) else 0

    @functools.cached_property
    def hours(self) -> np.ndarray:
        """Of training alone (n,), by the throughput: no samples, saves and pauses."""
        speed = self.values.get("images_per_second", np.full(len(self.steps), np.nan))
        known = np.isfinite(speed) & (speed > 0)
        if not known.any():
            return np.full(len(self.steps), np.nan)
        at = np.interp(self.steps, self.steps[known], speed[known])
        return np.cumsum(np.diff(self.steps, prepend=0) * self.batch_size / at) / 3600


def find_workdir(path: str) -> Any:
    """The folder that a user names; UsageError where there is none."""
    path = expanded("WORKDIR", "workdir", path)
    check_bucket("WORKDIR", path, write=False)
    if not (folder := as_path(path)).is_dir():
        raise UsageError("WORKDIR", path, ": there is no such folder")
    return folder


def read_runs(folders: Sequence[Any], results: Iterable[str] = ()) -> tuple[list[Run], list[str]]:
    """All runs in these workdirs, and what is to be said of those that have none."""
    notes, jobs = [], []
    given = [*{str(f).rstrip("/"): f for f in folders}.values()]  # one that is named twice, once
    for folder, name in zip(given, _short_names(given), strict=True):
        names = set(names_in(folder))
        if "config.json" in names or "metrics.jsonl" in names:
            jobs.append((folder, name, names))
        else:
            notes.append(f"{folder} has no run (yet): neither config.json nor metrics.jsonl")
    files = [folder / "metrics.jsonl" for folder, _, names in jobs if "metrics.jsonl" in names]
    if len(jobs) > 1 and not any(map(is_remote, given)) and sum(map(size_of, files)) > _MANY:
        with concurrent.futures.ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
            runs = [*pool.map(_read_run, *zip(*jobs, strict=True))]
    else:
        runs = [_read_run(*job) for job in jobs]
    for file in results:
        if not (found := _read_results(as_path(file))):
            raise UsageError("--results", file, "is no result of evaluate --out")
        for run in runs:
            of = [result for result in found if _is_of(result, run)]
            run.results += of
            found = [result for result in found if result not in of]
        if found and runs:
            ckpt = found[0]["samples"].get("ckpt", "files")
            notes.append(f"{file} measures {ckpt}, and none of these runs: left out")
    return runs, notes


def stamp(folders: Iterable[Any]) -> str:
    """Changes when a file that a report reads has changed, or the process of a run has ended."""
    found: list[Any] = []
    for folder in folders:
        for name in ("metrics.jsonl", "config.json", "stall.txt", "samples", "checkpoints"):
            try:
                about = (folder / name).stat()
                found.append((getattr(about, "st_size", 0) or getattr(about, "length", 0),
                              getattr(about, "st_mtime_ns", 0)))  # fmt: skip
            except (OSError, AttributeError):
                found.append((-1, 0))
        found.append(_holder(folder)[1])
    return str(hash(tuple(found)))


def _short_names(folders: Sequence[Any]) -> list[str]:
    """The last parts of paths, as many as make them different."""
    parts = [str(f if is_remote(f) else f.absolute()).rstrip("/").split("/") for f in folders]
    for count in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(p[-count:]) for p in parts]
        if len(set(names)) == len(names):
            break
    return names if folders else []


def _read_run(folder: Any, name: str, names: set[str]) -> Run:
    notes: list[str] = []
    config = flatten(_json_of(folder / "config.json", notes) or {})
    rows = read_metrics(folder / "metrics.jsonl", notes) if "metrics.jsonl" in names else {}
    steps, values, evaluations = _tables(rows)
    results = [r for n in sorted(names) if n.endswith(".json") for r in _read_results(folder / n)]
    bad = [b for n in sorted(names) if n.startswith("bad_examples") for b in _lines(folder / n)]
    last, total = int(steps[-1]) if len(steps) else 0, int(config.get("training.num_steps") or 0)
    state, ended = _state(folder, last, total)
    grids = [(int(found[1]), folder / "samples" / n) for n in names_in(folder / "samples")
             if (found := re.fullmatch(r"step_(\d+)\.png", n))]  # fmt: skip
    events = [
        *_starts(folder, names, values.get("rollbacks"), steps),
        *_skips(steps, values.get("skipped_steps")),
        *(Event("stall", step, text) for n in sorted(names) if re.fullmatch(r"stall.*\.txt", n)
          for step, text in _stalls(folder / n)),
        *(Event("config change", _step_of(c), str(c.get("change")))
          for c in _lines(folder / "config_changes.jsonl")),
        *(Event("preemption", _step_of(p), f"{p.get('signal')} came, {p.get('time')}")
          for p in _lines(folder / "preemptions.jsonl")),
    ]  # fmt: skip
    for step, count in [*collections.Counter(map(_step_of, bad)).items()][-_EVENTS:]:
        events.append(Event("bad examples", step, f"{count} pictures could not be read"))
    saved = sorted(saved_steps(folder))
    environment = _environment(folder, names, saved)
    return Run(name, folder, config, steps, values, evaluations, results, sorted(grids), saved,
               events, bad, environment, state, ended, notes)  # fmt: skip


def _json_of(file: Any, notes: list[str]) -> dict[str, Any] | None:
    try:
        return dict(json.loads(file.read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        notes.append(f"{file.name} cannot be read ({error})")
        return None


def _lines(file: Any) -> list[dict[str, Any]]:
    found = []
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            found.append(dict(json.loads(line)))
        except (ValueError, TypeError):  # one that is being written
            continue
    return found


def _step_of(entry: dict[str, Any]) -> int | None:
    step = entry.get("step")  # bad examples of older runs have none
    return step if isinstance(step, int) else None


def read_metrics(file: Any, notes: list[str]) -> dict[tuple[str, ...], np.ndarray]:
    """Per set of names, in the order of the file, the numbers of the lines that have them.

    Of a long file step and loss are read of all lines, and the rest of one in so many. Lines that
    are broken are left out, which is noted. A run in hand may be writing the last.
    """
    found: dict[tuple[str, ...], list[list[float]]] = {}
    broken, cut, short, every = 0, 0, list[np.ndarray](), max(1, size_of(file) // _WHOLE)
    with opened(file) as stream:
        while text := stream.read(_CHUNK) + stream.readline():
            last = text[text.rfind(b"\n") + 1 :]  # what has no end yet
            broken += _take(text.removesuffix(last) if last else text, every, found, short)
            if last:
                cut = _parse([last], found)
                break
    notes += ["the last line of metrics.jsonl is cut, and left out"] * cut
    if broken:
        notes.append(f"{broken} broken lines of metrics.jsonl are left out")
    if short:
        notes.append(f"metrics.jsonl is long: but for the loss, one in {every} lines is read")
    tables = {names: np.array(rows) for names, rows in found.items()}
    short += [tables.pop(_BOTH)] if _BOTH in tables else []
    return ({_BOTH: np.concatenate(short)} if short else {}) | tables  # of one step the last counts


def _take(text: bytes, every: int, found: Any, short: list[np.ndarray]) -> int:
    """Reads one in so many lines, and of all step and loss; how many are broken."""
    codes = np.frombuffer(text, np.uint8)
    ends = np.flatnonzero(codes == ord("\n"))
    if every == 1 or len(ends) <= _FEW:
        return _parse([line for line in text.split(b"\n") if line.strip()], found)
    columns, skipped = (_STEP.findall(text), _LOSS.findall(text)), b'"skipped_steps": '
    whole = {*map(len, columns)} == {len(ends)} and (codes[ends - 1] == ord("}")).all()
    if not whole or text.count(skipped) != text.count(skipped + b"0.0"):  # look closer
        half = ends[len(ends) // 2] + 1
        return sum(_take(part, every, found, short) for part in (text[:half], text[half:]))
    short.append(np.stack([np.fromiter(map(float, of), float) for of in columns], axis=1))
    starts = np.append(0, ends[:-1] + 1)
    cuts = zip(starts[::every], ends[::every], strict=True)
    return _parse([text[start:end] for start, end in cuts], found)


def _parse(lines: list[bytes], found: dict[tuple[str, ...], list[list[float]]]) -> int:
    """Adds the numbers of lines to those found; how many are broken."""
    parsed = []
    with contextlib.suppress(ValueError, LookupError, TypeError, RecursionError):
        parsed = [_numbers(row) for row in json.loads(b"[%s]" % b",".join(lines))]
    if len(parsed) != len(lines):
        half = len(lines) // 2
        return sum(_parse(part, found) for part in (lines[:half], lines[half:])) if half else 1
    for names, numbers in parsed:
        found.setdefault(names, []).append(numbers)
    return 0


def _numbers(row: Any) -> tuple[tuple[str, ...], list[float]]:
    values = dict(row)
    if not math.isfinite(float(values["step"])):
        raise ValueError
    return tuple(values), [float("nan" if v is None else v) for v in values.values()]


def _tables(rows: dict[tuple[str, ...], np.ndarray]) -> Any:
    """Steps and numbers of reports, and evaluations; of a step that is there twice the last."""
    reports = {n: a for n, a in rows.items() if any(not k.startswith("eval/") for k in n[1:])}
    names = sorted({k for n in reports for k in n if k != "step" and not k.startswith("eval/")})
    at = [a[:, n.index("step")] for n, a in reports.items()]
    steps = np.concatenate(at) if at else np.zeros(0)
    order = np.argsort(steps, kind="stable")
    order = order[np.append(np.diff(steps[order]) > 0, True)] if len(order) else order
    values = {}
    for name in names:
        parts = [a[:, n.index(name)] if name in n else np.full(len(a), np.nan)
                 for n, a in reports.items()]  # fmt: skip
        values[name] = np.concatenate(parts)[order]
    evaluations: dict[str, dict[float, float]] = {}
    for keys, array in rows.items():
        for name in (k for k in keys if k.startswith("eval/")):
            pairs = array[:, [keys.index("step"), keys.index(name)]]
            evaluations.setdefault(name[5:], {}).update(map(tuple, pairs))
    sorted_ = {n: np.array(sorted(of.items())).T for n, of in sorted(evaluations.items())}
    return steps[order], values, {n: (of[0], of[1]) for n, of in sorted_.items()}


def _read_results(file: Any) -> list[dict[str, Any]]:
    """What `evaluate --out` has written, one or a sweep; [] where a file is something else."""
    try:
        found = json.loads(file.read_text())
        found = found.get("sweep", [found])
        return [r for r in found if r["metrics"] is not None and r["samples"]["count"]]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return []


def _is_of(result: dict[str, Any], run: Run) -> bool:
    folder = str(run.folder if is_remote(run.folder) else run.folder.absolute())
    return str(result["samples"].get("ckpt", "")).rstrip("/") == folder.rstrip("/")


def _environment(folder: Any, names: set[str], saved: list[int]) -> dict[str, Any]:
    """Versions, which the newest checkpoint has, and the count of parameters."""
    text = (folder / "parameters.txt").read_text() if "parameters.txt" in names else ""
    total = re.search(r"Total: (.*)", text)
    found = {"parameters": total[1]} if total else {}
    with contextlib.suppress(OSError, ValueError):  # one that is damaged, or was just removed
        meta = read_meta(folder / FOLDER / str(saved[-1])) if saved else {}
        found |= {f"version of {name}": v for name, v in meta.get("versions", {}).items()}
    return found


def _skips(steps: np.ndarray, skipped: np.ndarray | None) -> list[Event]:
    found = np.zeros(len(steps)) if skipped is None else np.nan_to_num(skipped)
    text = "{:.0f} steps up to here were not finite, and skipped"
    at = np.flatnonzero(found > 0)[-_EVENTS:]
    return [Event("skipped steps", int(steps[i]), text.format(found[i])) for i in at]


def _starts(folder: Any, names: set[str], rollbacks: Any, steps: np.ndarray) -> list[Event]:
    """From the heads of TensorBoard's files, one of which is begun by every start and return."""
    events, starts = [], []
    for name in sorted(n for n in names if n.startswith("events.out.tfevents.")):
        try:
            with opened(folder / name) as stream:
                head = stream.read(512)
            second = struct.unpack("<Q", head[:8])[0] + 16  # a length, its sum, an event, its sum
        except (OSError, struct.error):  # of a killed run
            continue
        # Tags 1, 2 and 7 of the event are time, step and session_log, which further files of a
        # bucket have not. TensorBoard's own reader takes half a second to import.
        if found := _SESSION.match(head, second + 12):
            step = sum((byte & 127) << 7 * i for i, byte in enumerate(found[2]))
            starts.append((*struct.unpack("<d", found[1]), max(step - 1, 0)))
    count = np.zeros(len(steps)) if rollbacks is None else np.nan_to_num(rollbacks)
    for when, step in starts[1:]:
        after = np.searchsorted(steps, step, side="right")
        back = after < len(steps) and count[after] > (count[after - 1] if after else 0)
        date = time.strftime("%Y-%m-%d %H:%M", time.localtime(when))
        said = "went back to here after a step that was not finite" if back else "went on from here"
        events.append(Event("rollback" if back else "restart", step, f"{said}, {date}"))
    return events


def _stalls(file: Any) -> list[tuple[int | None, str]]:
    found = {}
    pattern = r"(?m)^(.{19}) (no step has ended for (\d+) seconds (?:after step (\d+)|.*))$"
    for match in re.finditer(pattern, file.read_text(errors="replace")):
        found[match[4]] = (int(match[4]) if match[4] else None, f"{match[2]}, {match[1]}")
    return [*found.values()]  # of one stall the last line


def _holder(folder: Any) -> tuple[str, bool | None]:
    """Who has, or had, the lock of a workdir; whether that process lives, None: it cannot be told.

    The lock is not tried: a run that starts just then would be refused.
    """
    file = folder / ".lock"
    try:
        if is_remote(folder):
            lock = json.loads(file.read_text())
            return str(lock["who"]), time.time() - lock["at"] < 60
        who, inode = file.read_text().strip(), file.stat().st_ino
        if f" on {socket.gethostname()} " not in who:
            return who, None
        with open("/proc/locks") as locks:
            return who, any(f":{inode} " in line for line in locks if " FLOCK " in line)
    except (OSError, ValueError, LookupError, TypeError):
        return "", None


def _state(folder: Any, last: int, total: int) -> tuple[str, bool]:
    of = f"step {last:,} of {total:,}" if total else f"step {last:,}"
    if total and last >= total:
        return f"finished: {of}", True
    who, lives = _holder(folder)
    if lives is None and not is_remote(folder):
        try:
            silent = time.time() - (folder / "metrics.jsonl").stat().st_mtime
        except OSError:
            silent = _SILENT
        if silent < _SILENT:
            return f"at {of}, written {silent:.0f} s ago", False
        return f"at {of}, and silent for {_duration(silent)}", True
    if lives:
        return f"running: {of} ({who})", False
    ended = "ended before its last step: killed, preempted, or it stopped itself"
    return f"{ended}; {of}" + (f" ({who} is gone)" if who else ""), True


def _duration(seconds: float) -> str:
    units = ((86400, "days"), (3600, "hours"), (60, "minutes"))
    return next((f"{seconds / s:.0f} {name}" for s, name in units if seconds >= 2 * s), "a minute")
