"""Weights of the FID Inception network, from files or from the public release.

Read are the file of PyTorch ports, which pytorch-fid and torch-fidelity share under two names, and
what `convert inception` made of it; other weights too, where tensors and shapes fit.
"""

import functools
import math
import os
import pathlib
import shutil
import urllib.request
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from dico_jax.autoencoders.weights import naming
from dico_jax.errors import UsageError
from dico_jax.evaluation import inception
from dico_jax.evaluation.networks import FeatureNetwork, Features
from dico_jax.files import arrays_digest, check_new, file_digest, new_file, result_path
from dico_jax.pytorch.hub import local_file
from dico_jax.pytorch.key_maps import KEY_MAPS, entries, known_names
from dico_jax.pytorch.lazy_trees import ByteProgress, load_params
from dico_jax.pytorch.torch_files import TensorFile, open_tensors, select_weights, write_safetensors
from dico_jax.terminal import Bar

KEY_MAP = KEY_MAPS["Inception"]
FORMAT = "dico_jax.Inception"  # of a file that `convert inception` wrote
PUBLISHED_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
FILE_NAMES = (
    "pt_inception-2015-12-05-6726825d.pth",  # of pytorch-fid
    "weights-inception-2015-12-05-6726825d.pth",  # of torch-fidelity, the same bytes
)
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILE_NAMES[0]}"
_BATCH_NORM, _EPSILON = ("scale", "bias", "mean", "var"), 1e-3
_TIMEOUT = 30  # seconds without an answer


class InceptionFeatures(FeatureNetwork):
    """Inception; `digest` is of its file, or of the one that a converted file was made of."""

    name, width, num_classes = "inception", inception.NUM_FEATURES, inception.NUM_LOGITS
    spatial_width = 17 * 17 * inception.SPATIAL_CHANNELS
    cpu_batch_size = 2  # more do not fit its caches

    def __init__(self, params: Any, digest: str):
        self.params, self.digest = params, digest
        self.is_published = digest == PUBLISHED_SHA256
        if not self.is_published:
            self.warning = "these are not the published weights of Inception: compare no numbers"

    def check_images(self, shape, name):
        """See `FeatureNetwork`: grey or RGB; any size is scaled to 299x299."""
        if shape[-1] not in (1, 3):
            raise UsageError(f"{name} has images of {shape[-1]} channels: 1 or 3 are needed")

    def apply(self, params, images):
        if images.shape[-1] == 1:
            images = jnp.repeat(images, 3, axis=-1)
        return Features(**inception.features_of(params, images))


def load_inception(
    path: str | os.PathLike | None, *, flag: str = "--inception", dtype: Any = np.float32
) -> InceptionFeatures:
    """The network with the weights of a file, or the published ones.

    Without a path they are looked for in the cache folder ($DICO_JAX_CACHE, or else
    $XDG_CACHE_HOME/dico_jax or ~/.cache/dico_jax), then in torch.hub's, then downloaded.

    Args:
      path: a .pth or .safetensors, hf://OWNER/REPO/FILE, or None.
      flag: what messages call the path.
      dtype: of the parameters; folding is done in float64.
    """
    source = os.fspath(path) if path else _published_file(flag)
    with naming(flag, source):
        flat, digest = _read(source)
        return InceptionFeatures(_folded(flat, dtype), digest)


def convert_inception(source: str | os.PathLike, out: str | os.PathLike) -> str:
    """Writes the weights as a .safetensors, batch norm not folded; returns what was done."""
    source = os.fspath(source)
    count = sum(map(math.prod, state_shapes().values()))
    check_new(result_path(os.fspath(out), ".safetensors"), 4 * count)
    with naming("--input", source):
        flat, digest = _read(source)
        _folded(flat, np.float32)  # refuses weights that are not finite
    metadata = {"format": FORMAT, "tensors_sha256": arrays_digest(flat)}
    metadata |= {"source_name": pathlib.PurePath(source).name, "source_sha256": digest}
    bar = ByteProgress()
    with bar.running(4 * count, "writing"):
        write_safetensors(out, flat, metadata, on_bytes=bar.advance)
    which = "the published weights" if digest == PUBLISHED_SHA256 else "other weights"
    found = f"the FID Inception network, {count:,} numbers, {which} (sha256 {digest})"
    return f"{found}\n{out} is written"


