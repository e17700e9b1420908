"""Objects from a config. A wrong field is a UsageError that starts with its name, `config.a.b=`."""

import dataclasses
import os
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from dico_jax.autoencoders import Autoencoder, create_autoencoder
from dico_jax.config import DEFAULTS, check_values
from dico_jax.data.bad_examples import BadExampleLog
from dico_jax.data.latents import PreparedLatents
from dico_jax.data.pictures import BadExample, PictureReader
from dico_jax.data.pipeline import Reader, read_orientation
from dico_jax.data.sources import Source, create_source
from dico_jax.diffusion import Objective, SamplingOptions, create_objective
from dico_jax.diffusion.solvers import find_solver
from dico_jax.diffusion.spacing import check_spacing
from dico_jax.errors import UsageError, within
from dico_jax.models import create_model, find_model, model_options
from dico_jax.models.denoiser import Denoiser
from dico_jax.models.text_conditional import Constants, TextConditional
from dico_jax.text.encoders import Words, load_encoder, load_words


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What a config describes, without its data."""

    model: Denoiser
    diffusion: Objective
    autoencoder: Autoencoder
    latent_shape: tuple[int, int, int]  # (H, W, C) of the network's input


def model_from_config(config: ConfigDict) -> Denoiser:
    """The network of a config."""
    check_values(config, "model")
    defaults = DEFAULTS["model"]
    with within("config."):
        known = {*model_options(config.model.name, config.model.layout), "name"}
        options = {  # but for those of other networks that nobody has set
            name: value
            for name, value in config.model.items()
            if value is not None and (name in known or value != defaults[name])
        }
        if config.text.encoder == "words" and "vocab_size" in known:
            options["vocab_size"] = _words(config).vocab_size
        return create_model(**options)


def _words(config: ConfigDict) -> Words:
    if not config.text.words.split():
        raise UsageError("text.words", config.text.words, "is empty: the encoder knows no word")
    length = config.model.text_length or TextConditional.text_length
    return load_words(config.text.words, length)


def _with_texts(
    config: ConfigDict, model: Denoiser, source: Source | None, sizes_alone: bool
) -> Denoiser:
    """The network with what reads its texts; prepared features need none but that of no text."""
    if not isinstance(model, TextConditional):
        return model
    if sizes_alone:
        zeros = {name: array[0] for name, array in model.zero_condition(1).items()}
        return model.clone(null_text=Constants(**zeros))
    if model.vocab_size:
        words = _words(config)
        return model.clone(texts=words, null_text=words.null())
    texts: Words | None = None
    null = source.null_text if isinstance(source, PreparedLatents) else None
    if null is not None and os.path.exists(config.text.path):
        _check_encoder(config.text.path, source)
    if null is None:
        texts = load_encoder(config.text.path, "text.path")
        null = texts.null()
    for name, zeros in model.zero_condition(1).items():
        if (found := null.arrays[name].shape) != (wanted := zeros.shape[1:]):
            where = f"text.path={config.text.path}" if texts else repr(source)
            fix = f"gives {name} {found}, and the network is told {wanted}: set model.text_length,"
            raise UsageError(f"{where} {fix} model.text_width and model.pooled_width")
    return model.clone(texts=texts, null_text=null)


def _check_encoder(path: str, source: Any) -> None:
    """Raises UsageError where the features in a source are of another encoder than that at hand."""
    found, wanted = load_encoder(path, "text.path").digest, source.text_digest
    if found != wanted:
        what = f"is not the text encoder of {source!r} ({found[:12]} and {wanted[:12]})"
        raise UsageError("text.path", path, f"{what}: use that one, or prepare again")


def experiment_from_config(
    config: ConfigDict, source: Source | None = None, *, sizes_alone: bool = False
) -> Experiment:
    """The network, process and autoencoder of a config, for a source of examples, if any.

    With `sizes_alone` nothing is loaded that reads texts: a text is zeros.
    """
    check_values(config, "data", "autoencoder", "diffusion", "text")
    model = model_from_config(config)
    with within("config."):
        model = _with_texts(config, model, source, sizes_alone)
    with within("config.diffusion."):
        diffusion = create_objective(config.diffusion, learn_sigma=model.learn_sigma)
    with within("config."):
        diffusion.check_model(model)
        autoencoder = create_autoencoder(config.autoencoder)
        if autoencoder.channels not in (None, model.in_channels):
            name = config.autoencoder.name
            fix = f"does not fit config.autoencoder.name={name!r}: use {autoencoder.channels}"
            raise UsageError("model.in_channels", model.in_channels, fix)
        image_size, shrinks = config.data.image_size, autoencoder.downsampling
        step = shrinks * model.size_divisor
        if image_size < step or image_size % step:
            below = image_size // step * step
            fix = f"must be a multiple of {step} (the autoencoder shrinks images by {shrinks}, the"
            why = f", {model.size_reason}" * bool(model.windows)
            fix += f" network's input must divide by {model.size_divisor}{why}): use "
            fix += f"{f'{below} or ' * (below > 0)}{below + step}"
            raise UsageError("data.image_size", image_size, fix)
    shape = image_size // shrinks, image_size // shrinks, model.in_channels
    return Experiment(model, diffusion, autoencoder, shape)


def sampling_from_config(config: ConfigDict) -> tuple[Objective, SamplingOptions]:
    """The objective with the steps of sampling, and how a config's samples are made."""
    check_values(config, "", "sampling")
    sampling = config.sampling
    with within("config."):
        chosen = (f.name for f in dataclasses.fields(SamplingOptions) if f.name != "seed")
        options = SamplingOptions(config.seed, **{name: sampling[name] for name in chosen})
    with within("config.sampling."):
        check_spacing(sampling.spacing)
    how = {"num_steps": sampling.num_steps, "spacing": sampling.spacing}
    try:
        process = create_objective(config.diffusion, learn_sigma=config.model.learn_sigma, **how)
    except UsageError as error:
        raise UsageError("config.sampling.num_steps", sampling.num_steps, f": {error}") from error
    with within("config."):
        find_solver(options.sampler).check(process)
        options.scales(process)
    return process, options


