"""What a file or folder is, said without JAX: by first bytes, by name and by what lies in it."""

import collections
import io
import os
import re
import zipfile
from collections.abc import Callable

from dico_jax.errors import UsageError
from dico_jax.files import as_path, is_remote
from dico_jax.pytorch.hub import local_file, local_weights
from dico_jax.pytorch.tensors import AGAIN, about, refusing, shown
from dico_jax.showing import files
from dico_jax.showing.files import Found
from dico_jax.showing.tensors import size, weights

KINDS = (
    "weights (.pt, .pth, .bin, .ckpt, .safetensors, an index of several), arrays (.npz, .npy), "
    "pictures (.png, .jpg, .gif, .webp), zips of pictures, .json, .jsonl, .txt, .array_record, "
    "TensorBoard events, an exported .stablehlo; workdirs, checkpoints, prepared latents, samples, "
    "exports and folders of pictures"
)
_WEIGHTS = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
_PICTURES = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM")
_LEGACY = b"\x80\x02\x8a\x0a"  # PyTorch's before 1.6
_BY_SUFFIX: dict[str, Callable[[str], Found]] = {
    ".jsonl": files.describe_lines,
    ".json": files.describe_json,
    ".txt": files.describe_text,
    ".array_record": files.describe_records,
    **dict.fromkeys(files.PICTURES, files.describe_picture),
}


def describe(path: str, full: bool = False) -> Found:
    """What a file or folder is; numbers of tensors are read for a second, or all.

    UsageError: it is not there, damaged, or of no kind that is known.
    """
    local = path
    if re.fullmatch("hf://[^/]*/[^/]*/?", path):
        local = local_weights(path)
    elif path.startswith("hf://") or (is_remote(path) and not as_path(path).is_dir()):
        local = local_file(path, shards=path.endswith(".index.json"))
    if local == path:
        return _describe(path, full)
    with about(path, local):
        found = _describe(local, full)
    rows = [(name, text.replace(local, path)) for name, text in found.rows]
    return found._replace(rows=rows, file=found.file and found.file.replace(local, path))


def _describe(path: str, full: bool) -> Found:
    if as_path(path).is_dir():
        from dico_jax.showing.folders import describe_folder

        if (found := describe_folder(path, full)) is None:
            raise UsageError(f"{path} is no folder of a kind that is known: name {KINDS}")
        return found
    if not os.path.exists(path):
        raise UsageError(f"{path}: no such file or folder")
    return _file(path, full)


def _file(path: str, full: bool) -> Found:
    name, suffix = os.path.basename(path), os.path.splitext(path)[1].lower()
    if not os.path.isfile(path):
        raise UsageError(f"{path} is a device: name a file or a folder")
    with open(path, "rb") as stream:
        start = stream.read(16)
    if not start:
        raise UsageError(f"{path} is empty; {AGAIN}")
    if suffix in _WEIGHTS or start.startswith(_LEGACY) or name.endswith(".index.json"):
        return Found(*weights(path, full))
    if suffix == ".npz":
        return files.describe_npz(path, full)
    if suffix == ".npy" or start.startswith(b"\x93NUMPY"):
        return files.describe_npy(path, full)
    if suffix in _BY_SUFFIX:
        return _BY_SUFFIX[suffix](path)
    if start.startswith(b"PK"):
        return _zip(path, full)
    if start[8:9] == b"{":
        return Found(*weights(path, full))
    if start.startswith(_PICTURES):
        return files.describe_picture(path)
    if name.startswith("events.out.tfevents"):
        rows = [("size", size(os.path.getsize(path))), ("see", "tensorboard --logdir=FOLDER")]
        return Found("TensorBoard events", rows)
    if suffix == ".stablehlo":
        return Found("the program of an exported sampler: show its folder", [])
    fix = f"is of no kind that is known (it starts with {shown(start)}): name {KINDS}"
    raise UsageError(f"{path} {fix}")


def _zip(path: str, full: bool) -> Found:
    with refusing(path), zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        if not names:
            raise UsageError(f"{path} is a zip of nothing: name another file")
        if pictures := [name for name in names if name.lower().endswith(files.PICTURES)]:
            first = io.BytesIO(archive.read(pictures[0]))
            rows = files.class_rows(collections.Counter(map(os.path.dirname, pictures)))
            found = files.describe_picture(f"{path}: {pictures[0]}", first)
            return Found("pictures in a zip", rows, found.picture)
    if any(name.endswith("data.pkl") for name in names):
        return Found(*weights(path, full))
    if any(name.endswith(".npy") for name in names):
        return files.describe_npz(path, full)
    listed = ", ".join(names[:5]) + " ..." * (len(names) > 5)
    return Found("a zip without pictures", [("files", f"{len(names):,}: {listed}")])
