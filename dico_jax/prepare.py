r"""Prepares data ahead of training, and references ahead of evaluation.

python -m dico_jax.prepare latents --source=folder --path=DIR --out=DIR [--image_size=256 ...]
    Encodes every picture of a source, and its mirror image, with the autoencoder. Run it again to
    go on after an interruption; run it with --process_index=I --process_count=N on N machines that
    share DIR to divide the work.

python -m dico_jax.prepare latents --out=DIR --verify
    Checks everything that was prepared.

    Training then reads it by --config.data.source=latents --config.data.path=DIR.

python -m dico_jax.prepare reference --path=DIR|FILE.npz --out=FILE.npz
python -m dico_jax.prepare reference --source=folder --path=DIR --out=FILE.npz [--image_size=256]
    Measures pictures for --reference of evaluate and config.eval.reference: as they are, in a
    folder or in arr_0 of an .npz file, or the examples of a source, cropped as for training.

python -m dico_jax.prepare classifier --source=folder --path=DIR --out=FILE.npz [--image_size=32]
    Trains the small classifier for --features of evaluate and config.eval.features.
"""

import re
import sys
import time
from typing import Any

from absl import flags

from dico_jax import cli
from dico_jax.config import DEFAULTS
from dico_jax.errors import UsageError

_OUT = flags.DEFINE_string("out", None, "latents: folder, local or gs://; others: a new .npz file.")
_SOURCE = flags.DEFINE_string("source", None, "folder, zip, tfds, array_record, arrays or digits.")
_PATH = flags.DEFINE_string("path", None, "Folder or file of the source; of tfds its data_dir.")
_NAME = flags.DEFINE_string("name", None, "tfds: the dataset, such as imagenet2012:5.1.0.")
_SPLIT = flags.DEFINE_string("split", "train", "tfds: the split.")
_IMAGE_SIZE = flags.DEFINE_integer("image_size", 256, "Side of the cropped pictures in pixels.")
_EXIF_ROTATION = flags.DEFINE_bool(
    "exif_rotation", False,
    "Turn pictures as their EXIF data say: for cameras' pictures, not for ImageNet.",
)  # fmt: skip
_MIRRORED = flags.DEFINE_bool("mirrored", True, "Encode mirrored pictures too.")
_VAE = flags.DEFINE_string(
    "vae", DEFAULTS["autoencoder"]["path"],
    "Weights of the autoencoder: a file, or hf://OWNER/REPO/FILE.",
)  # fmt: skip
_VAE_DTYPE = flags.DEFINE_string("vae_dtype", "float32", "float32, or bfloat16 on accelerators.")
_DTYPE = flags.DEFINE_string("dtype", "float16", "Of the stored numbers: float16 or bfloat16.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Pictures at a time, over all devices.")
_SHARD_SIZE = flags.DEFINE_integer("shard_size", 4096, "Examples per shard.")
_NUM_WORKERS = flags.DEFINE_integer(
    "num_workers", 0, "Processes that read pictures; 0 for threads.", lower_bound=0
)
_MAX_BAD_FRACTION = flags.DEFINE_float(
    "max_bad_fraction", DEFAULTS["data"]["max_bad_fraction"],
    "Pictures that cannot be read are skipped and listed; more than this fraction is an error.",
)  # fmt: skip
_PROCESS_INDEX = flags.DEFINE_integer("process_index", 0, "Which of the machines this one is.")
_PROCESS_COUNT = flags.DEFINE_integer("process_count", 1, "Machines that share the work.")
_VERIFY = flags.DEFINE_bool("verify", False, "Check checksums and every record.")
_FEATURES = flags.DEFINE_string(
    "features", "inception", "reference: inception, or the file of a classifier."
)
_INCEPTION = flags.DEFINE_string(
    "inception", None, "Weights of the Inception network [the cache, then the public release]."
)
_CHANNELS = flags.DEFINE_enum("channels", "3", ["1", "3"], "Of the pictures: 1 for grey.")
_LIMIT = flags.DEFINE_integer(
    "limit", None, "reference: at most so many examples, spread evenly.", lower_bound=2
)
_MAX_STEPS = flags.DEFINE_integer(
    "max_steps", 4000, "classifier: it trains for ten epochs, but at most so long.", lower_bound=1
)

_CPU_TUNING = cli.define_cpu_tuning()
flags.adopt_module_key_flags(cli)  # so that --help shows it

_OF_SOURCE = "source path name split image_size exif_rotation"
# Per action, the flags that it needs, and those that it may have.
_ACTIONS = {
    "latents": (
        "out",
        f"{_OF_SOURCE} mirrored vae vae_dtype dtype batch_size shard_size num_workers "
        "max_bad_fraction process_index process_count verify",
    ),
    "reference": ("out", f"{_OF_SOURCE} batch_size features inception channels limit"),
    "classifier": ("out source", f"{_OF_SOURCE} channels max_steps"),
}
_FLAG_OF_FIELD = {"autoencoder.path": "vae", "autoencoder.dtype": "vae_dtype"}