def source_from_config(config: ConfigDict) -> Source:
    """The training examples of a config."""
    with within("config."):
        return create_source(config.data)


def with_source_options(config: ConfigDict, source: Source) -> ConfigDict:
    """The config with the options of the network that are not set and that the source knows."""
    with within("config."):
        network, _ = find_model(config.model.name)
    config = config.copy_and_resolve_references()
    config.model.update(network.complete_options(config.model.to_dict(), source))
    return config


def reader_from_config(config: ConfigDict, experiment: Experiment, source: Source) -> Reader:
    """How the source's examples are read for the network, once they are found to fit it."""
    check_values(config, "data")
    data = config.data
    with within("config."):
        experiment.model.check_source(source)
        _check_examples(config, experiment.model, source)
        if source.kind == "pictures":
            channels = _picture_channels(config, experiment)
            read: Reader = PictureReader(data.image_size, channels, data.exif_rotation, data.crop)
        else:
            _check_latents(config, experiment, source)
            read = read_orientation
        if isinstance(source, PreparedLatents) and data.verify_checksums:
            with within(f"data.path={data.path}: "):
                source.check_checksums(jax.process_index(), jax.process_count())
    BadExampleLog(source, read, data.max_bad_fraction)  # counts what listing has skipped
    return read


def _check_examples(config: ConfigDict, model: Denoiser, source: Source) -> None:
    """Raises UsageError where the first good example lacks what the network is told."""
    for index in range(len(source)):
        try:
            model.read_condition(source[index])
            return
        except BadExample:  # counted where it is trained on
            continue
        except UsageError as error:
            fix = f"does not fit {source!r}: {error}"
            raise UsageError("model.name", config.model.name, fix) from error


def _picture_channels(config: ConfigDict, experiment: Experiment) -> int:
    name, channels = config.autoencoder.name, experiment.model.in_channels
    if experiment.autoencoder.encode_moments is not None:
        return 3
    if name != "identity":
        what = f"cannot encode the pictures of config.data.source={config.data.source!r}"
        fix = f"{what}: use 'sd_vae', or prepare latents with dico_jax.prepare"
        raise UsageError("autoencoder.name", name, fix)
    if channels not in (1, 3):
        fix = "does not fit pictures without an autoencoder: use 3, or 1 for grey"
        raise UsageError("model.in_channels", channels, fix)
    return channels


def _check_latents(config: ConfigDict, experiment: Experiment, source) -> None:
    height, width, channels = source.image_shape
    if source.kind == "moments":
        channels //= 2  # means and log variances
    if isinstance(source, PreparedLatents):
        if experiment.autoencoder.name == "identity":
            fix = "does not fit prepared latents: use 'sd_vae', or 'latent_preview' to do without"
            raise UsageError("autoencoder.name", "identity", fix)
        if (crop := source.manifest.plan.crop) != config.data.crop:
            fix = f"is not how {source!r} was cut ({crop}): use that, or prepare again"
            raise UsageError("data.crop", config.data.crop, fix)
        wanted = source.manifest.plan.encoder_digest
        found = experiment.autoencoder.encoder_digest  # reads the weights
        if found is not None and found != wanted:
            what = f"is not the autoencoder that encoded {source!r} (encoders {found[:12]}"
            fix = f"{what} and {wanted[:12]}): use that one, or prepare again"
            raise UsageError(f"autoencoder.path={config.autoencoder.path} {fix}")
    if (height, width, channels) != experiment.latent_shape:
        what = f"with config.model.in_channels={config.model.in_channels} needs examples of shape"
        fix = f"{what} {experiment.latent_shape}, but {source!r} has {(height, width, channels)}"
        raise UsageError("data.image_size", config.data.image_size, fix)
    if source.kind == "latents":
        some = np.linspace(0, len(source) - 1, min(len(source), 100)).astype(int)
        values, name = [source[i]["image"] for i in some], config.autoencoder.name
        low, high = np.min(values), np.max(values)
        most, taken = (1.001, "pixels in [-1, 1]") if name == "identity" else (30, "scaled latents")
        if not -most <= low <= high <= most or 0 <= low < high:  # as of floats in [0, 1]
            fix = f"takes uint8 or {taken}, but {source!r} has {low:.4g} to {high:.4g}"
            raise UsageError("autoencoder.name", name, fix)
