"""Weights of the FID Inception network, from files or from the public release.

Read are the public file of PyTorch ports, which pytorch-fid and torch-fidelity share under two
names, and a .safetensors that `convert inception` made of it. Files of other weights are taken too,
where tensors and shapes fit: what they are is part of the result.
"""

import dataclasses
import functools
import hashlib
import math
import os
import pathlib
import urllib.request
from collections.abc import Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

from dico_jax.autoencoders.weights import naming
from dico_jax.errors import UsageError
from dico_jax.evaluation.features import FeatureNetwork, Features
from dico_jax.evaluation.inception import (
    NUM_FEATURES,
    NUM_LOGITS,
    SPATIAL_CHANNELS,
    Inception,
    abstract_params,
)
from dico_jax.evaluation.statistics import file_digest
from dico_jax.files import check_new, new_file
from dico_jax.pytorch.hub import local_file
from dico_jax.pytorch.key_maps import KEY_MAPS, entries, known_names
from dico_jax.pytorch.lazy_trees import Health, deferred_tree
from dico_jax.pytorch.progress import ByteProgress
from dico_jax.pytorch.torch_files import TensorFile, open_tensors, select_weights, write_safetensors

KEY_MAP = KEY_MAPS["Inception"]
FORMAT = "dico_jax.Inception"  # of a file that `convert inception` wrote

URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth"
)
PUBLISHED_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
FILE_NAMES = (
    "pt_inception-2015-12-05-6726825d.pth",  # of pytorch-fid
    "weights-inception-2015-12-05-6726825d.pth",  # of torch-fidelity, the same bytes
)

_OTHER_WEIGHTS = (
    "these are not the published weights of Inception: the numbers compare with no other ones"
)
_EPSILON = 1e-3  # of batch norm
_CLASSES_OF_TORCHVISION = 1000
_TIMEOUT = 30  # seconds without an answer
_CHUNK = 1 << 20  # bytes


class InceptionFeatures(FeatureNetwork):
    """TensorFlow's Inception of 2015-12-05, as ADM's evaluator uses it, with weights of some file.

    Attributes:
      digest: sha256 (hex) of the file, or of the one that a converted file was made of.
      params: for `dico_jax.evaluation.inception.Inception`, a tree of NumPy arrays; batch norm is
        folded into kernels and biases.
      is_published: whether these are the weights that published distances are measured with.
    """

    name = "inception"
    width = NUM_FEATURES
    spatial_width = 17 * 17 * SPATIAL_CHANNELS
    num_classes = NUM_LOGITS
    cpu_batch_size = 2  # more do not fit its caches

    def __init__(self, params: Any, digest: str):
        self.params, self.digest = params, digest
        self.is_published = digest == PUBLISHED_SHA256
        self.warning = None if self.is_published else _OTHER_WEIGHTS

    def check_images(self, shape, name):
        """See `FeatureNetwork`: grey or RGB; any size is scaled to 299x299."""
        if shape[-1] not in (1, 3):
            raise UsageError(f"{name} has images of {shape[-1]} channels: 1 or 3 are needed")

    def apply(self, params, images):
        """See `FeatureNetwork`."""
        if images.shape[-1] == 1:
            images = jnp.repeat(images, 3, axis=-1)
        found: Any = Inception().apply({"params": params}, images)
        return Features(**found)


@dataclasses.dataclass(frozen=True)
class _Tensors:
    """All numbers of a file: by path ("Mixed_5b/branch1x1/bn/mean"), float32; and its digest."""

    flat: dict[str, np.ndarray]
    digest: str


def load_inception(
    path: str | os.PathLike | None, *, flag: str = "--inception", dtype: Any = np.float32
) -> InceptionFeatures:
    """The network with the weights of a file, or the published ones.

    Without a path they are looked for in the cache folder ($DICO_JAX_CACHE, or else
    $XDG_CACHE_HOME/dico_jax or ~/.cache/dico_jax), then where torch.hub would have put them, then
    downloaded into the cache folder. These three are used only if their digest is the published.

    Args:
      path: a .pth or .safetensors, hf://OWNER/REPO/FILE, or None.
      flag: what messages call the path.
      dtype: of the parameters; folding is done in float64.

    Raises:
      UsageError: the file cannot be read, is damaged, is no such network, or has weights that are
        not finite; or it cannot be downloaded, or is not what was published.
    """
    source = os.fspath(path) if path else _published_file(flag)
    with naming(flag, source):
        tensors = _read(source)
        return InceptionFeatures(_folded(tensors.flat, dtype), tensors.digest)


