"""Files that are fetched: of Hugging Face, by hf://owner/repo@revision/file.pt, and of buckets."""

import errno
import functools
import hashlib
import os
import pathlib
import re
import tempfile
from collections.abc import Callable
from typing import Any

from dico_jax import files
from dico_jax.errors import UsageError, one_line
from dico_jax.pytorch.safetensors_files import weight_map

_SCHEME = "hf://"
_NAME = re.compile(r"([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.*))?", re.DOTALL)
_WEIGHTS = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
_SHARD = re.compile(r"(.*)-\d+-of-\d+(\.\w+)")  # of what NAME.SUFFIX.index.json lists


def local_file(name: str | os.PathLike, shards: bool = True) -> str:
    """The path of a file: `name`, or where hf://OWNER/REPO[@REVISION]/FILE or gs://FILE was put.

    A .json is the index of weights whose `shards` are fetched too, or none. What was in a bucket
    stays on the local disk as long as the process lives.
    """
    name = os.fspath(name)
    if not is_remote(name):
        return name
    path = _download(name)
    if shards and name.endswith(".json"):
        for shard in dict.fromkeys(weight_map(path).values()):
            _download(name, shard)
    return path


def local_weights(name: str | os.PathLike, step: int | None = None) -> str:
    """The path of a folder or file of weights: `name`, or what hf://OWNER/REPO[...] has, fetched.

    A repository without a FILE is a workdir or a converted checkpoint, of which the newest step or
    `step` is fetched, or it has one file of weights; else a UsageError lists what it has.
    """
    name = os.fspath(name)
    if not name.startswith(_SCHEME):
        file = name.endswith((*_WEIGHTS, ".json"))  # else a folder, whose parts are read there
        return local_file(name) if file else name
    repo, revision, file = _parts(name)
    if file:
        return local_file(name)
    listed = _ask(name, "it", lambda hub: hub.list_repo_files(repo, revision=revision))
    steps = {int(match[1]) for f in listed if (match := re.match(r"checkpoints/(\d+)/", f))}
    if steps:
        wanted = ["config.json", f"checkpoints/{max(steps) if step is None else step}/*"]
        how: Any = {"allow_patterns": wanted, "ignore_patterns": ["*/opt_state/*"]}
        return _ask(name, "it", lambda hub: hub.snapshot_download(repo, revision=revision, **how))
    found = _weight_files(listed)
    if len(found) != 1:
        have = f"several files of weights: {', '.join(sorted(found)[:20])}; name one of them"
        have = have if found else "neither files of weights nor checkpoints/STEP"
        raise UsageError(f"{name} has {have}, hf://OWNER/REPO[@REVISION]/FILE")
    return local_file(f"{name.rstrip('/')}/{found[0]}")


def _weight_files(listed: list[str]) -> list[str]:
    """The sets of weights among the files of a repository; of two formats of one, safetensors."""
    sets: dict[str, str] = {}
    for file in sorted(listed, key=lambda f: (".safetensors" not in f, f)):
        whole = file.removesuffix(".index.json")
        if whole.endswith(_WEIGHTS) and not _SHARD.fullmatch(file):
            sets.setdefault(os.path.splitext(whole)[0], file)
    return list(sets.values())


def file_beside(name: str, file: str) -> str | None:
    """Where `file` of the folder of hf://OWNER/REPO/FILE or gs://FILE is; None if it has none."""
    try:
        return _download(name, file)
    except UsageError as error:
        classes = {cls.__name__ for cls in type(error.__cause__).__mro__}
        # The class of "not in the cache, and no network" derives from that of "not there".
        missing = "FileNotFoundError" if files.is_remote(name) else "EntryNotFoundError"
        if missing in classes and "LocalEntryNotFoundError" not in classes:
            return None
        raise


def is_remote(name: str | os.PathLike) -> bool:
    """Whether `name` is an address of these kinds, and not a file."""
    return os.fspath(name).startswith(_SCHEME) or files.is_remote(name)


def _parts(name: str) -> tuple[str, str | None, str]:
    """OWNER/REPO, revision and file of an address."""
    found = _NAME.fullmatch(name.removeprefix(_SCHEME))
    if found is None:
        raise UsageError(f"{name}: write hf://OWNER/REPO/FILE, or hf://OWNER/REPO@REVISION/FILE")
    return found[1], found[2], found[3] or ""


def _download(name: str, beside: str | None = None) -> str:
    """The path of hf://OWNER/REPO/FILE or gs://FILE, or of the file `beside` in its folder."""
    if files.is_remote(name):
        return _from_bucket(name if beside is None else f"{os.path.dirname(name)}/{beside}")
    repo, revision, file = _parts(name)
    if not file:
        raise UsageError(f"{name}: write hf://OWNER/REPO/FILE")
    if beside is not None:
        file = os.path.join(os.path.dirname(file), beside)
    how = {"revision": revision} if revision else {}
    return _ask(name, f"{file} of {repo}", lambda hub: hub.hf_hub_download(repo, file, **how))


@functools.cache
def _from_bucket(url: str) -> str:
    folder = pathlib.Path(_kept().name, hashlib.sha256(os.path.dirname(url).encode()).hexdigest())
    folder.mkdir(exist_ok=True)
    try:
        files.download(files.as_path(url), target := folder / os.path.basename(url))
    except Exception as error:  # of many classes
        where = (
            f" to {folder.parent} (TMPDIR)" if getattr(error, "errno", 0) == errno.ENOSPC else ""
        )
        raise UsageError(f"{url} cannot be read{where}: {one_line(error)}") from error
    return str(target)


@functools.cache
def _kept() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="dico_jax_")  # which goes with this process


def forget() -> None:
    """Removes what was fetched of buckets, where a process ends without Python's own end."""
    if _kept.cache_info().currsize:
        _kept().cleanup()


def _ask(name: str, what: str, question: Callable[[Any], Any]) -> Any:
    """What huggingface_hub answers; a UsageError says that `what` cannot be downloaded."""
    try:
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # else it tells of every try
        import huggingface_hub
    except ImportError as error:
        fix = "pip install huggingface_hub, or download the file yourself and give its path"
        raise UsageError(f"{name} needs huggingface_hub: {fix}") from error
    try:
        return question(huggingface_hub)
    except Exception as error:  # of many classes, which change from version to version
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UsageError(f"{name}: {what} cannot be downloaded: {reason}") from error
