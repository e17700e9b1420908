"""Networks whose features are compared, how they run, and the judges of small labelled sets.

There Inception's features mean nothing: a small network stands in for it, which is kept in a file
because every training gives other features; or class agreement and spread, which need no file.
"""

import abc
import contextlib
import dataclasses
import functools
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from scipy.spatial.distance import pdist

from dico_jax.data.bad_examples import BadExampleLog, too_many_bad
from dico_jax.data.pictures import BadExample
from dico_jax.data.pipeline import Reader, read_label, training_batches
from dico_jax.data.sources import Source
from dico_jax.errors import UsageError
from dico_jax.evaluation.statistics import load_arrays, save_arrays
from dico_jax.files import arrays_digest
from dico_jax.parallel.mesh import batch_sharding, from_same, num_batch_shards, replicated
from dico_jax.terminal import Bar

FEATURES_WIDTH, _WIDTHS = 64, (32, 64, 128)
_BATCH_SIZE, _LEARNING_RATE = 128, 3e-3
_MIN_STEPS, _MAX_STEPS, _EPOCHS = 300, 4000, 10
_HELD_OUT = 10  # one of so many examples
_FORMAT = "dico_jax classifier 1"


class Features(NamedTuple):
    """What a network makes of images, float32."""

    pool: Any  # (N, D), what FID, KID, precision and recall compare
    spatial: Any  # (N, S), what sFID compares; None where a network has none
    logits: Any  # (N, classes), what the Inception Score is made of


class FeatureNetwork(abc.ABC):
    """A network for features."""

    name: str  # always given with the numbers: distances in different features do not compare
    digest: str  # SHA-256 of the weights
    width: int  # numbers in the pooled features
    spatial_width: int = 0  # in the spatial ones; 0 for none
    num_classes: int  # number of logits
    cpu_batch_size: int = 64  # images at a time on one core that are fastest
    warning: str | None = None  # what makes its numbers less than they seem
    params: Any  # a tree of arrays

    @abc.abstractmethod
    def check_images(self, shape: tuple[int, int, int], name: str) -> None:
        """UsageError, with the name of the images, where it cannot take (H, W, C)."""

    @abc.abstractmethod
    def apply(self, params: Any, images: jax.Array) -> Features:
        """The features of uint8 images (N, H, W, C); to be run under jit."""


FeatureFn = Callable[[np.ndarray], Features]


def jit_features(network: FeatureNetwork, mesh: Mesh) -> jax.stages.Wrapped:
    """The program of `make_feature_fn`: (params, uint8 images (N, H, W, C)) to `Features`."""
    split, whole = batch_sharding(mesh), replicated(mesh)
    return jax.jit(network.apply, in_shardings=(whole, split), out_shardings=whole)


def make_feature_fn(network: FeatureNetwork, batch_size: int, mesh: Mesh) -> FeatureFn:
    """The function from uint8 images (N, H, W, C), split over the mesh, to their features.

    Every process gives the same images and gets all features.
    """
    split, whole = batch_sharding(mesh), replicated(mesh)
    shards = num_batch_shards(mesh)
    if mesh.devices.flat[0].platform == "cpu":
        batch_size = min(batch_size, network.cpu_batch_size * shards)
    size = -(-batch_size // shards) * shards
    compiled = jit_features(network, mesh)
    params = jax.device_put(network.params, whole)

    def part(images: np.ndarray) -> Features:
        padded = np.pad(images, ((0, size - len(images)), (0, 0), (0, 0), (0, 0)))
        found = compiled(params, from_same(padded, split))
        return jax.tree.map(lambda x: np.asarray(x)[: len(images)], found)

    def features(images: np.ndarray) -> Features:
        parts = [part(images[first : first + size]) for first in range(0, len(images), size)]
        return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)

    return features


class ConvClassifier(nn.Module):
    """Three convolutions, a mean over positions, a layer of features, a layer of logits."""

    num_classes: int

    @nn.compact
    def __call__(self, images):
        """uint8 (N, H, W, C) to features (N, 64) and logits (N, num_classes)."""
        x = images.astype(jnp.float32) / 127.5 - 1
        for i, width in enumerate(_WIDTHS):
            x = nn.Conv(width, (3, 3), strides=2 if i else 1, name=f"conv{i}")(x)
            x = nn.relu(nn.LayerNorm(name=f"norm{i}")(x))
        features = nn.relu(nn.Dense(FEATURES_WIDTH, name="features")(x.mean((1, 2))))
        return features, nn.Dense(self.num_classes, name="logits")(features)


