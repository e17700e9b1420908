r"""Prepares data ahead of training, and references ahead of evaluation.

python -m dico_jax.prepare latents --source=folder --path=DIR --out=DIR [--image_size=256 ...]
    Encodes every picture of a source, and its mirror image. Run it again to go on after an
    interruption, and with --process_index=I --process_count=N on N machines that share DIR. For
    training with --config.data.source=latents --config.data.path=DIR. With --text=CLIP all captions
    of each picture too, for a model that is told texts.
python -m dico_jax.prepare latents --out=DIR --verify
    Checks everything that was prepared.
python -m dico_jax.prepare reference --path=DIR|FILE.npz --out=FILE.npz
python -m dico_jax.prepare reference --source=folder --path=DIR --out=FILE.npz [--image_size=256]
    Measures pictures for --reference of evaluate and config.eval.reference: as they are, in a
    folder or in arr_0 of an .npz file, or the examples of a source, cropped as for training.
python -m dico_jax.prepare classifier --source=folder --path=DIR --out=FILE.npz [--image_size=32]
    Trains the small classifier for --features of evaluate and config.eval.features.
"""

import dataclasses
import re
from typing import Any

from absl import flags

from dico_jax import cli
from dico_jax.errors import UsageError

# Flags that are fields of a config, in data or as named.
_OF_DATA = "path captions name split image_size exif_rotation crop num_workers max_bad_fraction"
_FIELDS = {name: f"data.{name}" for name in _OF_DATA.split()}
_FIELDS |= {"vae": "autoencoder.path", "vae_dtype": "autoencoder.dtype"}
_OF_SOURCE = "source path captions name split image_size exif_rotation crop max_bad_fraction"
_ACTIONS = {
    "latents": (
        "out",
        f"{_OF_SOURCE} mirrored text vae vae_dtype dtype batch_size shard_size num_workers "
        "process_index process_count verify",
    ),
    "reference": ("out", f"{_OF_SOURCE} batch_size features inception channels limit"),
    "classifier": ("out source", f"{_OF_SOURCE} channels max_steps"),
}
_FLAGS = flags.FLAGS


def _define_flags() -> None:
    cli.define_fields(_FIELDS)
    string, integer = flags.DEFINE_string, flags.DEFINE_integer
    string("out", None, "latents: folder, local or gs://; others: a new .npz file.")
    string("source", None, "As config.data.source, such as folder, zip, captions, tar or tfds.")
    string(
        "text", None, "Text encoder for captions: CLIP's folder or file, or hf://OWNER/REPO/FILE."
    )
    flags.DEFINE_bool("mirrored", True, "Encode mirrored pictures too.")
    flags.DEFINE_enum("dtype", "float16", ["float16", "bfloat16"], "Of the stored numbers.")
    integer("batch_size", 32, "Pictures at a time, over all devices.", 1)
    integer("shard_size", 4096, "Examples per shard.", 1)
    integer("process_index", 0, "Which of the machines this one is.", 0)
    integer("process_count", 1, "Machines that share the work.", 1)
    flags.DEFINE_bool("verify", False, "Check checksums and every record.")
    string("features", "inception", "reference: inception, or the file of a classifier.")
    string("inception", None, "Weights of the Inception network [the cache, then the release].")
    flags.DEFINE_enum("channels", "3", ["1", "3"], "Of the pictures: 1 for grey.")
    integer("limit", None, "reference: at most so many examples, spread evenly.", 2)
    integer("max_steps", 4000, "classifier: at most so long, or for ten epochs.", 1)


_define_flags()
_USE_ALL_CORES = cli.define_cpu_tuning()
flags.adopt_module_key_flags(cli)  # so that --help shows it


def main(action: str) -> None:
    """Parses flags and prepares; imports are late, as --help answers before JAX is imported."""
    try:
        {"latents": _latents, "reference": _reference, "classifier": _classifier}[action]()
    except UsageError as error:
        raise UsageError(_with_flags(str(error))) from error