def convert_inception(source: str | os.PathLike, out: str | os.PathLike) -> str:
    """Writes the network's weights as one float32 .safetensors, which `load_inception` reads.

    Tensors are named by their paths ("Mixed_5b/branch1x1/conv/kernel"), batch norm is not folded,
    so that nothing is lost. The metadata are "format", "tensors_sha256" and, of the file that it
    was made of, "source_name" and "source_sha256".

    Args:
      source: a .pth or .safetensors, or hf://OWNER/REPO/FILE.
      out: the file to make.

    Returns:
      What was found and done, in two lines.

    Raises:
      UsageError: something cannot be read, is no such network, or may not be written; nothing is
        left.
    """
    source, out = os.fspath(source), os.fspath(out)
    if pathlib.PurePath(out).suffix != ".safetensors":
        raise UsageError(f"--out={out}: name a .safetensors file")
    count = sum(math.prod(shape) for shape in state_shapes().values())
    check_new(out, 4 * count)
    with naming("--input", source):
        tensors = _read(source)
        _folded(tensors.flat, np.float32)  # refuses weights that are not finite
    metadata = {
        "format": FORMAT,
        "tensors_sha256": _digest(tensors.flat),
        "source_name": pathlib.PurePath(source).name,
        "source_sha256": tensors.digest,
    }
    bar = ByteProgress()
    with bar.running(4 * count, "writing"):
        write_safetensors(out, tensors.flat, metadata, on_bytes=bar.advance)
    which = "the published weights" if tensors.digest == PUBLISHED_SHA256 else "other weights"
    return (
        f"the FID Inception network, {count:,} numbers, {which} (sha256 {tensors.digest})\n"
        f"{out} is written"
    )


@functools.cache
def state_shapes() -> Mapping[str, tuple[int, ...]]:
    """Path to shape of everything in a file: batch norm apart from convolutions."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path, leaf in flax.traverse_util.flatten_dict(abstract_params(), sep="/").items():
        module, name = path.rsplit("/", 1)
        if module == "fc":
            shapes[path] = leaf.shape
        elif name == "kernel":
            shapes[f"{module}/conv/kernel"] = leaf.shape
            for statistic in ("scale", "bias", "mean", "var"):
                shapes[f"{module}/bn/{statistic}"] = leaf.shape[-1:]
    return shapes


def _abstract_state() -> Any:
    leaves = {path: jax.ShapeDtypeStruct(s, np.float32) for path, s in state_shapes().items()}
    return flax.traverse_util.unflatten_dict(leaves, sep="/")


def _folded(flat: Mapping[str, np.ndarray], dtype: Any) -> Any:
    """The parameters of the network; batch norm is a factor and a shift of each channel."""
    params = {"fc/kernel": flat["fc/kernel"], "fc/bias": flat["fc/bias"]}
    for module in (path.removesuffix("/conv/kernel") for path in flat if "/conv/" in path):
        scale, bias, mean, var = (
            flat[f"{module}/bn/{name}"].astype(np.float64)
            for name in ("scale", "bias", "mean", "var")
        )
        with np.errstate(all="ignore"):
            factor = scale / np.sqrt(var + _EPSILON)
            params[f"{module}/kernel"] = flat[f"{module}/conv/kernel"] * factor
            params[f"{module}/bias"] = bias - mean * factor
    wrong = [path for path, value in params.items() if not np.isfinite(value).all()]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise UsageError(
            f"weights are NaN or infinite, or variances negative: {', '.join(wrong[:5])}{more}"
        )
    params = {path: np.asarray(value, dtype) for path, value in params.items()}
    return flax.traverse_util.unflatten_dict(params, sep="/")


# Files.


def _read(source: str) -> _Tensors:
    """The tensors of a file of either kind.

    Raises:
      UsageError: as in `load_inception`.
    """
    path = local_file(source)
    with open_tensors(path) as file:
        if file.metadata.get("format", "").startswith(FORMAT):
            return _read_converted(file)
        tensors = known_names(select_weights(file).tensors, KEY_MAP)
        _check_network({key: tuple(ref.shape) for key, ref in tensors.items()})
        wanted = entries(_abstract_state(), KEY_MAP)
        leaves = deferred_tree(tensors, wanted, KEY_MAP, Health())
        flat = flax.traverse_util.flatten_dict(leaves, sep="/")
        found = {name: np.ascontiguousarray(leaf.read()) for name, leaf in flat.items()}
    return _Tensors(found, file_digest(path))


def _check_network(shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Names the usual files that are of another network.

    Raises:
      UsageError: it is torchvision's Inception, or none.
    """
    expected = {entry.key for entry in entries(_abstract_state(), KEY_MAP)}
    if len(expected & shapes.keys()) < len(expected) / 2:
        example = next(iter(shapes))
        raise UsageError(
            f"it is no Inception network: {len(shapes)} tensors such as {example!r}; give "
            f"{FILE_NAMES[0]}"
        )
    if shapes.get("fc.bias") == (_CLASSES_OF_TORCHVISION,):
        raise UsageError(
            f"it is torchvision's Inception ({_CLASSES_OF_TORCHVISION} classes), whose distances "
            f"are other ones; give TensorFlow's ({NUM_LOGITS} classes), {FILE_NAMES[0]}"
        )