class Classifier(FeatureNetwork):
    """A trained classifier; `info` says how it was made, and its accuracy on unseen pictures."""

    name, width = "classifier", FEATURES_WIDTH

    def __init__(self, params: Any, image_shape: Any, class_names: Sequence[str], info: Any):
        self.params, self.image_shape, self.info = params, image_shape, info
        self.class_names, self.num_classes = tuple(class_names), len(class_names)
        self.digest = arrays_digest(flatten_dict(params, sep="/"))

    def check_images(self, shape, name):
        """See `FeatureNetwork`: it takes the shape that it was trained on."""
        if tuple(shape) != self.image_shape:
            fix = f"but this classifier was trained on {self.image_shape}"
            raise UsageError(f"{name} has images of shape {tuple(shape)}, {fix}")

    def apply(self, params, images):
        found: Any = ConvClassifier(self.num_classes).apply({"params": params}, images)
        return Features(found[0], None, found[1])

    def save(self, path: str | os.PathLike) -> None:
        """Writes an .npz file; what is there already is replaced at the end, at once."""
        about = {name: getattr(self, name) for name in ("image_shape", "class_names", "info")}
        save_arrays(path, about | {"format": _FORMAT}, flatten_dict(self.params, sep="/"))


def load_classifier(path: str | os.PathLike) -> Classifier:
    """Reads what `Classifier.save` has written; UsageError where it is something else."""
    wrong = "is no classifier (python -m dico_jax.prepare classifier makes one)"
    about, flat = load_arrays(path, wrong)
    with contextlib.suppress(Exception):  # of any class: JSON may hold whatever it likes
        shape, names = tuple(about["image_shape"]), about["class_names"]
        image = jax.ShapeDtypeStruct((1, *shape), jnp.uint8)
        made = jax.eval_shape(ConvClassifier(len(names)).init, jax.random.key(0), image)["params"]
        params = unflatten_dict(flat, sep="/")
        there, here = (jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (params, made))
        right = there == here and min(shape) > 0 and isinstance(about["info"], dict)
        if right and about["format"] == _FORMAT:
            return Classifier(params, shape, names, about["info"])
    raise UsageError(f"{path} is no classifier of the format {_FORMAT!r}, or has other layers")


