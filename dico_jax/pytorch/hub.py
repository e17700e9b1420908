"""Files of Hugging Face repositories, by names such as hf://owner/repo/folder/file.pt."""

import os

from dico_jax.errors import UsageError
from dico_jax.pytorch.safetensors_files import weight_map

_SCHEME = "hf://"


def local_file(name: str | os.PathLike) -> str:
    """The path of a file: `name` itself, or where huggingface_hub has put hf://OWNER/REPO/FILE.

    Of an index of sharded .safetensors, the shards are fetched too.
    """
    name = os.fspath(name)
    if not is_remote(name):
        return name
    path = _download(name)
    for shard in dict.fromkeys(weight_map(path).values()) if name.endswith(".json") else ():
        _download(name, shard)
    return path


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


def _download(name: str, beside: str | None = None) -> str:
    """The path of hf://OWNER/REPO/FILE, or of the file called `beside` in its folder."""
    owner, _, rest = name.removeprefix(_SCHEME).partition("/")
    repo, _, file = rest.partition("/")
    if not (owner and repo and file):
        raise UsageError(f"{name}: write hf://OWNER/REPO/FILE")
    if beside is not None:
        file = os.path.join(os.path.dirname(file), beside)
    try:
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # else it tells of every try
        import huggingface_hub
    except ImportError as error:
        fix = "pip install huggingface_hub, or download the file yourself and give its path"
        raise UsageError(f"{name} needs huggingface_hub: {fix}") from error
    repo = f"{owner}/{repo}"
    try:
        return huggingface_hub.hf_hub_download(repo, file)
    except Exception as error:  # of many classes, which change from version to version
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UsageError(f"{name}: {file} of {repo} cannot be downloaded: {reason}") from error
