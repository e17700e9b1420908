"""Files of Hugging Face repositories, by names such as hf://owner/repo@revision/folder/file.pt."""

import os
import re
from collections.abc import Callable
from typing import Any

from dico_jax.errors import UsageError
from dico_jax.pytorch.safetensors_files import weight_map

_SCHEME = "hf://"
_NAME = re.compile(r"([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.*))?", re.DOTALL)
_WEIGHTS = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
_SHARD = re.compile(r"(.*)-\d+-of-\d+(\.\w+)")  # of what NAME.SUFFIX.index.json lists


def local_file(name: str | os.PathLike) -> str:
    """The path of a file: `name`, or where huggingface_hub has put hf://OWNER/REPO[@REVISION]/FILE.

    Of an index of sharded .safetensors, the shards are fetched too.
    """
    name = os.fspath(name)
    if not is_remote(name):
        return name
    path = _download(name)
    for shard in dict.fromkeys(weight_map(path).values()) if name.endswith(".json") else ():
        _download(name, shard)
    return path


def local_weights(name: str | os.PathLike, step: int | None = None) -> str:
    """The path of a folder or file of weights: `name`, or what hf://OWNER/REPO[...] has, fetched.

    A repository without a FILE is a workdir or a converted checkpoint, of which the newest step or
    `step` is fetched, or it has one file of weights; else a UsageError lists what it has.
    """
    name = os.fspath(name)
    if not is_remote(name):
        return name
    repo, revision, file = _parts(name)
    if file:
        return local_file(name)
    files = _ask(name, "it", lambda hub: hub.list_repo_files(repo, revision=revision))
    steps = {int(match[1]) for f in files if (match := re.match(r"checkpoints/(\d+)/", f))}
    if steps:
        wanted = ["config.json", f"checkpoints/{max(steps) if step is None else step}/*"]
        how: Any = {"allow_patterns": wanted, "ignore_patterns": ["*/opt_state/*"]}
        return _ask(name, "it", lambda hub: hub.snapshot_download(repo, revision=revision, **how))
    found = _weight_files(files)
    if len(found) != 1:
        have = f"several files of weights: {', '.join(sorted(found)[:20])}; name one of them"
        have = have if found else "neither files of weights nor checkpoints/STEP"
        raise UsageError(f"{name} has {have}, hf://OWNER/REPO[@REVISION]/FILE")
    return local_file(f"{name.rstrip('/')}/{found[0]}")


def _weight_files(files: list[str]) -> list[str]:
    """The sets of weights among the files of a repository; of two formats of one, safetensors."""
    sets: dict[str, str] = {}
    for file in sorted(files, key=lambda f: (".safetensors" not in f, f)):
        whole = file.removesuffix(".index.json")
        if whole.endswith(_WEIGHTS) and not _SHARD.fullmatch(file):
            sets.setdefault(os.path.splitext(whole)[0], file)
    return list(sets.values())


def file_beside(name: str, file: str) -> str | None:
    """Where `file` of the folder of hf://OWNER/REPO/FILE is; None if the repository has none."""
    try:
        return _download(name, file)
    except UsageError as error:
        classes = {cls.__name__ for cls in type(error.__cause__).__mro__}
        # The class of "not in the cache, and no network" derives from that of "not there".
        if "EntryNotFoundError" in classes and "LocalEntryNotFoundError" not in classes:
            return None
        raise


def is_remote(name: str | os.PathLike) -> bool:
    """Whether `name` is an address of this kind, and not a file."""
    return os.fspath(name).startswith(_SCHEME)


def _parts(name: str) -> tuple[str, str | None, str]:
    """OWNER/REPO, revision and file of an address."""
    found = _NAME.fullmatch(name.removeprefix(_SCHEME))
    if found is None:
        raise UsageError(f"{name}: write hf://OWNER/REPO/FILE, or hf://OWNER/REPO@REVISION/FILE")
    return found[1], found[2], found[3] or ""


def _download(name: str, beside: str | None = None) -> str:
    """The path of hf://OWNER/REPO/FILE, or of the file called `beside` in its folder."""
    repo, revision, file = _parts(name)
    if not file:
        raise UsageError(f"{name}: write hf://OWNER/REPO/FILE")
    if beside is not None:
        file = os.path.join(os.path.dirname(file), beside)
    how = {"revision": revision} if revision else {}
    return _ask(name, f"{file} of {repo}", lambda hub: hub.hf_hub_download(repo, file, **how))


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