def _with_flags(message: str) -> str:
    from dico_jax.config import DEFAULTS

    flag = {f"data.{name}": name for name in DEFAULTS["data"]}
    flag |= {field: name for name, field in _FIELDS.items()}
    names = "|".join(map(re.escape, sorted(flag, key=len, reverse=True)))
    return re.sub(rf"(?<![\w/.-])(?:config\.)?({names})\b", lambda m: f"--{flag[m[1]]}", message)


def _latents() -> None:
    out, index, count = _FLAGS.out, _FLAGS.process_index, _FLAGS.process_count
    if _FLAGS.source is None and not _FLAGS.verify:
        raise UsageError("--source is missing; --verify checks what was prepared")
    if index >= count:
        raise UsageError("--process_index", index, f"must be below --process_count={count}")
    if _FLAGS.source is not None:
        print(_prepared(out))
    if _FLAGS.verify:
        from dico_jax.data.latents import verify

        print(f"{out}: {_said(verify(out))}, all as they should be")


def _prepared(out: str) -> str:
    _USE_ALL_CORES()
    from dico_jax.autoencoders import create_autoencoder
    from dico_jax.data.latent_preparation import Options, prepare_latents

    options = Options(**_chosen(*(field.name for field in dataclasses.fields(Options))))
    source = _source()
    vae = create_autoencoder(_section("autoencoder", path=_FLAGS.vae, dtype=_FLAGS.vae_dtype))
    text = None
    if _FLAGS.text is not None:
        from dico_jax.text.encoders import load_encoder

        text = load_encoder(_FLAGS.text, "--text")
    manifest = prepare_latents(source, vae, out, options, text)
    if manifest is None:
        return f"this process's shards are in {out}; others are still at work"
    size = sum(shard.bytes for shard in manifest.shards)
    bad = f"{len(manifest.bad)} bad ones skipped (manifest.json lists them)"
    return f"{_said(manifest)}, {size / 1e9:.3f} GB, {bad}, are in {out}"


def _said(manifest) -> str:
    count, captions, cut = (
        sum(getattr(shard, name) for shard in manifest.shards)
        for name in ("count", "captions", "cut")
    )
    said = f" with {captions:,} captions" if captions else ""
    length = manifest.plan.text_length
    said += f" ({cut:,} of them cut, as they are longer than {length} tokens)" if cut else ""
    return f"{count:,} examples{said} in {len(manifest.shards)} shards"


def _reference() -> None:
    from dico_jax.evaluation.measure import prepare_reference

    _USE_ALL_CORES()
    source = None
    if _FLAGS.source is not None:
        source = _source(), _reader(), _FLAGS.limit
    elif _FLAGS.path is None:
        raise UsageError("reference needs --path or --source: what is to be measured")
    else:
        for name in (
            "captions",
            "name",
            "split",
            "image_size",
            "exif_rotation",
            "crop",
            "channels",
            "limit",
        ):
            if _FLAGS[name].present:
                raise UsageError(f"--{name} is for pictures of a --source")
    chosen = _chosen("features", "inception", "batch_size", "max_bad_fraction")
    print(prepare_reference(_FLAGS.path or "", source, _FLAGS.out, **chosen))


def _classifier() -> None:
    from dico_jax.evaluation.networks import train_classifier
    from dico_jax.files import result_path

    out = result_path(_FLAGS.out, ".npz")
    classifier = train_classifier(_source(), _reader(), **_chosen("max_steps", "max_bad_fraction"))
    classifier.save(out)
    accuracy = classifier.info["accuracy"]
    print(f"{out} is written: right on {accuracy:.1%} of the pictures that it has not seen")


def _chosen(*names: str) -> dict[str, Any]:
    return {name: _FLAGS[name].value for name in names}


def _section(section: str, **changes):
    from ml_collections import ConfigDict

    from dico_jax.config import DEFAULTS

    return ConfigDict(DEFAULTS[section] | changes)


def _source():
    from dico_jax.data.sources import create_source

    return create_source(_section("data", **_chosen("source", "path", "captions", "name", "split")))


def _reader():
    from dico_jax.data.pictures import PictureReader

    return PictureReader(_FLAGS.image_size, int(_FLAGS.channels), _FLAGS.exif_rotation, _FLAGS.crop)


if __name__ == "__main__":
    cli.run(main, _ACTIONS)
