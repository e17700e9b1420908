"""A small classifier whose features stand in for Inception's where pictures are small.

Distances in its features compare runs on one set of pictures with one another, and with nothing
else. It is trained on the pictures themselves and kept in a file, because every training gives
other features.
"""

import dataclasses
import functools
import hashlib
import io
import json
import os
import pathlib
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from flax.traverse_util import flatten_dict, unflatten_dict

from dico_jax.data.pipeline import read_label, training_batches
from dico_jax.data.sources import Source
from dico_jax.errors import UsageError
from dico_jax.evaluation.feature_networks import Features

NAME = "classifier"
FEATURES_WIDTH = 64
_WIDTHS = (32, 64, 128)
_BATCH_SIZE = 128
_LEARNING_RATE = 3e-3
_MIN_STEPS, _MAX_STEPS, _EPOCHS = 300, 4000, 10
_HELD_OUT = 10  # one of so many examples
_FORMAT = "dico_jax classifier 1"


class ConvClassifier(nn.Module):
    """Three convolutions, a mean over positions, a layer of features, a layer of logits."""

    num_classes: int

    @nn.compact
    def __call__(self, images):
        """uint8 (N, H, W, C) to features (N, 64) and logits (N, num_classes)."""
        x = images.astype(jnp.float32) / 127.5 - 1
        for i, width in enumerate(_WIDTHS):
            stride = 1 if i == 0 else 2
            x = nn.Conv(width, (3, 3), strides=stride, name=f"conv{i}")(x)
            x = nn.relu(nn.LayerNorm(name=f"norm{i}")(x))
        features = nn.relu(nn.Dense(FEATURES_WIDTH, name="features")(x.mean((1, 2))))
        return features, nn.Dense(self.num_classes, name="logits")(features)


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A trained classifier; a `FeatureNetwork`.

    Attributes:
      params: its weights.
      image_shape: (H, W, C) of the pictures it takes.
      class_names: of its classes.
      info: how it was made: the pictures, steps, and its accuracy on those it has not seen.
    """

    params: Any
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    info: dict[str, Any]

    name = NAME
    width = FEATURES_WIDTH
    spatial_width = 0
    cpu_batch_size = 64
    warning = None

    @property
    def num_classes(self) -> int:
        """Number of logits."""
        return len(self.class_names)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the weights."""
        found = hashlib.sha256()
        for path, leaf in sorted(flatten_dict(self.params, sep="/").items()):
            found.update(path.encode() + np.ascontiguousarray(leaf, "<f4").tobytes())
        return found.hexdigest()

    def check_images(self, shape: tuple[int, int, int], name: str) -> None:
        """Raises UsageError unless images have the shape that it was trained on."""
        if tuple(shape) != self.image_shape:
            raise UsageError(
                f"{name} has images of shape {tuple(shape)}, but this classifier was trained on "
                f"{self.image_shape}"
            )

    def apply(self, params, images) -> Features:
        """See `FeatureNetwork`."""
        network = ConvClassifier(self.num_classes)
        features, logits = _apply(network, params, images)
        return Features(features, None, logits)

    def save(self, path: str | os.PathLike) -> None:
        """Writes an .npz file; what is there already is replaced at the end, at once."""
        path = pathlib.Path(path)
        about = {
            "format": _FORMAT,
            "image_shape": self.image_shape,
            "class_names": self.class_names,
            "info": self.info,
        }
        arrays: Any = {k: np.asarray(v) for k, v in flatten_dict(self.params, sep="/").items()}
        buffer = io.BytesIO()
        np.savez(buffer, about=np.frombuffer(json.dumps(about).encode(), np.uint8), **arrays)
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_bytes(buffer.getvalue())
        temporary.replace(path)