def _read_converted(file: TensorFile) -> _Tensors:
    if file.metadata["format"] != FORMAT:
        raise UsageError(f"its format {file.metadata['format']} is not {FORMAT}: convert it again")
    if {name: ref.shape for name, ref in file.tensors.items()} != state_shapes():
        raise UsageError("its tensors are not those that convert inception writes")
    flat = {name: file.tensors[name].read() for name in state_shapes()}
    if _digest(flat) != file.metadata.get("tensors_sha256"):
        raise UsageError("it is damaged, or was changed after its conversion: convert it again")
    return _Tensors(flat, file.metadata.get("source_sha256", ""))


def _digest(flat: Mapping[str, np.ndarray]) -> str:
    """sha256 over names and float32 numbers, in the order of names."""
    digest = hashlib.sha256()
    for name in sorted(flat):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(flat[name], "<f4").data)
    return digest.hexdigest()


# The published file.


def cache_folder() -> pathlib.Path:
    """Where downloaded files are kept."""
    if given := os.environ.get("DICO_JAX_CACHE"):
        return pathlib.Path(given).expanduser()
    return _user_cache() / "dico_jax"


def _user_cache() -> pathlib.Path:
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()


def _torch_hub() -> pathlib.Path:
    """Where PyTorch ports keep the file."""
    home = os.environ.get("TORCH_HOME")
    base = pathlib.Path(home).expanduser() if home else _user_cache() / "torch"
    return base / "hub" / "checkpoints"


def _published_file(flag: str) -> str:
    """The path of the published file, which is downloaded where it is not there yet."""
    for path in (folder / name for folder in (cache_folder(), _torch_hub()) for name in FILE_NAMES):
        if path.is_file():
            _check_digest(str(path), file_digest(path), "remove it")
            return str(path)
    path = cache_folder() / FILE_NAMES[0]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"DICO_JAX_CACHE: the folder {path.parent} cannot be made: {error.strerror}"
        ) from error
    try:
        _download(path)
    except OSError as error:  # also urllib's
        raise UsageError(
            f"{flag} is not given, and {URL} cannot be downloaded "
            f"({getattr(error, 'reason', None) or error}): put this file into {path.parent}, or "
            f"give it by {flag}=FILE"
        ) from error
    return str(path)


def _download(path: pathlib.Path) -> None:
    """Downloads the published file; it appears when its digest was found right."""
    digest, bar = hashlib.sha256(), ByteProgress()
    with urllib.request.urlopen(URL, timeout=_TIMEOUT) as response, new_file(path) as stream:
        size = int(response.headers.get("Content-Length") or 0)
        with bar.running(size, FILE_NAMES[0]):
            for chunk in iter(functools.partial(response.read, _CHUNK), b""):
                digest.update(chunk)
                stream.write(chunk)
                bar.advance(len(chunk))
        _check_digest(f"{URL}, downloaded to {path},", digest.hexdigest(), "try again")


def _check_digest(what: str, found: str, fix: str) -> None:
    if found != PUBLISHED_SHA256:
        raise UsageError(
            f"{what} is damaged or another file: its sha256 is {found}, and should be "
            f"{PUBLISHED_SHA256}; {fix}"
        )
