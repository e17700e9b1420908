"""The CLIP score (arXiv 2104.08718): how well images fit the texts that they were made from."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dico_jax.data.image_sets import ImageSet
from dico_jax.errors import UsageError
from dico_jax.evaluation.networks import FeatureNetwork, Features, make_feature_fn
from dico_jax.files import as_path
from dico_jax.pytorch.tensors import about
from dico_jax.text.clip import ImageConfig, ImageTower, TextConfig, TextTower, normalized
from dico_jax.text.clip_weights import Tower, load_tower
from dico_jax.text.encoders import ClipEncoder
from dico_jax.text.tokenizers import load_tokenizer

CLIP_SCORE = "clip_score"
PROMPTS = "prompts.txt"  # beside images that `sample --prompts` wrote: the text of each, in lines
_BATCH_SIZE = 64  # texts at a time
_NORMAL = 1.959964  # standard errors on both sides of a mean that hold 95 %


class ClipImages(FeatureNetwork):
    """CLIP's image tower; the pooled features are embeddings of length 1, and it has no logits."""

    name, num_classes, cpu_batch_size = "clip", 1, 8

    def __init__(self, tower: Tower):
        self.params, self.digest = tower.params, tower.digest
        self._config: ImageConfig = tower.config
        self.width = tower.config.projection_dim

    def check_images(self, shape, name):
        """See `FeatureNetwork`: grey or RGB; any size is scaled and cropped."""
        if shape[-1] not in (1, 3):
            raise UsageError(f"{name} has images of {shape[-1]} channels: 1 or 3 are needed")

    def apply(self, params, images):
        pixels = normalized(prepared(images, self._config.image_size))
        found = ImageTower(self._config).apply({"params": params}, pixels)
        return Features(_of_length_one(found), None, jnp.zeros((len(images), 1)))


def _of_length_one(vectors: Any) -> Any:
    return vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True)


def prepared(images: jax.Array, side: int) -> jax.Array:
    """Images, uint8 (N, H, W, 1 or 3), as CLIP wants them, (N, side, side, 3), 0 to 255, float32.

    Scaled to a shorter side of `side` (bicubic, as Pillow does it, but for pictures more than twice
    as high as wide, which it scales in the other order), then cropped to the centre.
    """
    height, width = images.shape[1:3]
    sizes = [side * size // min(height, width) for size in (height, width)]
    x = jnp.broadcast_to(images.astype(jnp.float32), (*images.shape[:3], 3))
    for axis in (2, 1):  # Pillow rounds in between
        shape = (*x.shape[:axis], sizes[axis - 1], *x.shape[axis + 1 :])
        x = jnp.clip(jnp.floor(jax.image.resize(x, shape, "cubic") + 0.5), 0, 255)
    top, left = ((size - side) // 2 for size in sizes)
    return x[:, top : top + side, left : left + side]


class ClipScorer:
    """Scores images by the text of each: 100 times the cosine of CLIP's two embeddings.

    Attributes:
      network, features: the image tower, and the function from images to its features.
      about: what a result says of it.
    """

    def __init__(self, source: str, texts: Sequence[str], flag: str = "--clip", **how: Any):
        """Loads both towers and embeds the texts; `how` are as for `make_feature_fn`."""
        with about(f"{flag}={source}", source):
            image, tower = load_tower(source, ImageConfig), load_tower(source, TextConfig)
            length = min(77, tower.config.max_position_embeddings)
            tokenizer = ClipEncoder(tower, load_tokenizer(source, length)).tokenizer
            sizes = {t.config.projection_dim for t in (image, tower)}
            if len(sizes) > 1 or 0 in sizes:
                raise UsageError("its towers have no projections into one space")
        distinct, self._which = np.unique(np.array(texts, object), return_inverse=True)
        self._embeddings = _embedded(tower, tokenizer(list(distinct)))
        self.network = ClipImages(image)
        self.features = make_feature_fn(self.network, **how)
        self.about = {
            "path": source,
            "image_sha256": image.digest,
            "text_sha256": tower.digest,
            "texts_sha256": hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest(),
            "texts_cut": tokenizer.cut,
        }

    def scores(self, embeddings: np.ndarray, start: int) -> np.ndarray:
        """The scores, float64 (n,), of images `start` and on, from their embeddings (n, D)."""
        texts = self._embeddings[self._which[start : start + len(embeddings)]]
        return 100 * np.einsum("nd,nd->n", embeddings, texts, dtype=np.float64)


def _embedded(tower: Tower, ids: np.ndarray) -> np.ndarray:
    """The embeddings of texts, of length 1, float32 (N, D)."""

    @jax.jit
    def embed(params, ids):
        found: Any = TextTower(tower.config).apply({"params": params}, ids)
        return _of_length_one(found.embedding)

    parts = []
    for first in range(0, len(ids), _BATCH_SIZE):
        part = ids[first : first + _BATCH_SIZE]
        whole = np.pad(part, ((0, _BATCH_SIZE - len(part)), (0, 0)), mode="edge")
        parts.append(np.asarray(embed(tower.params, whole))[: len(part)])
    return np.concatenate(parts)


def clip_numbers(scores: np.ndarray) -> dict[str, float]:
    """The score of all images, at least 0, and half the width of its 95 % interval."""
    error = np.std(scores, ddof=1) / np.sqrt(len(scores)) if len(scores) > 1 else 0.0
    mean = max(float(np.mean(scores)), 0.0)
    return {CLIP_SCORE: mean, f"{CLIP_SCORE}_interval": float(_NORMAL * error)}


def texts_of(images: ImageSet, path: str, prompts: str | None) -> list[str]:
    """The text of every image: the lines of --prompts, or of `PROMPTS` in their folder `path`."""
    if prompts is None and as_path(path).is_file():
        raise UsageError("--prompts is needed: a file of the texts of the images, in lines")
    file = str(as_path(path) / PROMPTS) if prompts is None else prompts
    try:
        lines = as_path(file).read_bytes().decode("utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        fix = ": no such file" if isinstance(error, FileNotFoundError) else "is no text in UTF-8"
        raise UsageError(
            "--prompts", file, f"{fix}: give the texts of the images, in lines"
        ) from error
    texts = [line.removesuffix("\r") for line in lines[: -1 if lines[-1] == "" else None]]
    if len(texts) != len(images):
        fix = f"has {len(texts)} lines, and {images.name} {len(images)} images: one line each"
        raise UsageError("--prompts", file, fix)
    return texts