def load_classifier(path: str | os.PathLike) -> Classifier:
    """Reads what `Classifier.save` has written.

    Raises:
      UsageError: it cannot be read, or is something else.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            about = json.loads(arrays["about"].tobytes())
            flat = {name: arrays[name] for name in arrays.files if name != "about"}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(
            f"{path} is no classifier (python -m dico_jax.prepare classifier makes one): {error}"
        ) from error
    if about.get("format") != _FORMAT:
        raise UsageError(f"{path} is no classifier of the format {_FORMAT!r}")
    classifier = Classifier(
        params=unflatten_dict(flat, sep="/"),
        image_shape=tuple(about["image_shape"]),
        class_names=tuple(about["class_names"]),
        info=about["info"],
    )
    network = ConvClassifier(classifier.num_classes)
    image = jax.ShapeDtypeStruct((1, *classifier.image_shape), jnp.uint8)
    wanted = flatten_dict(jax.eval_shape(network.init, jax.random.key(0), image)["params"], sep="/")
    if {k: v.shape for k, v in wanted.items()} != {k: v.shape for k, v in flat.items()}:
        raise UsageError(f"{path} is a classifier with other layers than this version has")
    return classifier


def train_classifier(
    source: Source,
    read: Callable[[Any, bool], np.ndarray],
    *,
    max_steps: int = _MAX_STEPS,
    seed: int = 0,
) -> Classifier:
    """Trains a classifier on pictures, nine tenths of them; the others tell its accuracy.

    It takes ten epochs, but at least 300 and at most `max_steps` steps of 128 pictures.

    Args:
      source: pictures with labels.
      read: makes a picture's pixels, see `dico_jax.data.pipeline.Reader`.
      max_steps: at most so many steps.
      seed: decides order and initial weights.

    Raises:
      UsageError: the source has no pictures, one class, or too few examples.
    """
    _check_source(source)
    indices = np.arange(len(source))
    held = indices[_HELD_OUT // 2 :: _HELD_OUT]
    train = _Subset(source, np.setdiff1d(indices, held))
    size = min(_BATCH_SIZE, len(train))
    num_steps = min(max(_EPOCHS * len(train) // size, _MIN_STEPS), max_steps)
    network = ConvClassifier(len(source.class_names))
    optimizer = optax.adamw(optax.cosine_decay_schedule(_LEARNING_RATE, num_steps))

    def loss_fn(params, batch):
        _, logits = _apply(network, params, batch["image"])
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits, batch["condition"]["label"]
        )
        return losses.mean()

    @jax.jit
    def step(params, opt_state, batch):
        updates, opt_state = optimizer.update(jax.grad(loss_fn)(params, batch), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    batches = iter(training_batches(train, read, read_label, batch_size=size, seed=seed))
    batch = next(batches)
    params = jax.jit(network.init)(jax.random.key(seed), batch["image"])["params"]
    opt_state = optimizer.init(params)
    for _ in tqdm.trange(num_steps, desc="classifier", unit="step", dynamic_ncols=True):
        params, opt_state = step(params, opt_state, {k: batch[k] for k in ("image", "condition")})
        batch = next(batches)
    classify = jax.jit(lambda p, x: _apply(network, p, x)[1].argmax(-1))
    right = [
        np.asarray(classify(params, images)) == labels
        for images, labels in _pictures(_Subset(source, held), read, size)
    ]
    return Classifier(
        params=jax.device_get(params),
        image_shape=batch["image"].shape[1:],
        class_names=tuple(source.class_names),
        info={
            "source": repr(source),
            "num_steps": num_steps,
            "seed": seed,
            "accuracy": float(np.mean(np.concatenate(right))),
        },
    )


def _apply(network: ConvClassifier, params: Any, images: Any) -> Any:
    return network.apply({"params": params}, images)


def _check_source(source: Source) -> None:
    if source.kind != "pictures":
        raise UsageError(f"{source!r} has {source.kind}: a classifier is trained on pictures")
    if len(source.class_names) < 2:
        raise UsageError(f"{source!r} has one class: a classifier needs two or more")
    if len(source) < 2 * _HELD_OUT:
        raise UsageError(f"{source!r} has {len(source)} pictures: a classifier needs more")


def _pictures(source: "_Subset", read, size: int):
    """Batches of all pictures, and their labels; the last one is smaller."""
    for first in range(0, len(source), size):
        examples = [source[i] for i in range(first, min(first + size, len(source)))]
        images = np.stack([read(example["image"], False) for example in examples])
        yield images, np.array([example["label"] for example in examples])


class _Subset:
    """Some examples of a source."""

    def __init__(self, source: Source, indices: Sequence[int] | np.ndarray):
        self._source, self._indices = source, np.asarray(indices)
        self.kind, self.class_names = source.kind, source.class_names
        self.skipped: dict[str, str] = {}

    def __len__(self):
        return len(self._indices)

    def __getitem__(self, index):
        return self._source[int(self._indices[index])]

    def example_id(self, index):
        return self._source.example_id(int(self._indices[index]))
