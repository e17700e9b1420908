"""What lies in the folder of a step, read without Orbax and JAX, which take seconds to import.

Orbax notices a file that is missing or cut, but not a flipped bit in the data of an array. So a
step has a checksums.json: CRC-32 finds every single flipped bit, and reads faster than disks do.
A bucket keeps the CRC-32C of its objects itself, so that nothing has to be read there.
"""

import base64
import concurrent.futures
import json
import os
import pathlib
import textwrap
import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from dico_jax.errors import UsageError, one_line
from dico_jax.files import as_path, files_below, is_remote, opened, url_of

FOLDER = "checkpoints"
CHECKSUMS, COMMITTED = "checksums.json", "commit_success.txt"
ITEMS = {"ema": "ema_params", "params": "params"}  # by the name of the weights
_THREADS = 4
ADVICE = ": restore it, or use another step"


class DamagedCheckpointError(UsageError):
    def __init__(self, path: pathlib.Path, reason: object, advice: str = ""):
        self.reason = textwrap.shorten(str(reason), 300)  # TensorStore's name every operation
        super().__init__(f"{path} is damaged ({self.reason}){advice}")


def saved_steps(workdir: str | os.PathLike, folder: str = FOLDER) -> set[int]:
    """The finished steps in a folder of a workdir or of a converted checkpoint."""
    path = as_path(workdir) / folder
    if is_remote(workdir):  # one without that is being written, or was when its run was killed
        parts = [name.split("/") for name in files_below(path)]
        there = [step for step, *rest in parts if rest == [COMMITTED]]
    else:
        there = [p.name for p in path.glob("*") if p.is_dir()]
    return {int(name) for name in there if name.isdecimal()}


def read_meta(folder: pathlib.Path, *fields: str) -> dict[str, Any]:
    """The JSON values beside the arrays of a step; DamagedCheckpointError if one is missing."""
    try:
        meta = json.loads((folder / "meta" / "metadata").read_text())
        return {**meta, **{field: meta[field] for field in fields}}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DamagedCheckpointError(folder / "meta", error) from error


def read_array(item: Any, name: str, context: Any = None) -> np.ndarray:
    """An array of an item, by its path joined with dots; a context of TensorStore's may cache."""
    import tensorstore  # late: what is there is said without it

    # TensorStore, which Orbax writes with, and not Orbax's own handlers of types: those are to go.
    files: Any = {"driver": "file", "path": f"{item.absolute()}/"}
    files = url_of(item) if is_remote(item) else files
    spec = {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": files, "path": f"{name}/"}}
    how: Any = {"open": True, "read": True, "context": context}
    return np.asarray(tensorstore.open(spec, **how).result().read().result())


def verified(folder: pathlib.Path, item: str = "", part: int = 0, parts: int = 1) -> pathlib.Path:
    """The folder of an item or all of a step, whose files, or a share, are as checksums say."""
    files = recorded_checksums(folder, item) or {}
    try:
        names = sorted(files)[part::parts]
        kind = next((kind for name in names for kind in files[name] if kind != "size"), "crc32")
        for name, found in checksums(folder, names, kind).items():
            if found != files[name]:
                reason = f"{name} has {found['size']:,} bytes that are not those that were written"
                raise DamagedCheckpointError(folder, reason, ADVICE)
    except OSError as error:
        name = os.path.relpath(error.filename, folder) if error.filename else one_line(error)
        reason = f"{name} cannot be read ({error.strerror})"
        raise DamagedCheckpointError(folder, reason, ADVICE) from error
    return folder / item


def recorded_checksums(folder: pathlib.Path, item: str = "") -> dict[str, Any] | None:
    """The sums of an item or all, if they guard all that is there; None: none were written."""
    try:
        sums, step = json.loads((folder / CHECKSUMS).read_text()), int(folder.name)
        files = sums["files"]
        wrong = [f"it lacks {name}" for name in files_of(folder, item) if name not in files]
        if sums.get("step", step) != step:
            wrong = [f"it is that of step {sums['step']}"]
        if not wrong:
            return {name: files[name] for name in files if _is_of(item, name)}
    except FileNotFoundError:
        if not read_meta(folder).get("checksums"):
            return None
        wrong = ["it is missing"]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        wrong = [f"{error}"]
    reason = f"{CHECKSUMS} cannot be read as that of step {folder.name}: {wrong[0]}"
    raise DamagedCheckpointError(folder, reason, ADVICE)


def files_of(folder: pathlib.Path, item: str = "") -> list[str]:
    """The files of an item or all items; Orbax changes those of the folder when it commits."""
    if is_remote(folder):
        return sorted(name for name in files_below(folder) if "/" in name and _is_of(item, name))
    found = folder.glob(f"{item or '*'}/**/*")
    return sorted(str(file.relative_to(folder)) for file in found if file.is_file())


def _is_of(item: str, name: str) -> bool:
    return not item or name.startswith(f"{item}/")


def checksums(folder: Any, files: Iterable[str], kind: str = "crc32") -> dict[str, dict[str, Any]]:
    """Size and "crc32" or "crc32c" of files by their paths in a folder."""
    if kind == "crc32c" and os.fspath(folder).startswith("gs://"):
        there, lacking = files_below(folder), {"size": 0, "crc32c": ""}
        found = {name: there.get(name, lacking) for name in files}
        sums = {n: base64.b64decode(about["crc32c"]).hex() for n, about in found.items()}
        return {n: {"size": found[n]["size"], "crc32c": sums[n]} for n in files}
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        rows = pool.map(lambda name: _checksum(folder / name, kind), files)
        return dict(zip(files, rows, strict=True))


def _checksum(file: Any, kind: str) -> dict[str, Any]:
    size, crc = 0, 0
    if kind == "crc32c":  # of a step that was copied from a bucket
        try:
            import google_crc32c
        except ImportError as error:
            fix = "pip install google-crc32c"
            raise UsageError(f"{file.parent} has checksums of a bucket: {fix}") from error
    with opened(file) as stream:
        while chunk := stream.read(1 << 20):
            crc = zlib.crc32(chunk, crc) if kind == "crc32" else google_crc32c.extend(crc, chunk)
            size += len(chunk)
    return {"size": size, kind: f"{crc:08x}"}