def train_classifier(
    source: Source, read: Reader, *, max_steps=_MAX_STEPS, seed=0, max_bad_fraction: float = 0.0
) -> Classifier:
    """Trains a classifier on labelled pictures, nine tenths of them; the others tell its accuracy.

    It takes ten epochs, but at least 300 and at most `max_steps` steps of 128 pictures; `seed`
    decides order and initial weights.
    """
    num_classes, kind = len(source.class_names), source.kind
    if kind != "pictures" or num_classes < 2 or len(source) < 2 * _HELD_OUT:
        has = f"{len(source)} {kind} of {num_classes} classes"
        raise UsageError(f"{source!r} has {has}: a classifier needs 20 pictures of two classes")
    # By chance: every tenth could be one class, where they are stored in turn.
    drawn = np.random.RandomState(seed).permutation(len(source))
    parts = np.split(drawn, [-(len(source) // _HELD_OUT)])
    train, held = (_Subset(source, np.sort(part)) for part in parts)
    size = min(_BATCH_SIZE, len(train))
    num_steps = min(max(_EPOCHS * len(train) // size, _MIN_STEPS), max_steps)
    network = ConvClassifier(num_classes)
    optimizer = optax.adamw(optax.cosine_decay_schedule(_LEARNING_RATE, num_steps))

    def loss_fn(params, images, labels):
        _, logits = network.apply({"params": params}, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def step(params, opt_state, images, labels):
        gradient = jax.grad(loss_fn)(params, images, labels)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    fraction = max(max_bad_fraction, 1.5 * (max_bad_fraction > 0) / len(train))  # one may be bad
    how: Any = {"batch_size": size, "seed": seed, "max_bad_fraction": fraction}
    log = BadExampleLog(train, read, fraction)
    batches = iter(training_batches(train, read, read_label, **how))
    batch = next(batches)
    params = jax.jit(network.init)(jax.random.key(seed), batch["image"])["params"]
    opt_state = optimizer.init(params)
    for _ in Bar(range(num_steps), "classifier", unit="step", compiles=True):
        params, opt_state = step(params, opt_state, batch["image"], batch["condition"]["label"])
        log.add_skipped(batch["index"], batch["skipped"])
        batch = next(batches)
    classify = jax.jit(functools.partial(network.apply, {"params": params}))
    unseen = _pictures(held, read, size, log.bad, len(source), fraction)
    right = [np.argmax(classify(images)[1], axis=-1) == labels for images, labels in unseen]
    accuracy = float(np.mean(np.concatenate(right))) if right else 0.0
    info = {"source": repr(source), "num_steps": num_steps, "seed": seed, "accuracy": accuracy}
    info["bad"] = log.bad
    return Classifier(jax.device_get(params), batch["image"].shape[1:], source.class_names, info)


class _Subset:
    def __init__(self, source: Source, indices: np.ndarray):
        self._source, self._indices = source, indices
        self.kind, self.class_names = source.kind, source.class_names
        self.skipped: dict[str, str] = {}

    def __len__(self):
        return len(self._indices)

    def __getitem__(self, index):
        return self._source[int(self._indices[index])]

    def example_id(self, index):
        return self._source.example_id(int(self._indices[index]))


def _pictures(source, read: Reader, size: int, bad: dict, total: int, fraction: float) -> Any:
    """Batches of images and labels; `bad` ones, a fraction of a total at most, are left out."""
    for first in range(0, len(source), size):
        good = []
        for i in range(first, min(first + size, len(source))):
            try:
                example = source[i]
                good.append((read(example["image"], False), example["label"]))
            except BadExample as error:
                bad[source.example_id(i)] = str(error)
                if len(bad) > fraction * total:
                    raise too_many_bad(bad, total, fraction) from error
        if good:
            images, labels = zip(*good, strict=True)
            yield np.stack(images), np.array(labels)


@dataclasses.dataclass(frozen=True)
class ClassAgreement:
    """The result of `class_agreement`."""

    num_samples: int
    classifier_accuracy: float  # share of held-out real images
    agreement: float  # share of generated images taken for the class they were asked for
    spread: float  # mean over classes of the generated over the real mean pairwise distance
    bad_pictures: int = 0  # real ones that could not be read

    def __str__(self):
        unseen = f"the classifier is right on {self.classifier_accuracy:.1%} of unseen real images"
        agreement = f"class agreement {self.agreement:.1%} of {self.num_samples} samples"
        return f"{agreement}, spread {self.spread:.3f} of the real images' ({unseen})"


def class_agreement(
    images: np.ndarray, labels: np.ndarray, source: Source, read: Reader, max_bad_fraction=0.0
) -> ClassAgreement:
    """Judges generated images, uint8 (N, H, W, C), by how many are taken for their labels (N,).

    A support vector classifier (RBF kernel) is fitted on three quarters of the real pictures of
    `source`, and its own accuracy is taken on the rest. Needs scikit-learn.
    """
    from sklearn import model_selection, svm

    bad, count = dict[str, str](), len(source)
    real_images, real_labels = next(_pictures(source, read, count, bad, count, max_bad_fraction))
    real, generated = (x.reshape(len(x), -1) / 255 for x in (real_images, images))
    fit_x, held_x, fit_y, held_y = model_selection.train_test_split(
        real, real_labels, test_size=0.25, random_state=0, stratify=real_labels
    )
    classifier = svm.SVC(C=10.0, gamma="scale").fit(fit_x, fit_y)
    spreads = [
        mean_pairwise_distance(generated[labels == c])
        / mean_pairwise_distance(real[real_labels == c])
        for c in np.unique(labels)
    ]
    accuracy = float(classifier.score(held_x, held_y))
    agreement = float(np.mean(classifier.predict(generated) == labels))
    return ClassAgreement(len(images), accuracy, agreement, float(np.mean(spreads)), len(bad))


def require_sklearn(field: str) -> None:
    """Raises UsageError, naming what needs it, where scikit-learn is not installed."""
    if importlib.util.find_spec("sklearn") is None:
        raise UsageError(f"{field} needs scikit-learn: pip install scikit-learn")


def mean_pairwise_distance(x: np.ndarray) -> float:
    """The mean Euclidean distance between two different rows of x (N, D), N at least 2."""
    return float(pdist(x).mean())