def main(action: str | None) -> None:
    """Parses flags and prepares."""
    cli.check_action("prepare", action, _ACTIONS)
    assert action is not None
    cli.check_flags(action, _ACTIONS)
    try:
        {"latents": _latents, "reference": _reference, "classifier": _classifier}[action]()
    except UsageError as error:
        raise UsageError(_with_flags(str(error))) from error


def _latents() -> None:
    if _SOURCE.value is None and not _VERIFY.value:
        raise UsageError("--source is missing; --verify checks what was prepared")
    if _SOURCE.value is not None:
        _prepare_latents()
    if _VERIFY.value:
        _verify()


# Late imports: --help answers before JAX is imported.


def _use_all_cores() -> None:
    from dico_jax.ops.cpu import use_all_cores

    if _CPU_TUNING.value:
        use_all_cores(keep_memory=True)


def _reference() -> None:
    from dico_jax.evaluation.measure import prepare_reference

    _use_all_cores()
    assert _OUT.value is not None
    if _SOURCE.value is None:
        if _PATH.value is None:
            raise UsageError("reference needs --path or --source: what is to be measured")
        for name in ("name", "split", "image_size", "exif_rotation", "channels", "limit"):
            if flags.FLAGS[name].present:
                raise UsageError(f"--{name} is for pictures of a --source")
    source = None if _SOURCE.value is None else (_source(), _reader(), _LIMIT.value)
    text = prepare_reference(
        _PATH.value or "",
        source,
        _OUT.value,
        features=_FEATURES.value,
        inception=_INCEPTION.value,
        batch_size=_BATCH_SIZE.value,
    )
    print(text)


def _classifier() -> None:
    from dico_jax.evaluation.classifier import train_classifier
    from dico_jax.files import result_path

    assert _OUT.value is not None
    out = result_path(_OUT.value, ".npz")
    classifier = train_classifier(_source(), _reader(), max_steps=_MAX_STEPS.value)
    classifier.save(out)
    print(
        f"{out} is written: right on {classifier.info['accuracy']:.1%} of the pictures that it has "
        "not seen"
    )


def _source():
    from ml_collections import ConfigDict

    from dico_jax.data.sources import create_source

    data: dict[str, Any] = DEFAULTS["data"] | {
        "source": _SOURCE.value,
        "path": _PATH.value,
        "name": _NAME.value,
        "split": _SPLIT.value,
    }
    return create_source(ConfigDict(data))


def _reader():
    from dico_jax.data.pictures import PictureReader

    if _IMAGE_SIZE.value < 1:
        raise UsageError(f"--image_size={_IMAGE_SIZE.value} must be at least 1")
    return PictureReader(_IMAGE_SIZE.value, int(_CHANNELS.value), _EXIF_ROTATION.value)


def _prepare_latents() -> None:
    _use_all_cores()
    from ml_collections import ConfigDict

    from dico_jax.autoencoders import create_autoencoder
    from dico_jax.data.latent_preparation import Options, prepare_latents

    options = Options(
        image_size=_IMAGE_SIZE.value,
        exif_rotation=_EXIF_ROTATION.value,
        mirrored=_MIRRORED.value,
        dtype=_DTYPE.value,
        shard_size=_SHARD_SIZE.value,
        batch_size=_BATCH_SIZE.value,
        max_bad_fraction=_MAX_BAD_FRACTION.value,
        num_workers=_NUM_WORKERS.value,
        process_index=_PROCESS_INDEX.value,
        process_count=_PROCESS_COUNT.value,
    )
    source = _source()
    vae = DEFAULTS["autoencoder"] | {"path": _VAE.value, "dtype": _VAE_DTYPE.value}
    autoencoder = create_autoencoder(ConfigDict(vae))
    start = time.monotonic()
    assert _OUT.value is not None
    manifest = prepare_latents(source, autoencoder, _OUT.value, options)
    if manifest is None:
        print(f"this process's shards are in {_OUT.value}; others are still at work")
        return
    size = sum(shard.bytes for shard in manifest.shards)
    print(
        f"{manifest.num_examples:,} examples in {len(manifest.shards)} shards, {size / 1e9:.3f} GB,"
        f" {len(manifest.bad)} bad ones skipped (manifest.json lists them), are in {_OUT.value}; "
        f"{time.monotonic() - start:.0f} s"
    )


def _with_flags(message: str) -> str:
    """The message with this command's flags in place of the fields of a config."""
    fields = [f"data.{name}" for name in DEFAULTS["data"]] + list(_FLAG_OF_FIELD)
    pattern = "|".join(map(re.escape, sorted(fields, key=len, reverse=True)))
    return re.sub(
        rf"(?<![\w/.-])(?:config\.)?({pattern})\b",
        lambda match: f"--{_FLAG_OF_FIELD.get(match[1], match[1].rpartition('.')[2])}",
        message,
    )


def _verify() -> None:
    from etils import epath

    from dico_jax.data.latents import verify

    manifest = verify(epath.Path(_OUT.value))
    print(
        f"{_OUT.value}: {manifest.num_examples:,} examples in {len(manifest.shards)} shards, "
        "all as they should be"
    )


if __name__ == "__main__":
    _action = cli.take_action(sys.argv, _ACTIONS)
    cli.run(lambda: main(_action))