@functools.cache
def state_shapes() -> Mapping[str, tuple[int, ...]]:
    """Path to shape of everything in a file: batch norm apart from convolutions."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path, leaf in flatten_dict(inception.abstract_params(), sep="/").items():
        module, name = path.rsplit("/", 1)
        if module == "fc":
            shapes[path] = leaf.shape
        elif name == "kernel":
            shapes[f"{module}/conv/kernel"] = leaf.shape
            shapes |= {f"{module}/bn/{statistic}": leaf.shape[-1:] for statistic in _BATCH_NORM}
    return shapes


def _folded(flat: Mapping[str, np.ndarray], dtype: Any) -> Any:
    """The parameters of the network; batch norm is a factor and a shift of each channel."""
    params = {"fc/kernel": flat["fc/kernel"], "fc/bias": flat["fc/bias"]}
    for module in (path.removesuffix("/conv/kernel") for path in flat if "/conv/" in path):
        norm = (flat[f"{module}/bn/{name}"].astype(np.float64) for name in _BATCH_NORM)
        scale, bias, mean, var = norm
        with np.errstate(all="ignore"):
            factor = scale / np.sqrt(var + _EPSILON)
            params[f"{module}/kernel"] = flat[f"{module}/conv/kernel"] * factor
            params[f"{module}/bias"] = bias - mean * factor
    if wrong := [path for path, value in params.items() if not np.isfinite(value).all()]:
        raise UsageError(f"weights are NaN or infinite, or variances negative: {wrong[0]} ...")
    return unflatten_dict({p: np.asarray(value, dtype) for p, value in params.items()}, sep="/")


def _read(source: str) -> tuple[dict[str, np.ndarray], str]:
    path = local_file(source)
    with open_tensors(path) as file:
        if file.metadata.get("format", "").startswith(FORMAT):
            return _read_converted(file)
        tensors = known_names(select_weights(file, root=KEY_MAP.root).tensors, KEY_MAP)
        leaves = {p: jax.ShapeDtypeStruct(s, np.float32) for p, s in state_shapes().items()}
        wanted = unflatten_dict(leaves, sep="/")
        if sum(entry.key in tensors for entry in entries(wanted, KEY_MAP)) < len(leaves) / 2:
            found = f"{len(tensors)} tensors such as {next(iter(tensors))!r}"
            raise UsageError(f"it is no Inception network: {found}; give {FILE_NAMES[0]}")
        if "fc.bias" in tensors and tuple(tensors["fc.bias"].shape) == (1000,):
            fix = f"give TensorFlow's (1008 classes), {FILE_NAMES[0]}"
            raise UsageError(f"it is torchvision's Inception (1000 classes); {fix}")
        params = load_params(tensors, wanted, KEY_MAP)
    return flatten_dict(params, sep="/"), file_digest(path)


def _read_converted(file: TensorFile) -> tuple[dict[str, np.ndarray], str]:
    about, shapes = file.metadata, {name: ref.shape for name, ref in file.tensors.items()}
    if about["format"] == FORMAT and shapes == state_shapes():
        flat = {name: file.tensors[name].read() for name in shapes}
        if arrays_digest(flat) == about.get("tensors_sha256"):
            return flat, about.get("source_sha256", "")
    raise UsageError("it is damaged, was changed, or is of another version: convert it again")


def cache_folder() -> pathlib.Path:
    """Where downloaded files are kept."""
    return _folder("DICO_JAX_CACHE", "dico_jax")


def _folder(variable: str, name: str) -> pathlib.Path:
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return pathlib.Path(os.environ.get(variable) or f"{base}/{name}").expanduser()


def _published_file(flag: str) -> str:
    hub = _folder("TORCH_HOME", "torch") / "hub" / "checkpoints"
    for path in (folder / name for folder in (cache_folder(), hub) for name in FILE_NAMES):
        if path.is_file():
            _check_digest(str(path), path, "remove it")
            return str(path)
    path = cache_folder() / FILE_NAMES[0]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(URL, timeout=_TIMEOUT) as response, new_file(path) as stream:
            size = int(response.headers.get("Content-Length") or 0)
            with Bar.wrapattr(response, "read", size, desc=path.name) as shown:
                shutil.copyfileobj(shown, stream)
            stream.flush()
            _check_digest(f"{URL}, downloaded to {path},", stream.name, "try again")
    except OSError as error:  # also urllib's
        why = f"{URL} cannot be downloaded ({getattr(error, 'reason', None) or error})"
        fix = f"put this file into {path.parent}, or give it by {flag}=FILE; for small sets "
        fix += f"{flag.removesuffix('inception')}features=classifier.npz (prepare classifier)"
        raise UsageError(f"{flag} is not given, and {why}: {fix}") from error
    return str(path)


def _check_digest(what: str, path: str | os.PathLike, fix: str) -> None:
    if (found := file_digest(path)) != PUBLISHED_SHA256:
        digests = f"its sha256 is {found}, and should be {PUBLISHED_SHA256}"
        raise UsageError(f"{what} is damaged or another file: {digests}; {fix}")
