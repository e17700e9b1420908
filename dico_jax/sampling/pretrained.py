"""Networks with weights, of checkpoints and of files, ready to make images."""

import dataclasses
import functools
import hashlib
import json
import os
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dico_jax.autoencoders import WAYS_OUT
from dico_jax.autoencoders.weights import Weights
from dico_jax.checkpoints.averages import rebuilt_ema, snapshot_steps, weights_digest
from dico_jax.checkpoints.reader import FOLDER, ITEMS, SavedWeights, saved_steps
from dico_jax.config import flatten
from dico_jax.errors import UsageError
from dico_jax.experiment import Experiment, experiment_from_config, sampling_from_config
from dico_jax.files import as_path, files_below
from dico_jax.models import abstract_params
from dico_jax.parallel.mesh import create_mesh, replicated
from dico_jax.pytorch.file_weights import FileWeights
from dico_jax.pytorch.hub import local_weights
from dico_jax.pytorch.safetensors_files import files_of
from dico_jax.sampling.generate import GenerateFn, make_generate_fn
from dico_jax.sampling.programs import Programs, make_programs

PREVIEW = "preview"  # of --vae
# Fields of the autoencoder that say what latents are, and of a diffusion that do not say which.
_OF_LATENTS = ("name", "scaling_factor", "decoder_digest")
_OF_TRAINING = ("min_snr_gamma", "time_sampling", "logit_mean", "jump_share", "loss_power")


def open_weights(source: str | os.PathLike, step: int | None = None) -> SavedWeights | FileWeights:
    """The weights of a workdir, a converted checkpoint, a file of PyTorch's or an hf:// address."""
    path = local_weights(source, step)
    if not os.path.isfile(path):
        return SavedWeights(path, step)
    if step is not None:
        raise UsageError("--step", step, f": {source} is a file, which has no steps")
    return FileWeights(path)


def weights_size(source: str | os.PathLike | None, step: int | None = None) -> int:
    """The bytes of the weights that `open_weights` would open, fetched; 0 where there are none."""
    path, size = source and local_weights(source, step), 0  # what is wrong is said later
    if path and os.path.isfile(path):
        size = sum(os.path.getsize(file) for file in files_of(path) if os.path.isfile(file))
    elif path and (steps := saved_steps(path)):
        there = files_below(as_path(path) / FOLDER / str(max(steps) if step is None else step))
        sizes = [(name.partition("/")[0], about["size"]) for name, about in there.items()]
        size = max(sum(n for of, n in sizes if of == item) for item in ITEMS.values())
    return size


class Pretrained:
    """A network with its weights and its autoencoder on the devices.

    Attributes:
      experiment: network, process and autoencoder.
      config: a ConfigDict, complete.
      class_names: of the classes it was trained on; [] where the data has no names.
    """

    def __init__(
        self,
        source: str | os.PathLike,
        *,
        step: int | None = None,
        weights: str = "ema",
        ema_width: float | None = None,
        vae: str | None = None,
        text_encoder: str | None = None,
        guide: str | os.PathLike | None = None,
        guide_step: int | None = None,
        mesh: Mesh | None = None,
    ):
        """Loads the weights.

        Args:
          source: workdir of a run, a converted checkpoint, a .pt, .pth or .safetensors file or an
            index of several, or hf://OWNER/REPO[@REVISION][/FILE] with one of these.
          step: of the checkpoint; the newest if None.
          weights: "ema" or "params".
          ema_width: in place of `weights`, the relative width of an average that is rebuilt from
            the run's snapshots; `step` is then one of theirs.
          vae: in place of the config's autoencoder: a file of weights, or "preview".
          text_encoder: in place of the config's, where CLIP is.
          guide: source of a weaker network, which images are guided away from, in place of the null
            condition (autoguidance, arXiv 2406.02507); `guide_step` is its step.
          mesh: of the devices that share the images; all if None.
        """
        saved = open_weights(source, None if ema_width is not None else step)
        config = ConfigDict(saved.config)
        config.text.path = text_encoder or config.text.path
        experiment, digest = _experiment(config, vae)
        texts = getattr(experiment.model, "texts", None)
        if texts and saved.text_digest not in (None, texts.digest):
            was, now = f"{saved.text_digest:.12}", texts.digest[:12]
            fix = f"is another encoder ({now}) than that of the training ({was})"
            raise UsageError("--text_encoder", config.text.path, f"{fix}: give that one")
        self.class_names, self.config, self.mesh = saved.class_names, config, mesh or create_mesh()
        sharding = replicated(self.mesh)
        # Once on the devices, whatever number of samplers use it.
        decoder = Weights(jax.device_put(experiment.autoencoder.params, sharding))
        autoencoder = dataclasses.replace(experiment.autoencoder, load=lambda: decoder)
        self.experiment = dataclasses.replace(experiment, autoencoder=autoencoder)
        used_step = saved.step if step is None else step
        if ema_width is not None and step is None:
            used_step = (snapshot_steps(saved.folder) or [0])[-1]
        remote = "://" in os.fspath(source)
        self._about: dict[str, Any] = {
            "ckpt": os.fspath(source) if remote else str(as_path(source).absolute()),
            "step": used_step,
            "weights": weights if ema_width is None else f"ema_width={ema_width}",
            "class_names_digest": hashlib.sha256(json.dumps(self.class_names).encode()).hexdigest(),
            **{section: config[section].to_dict() for section in ("model", "diffusion")},
            "text_encoder": texts and texts.digest,
            "autoencoder": {
                **config.autoencoder.to_dict(),
                "path": config.autoencoder.path if digest else None,  # read, or of no use
                "scaling_factor": autoencoder.scaling_factor,
                "decoder_digest": digest,
            },
        }
        self._saved, self._which = saved, (used_step, weights, ema_width)
        self.guide: Pretrained | None = None
        if guide is not None:
            how: dict[str, Any] = {"vae": vae, "text_encoder": text_encoder, "mesh": self.mesh}
            try:
                self.guide = Pretrained(guide, step=guide_step, weights=weights, **how)
            except UsageError as error:
                for flag, its in (("--ckpt", "--guide"), ("--step", "--guide_step")):
                    error.field = re.sub(rf"^{flag}\b", its, error.field)
                raise
            self._check_guide(self.guide)
        elif guide_step is not None:
            raise UsageError("--guide_step", guide_step, "is that of --guide: give this, too")

    def _check_guide(self, guide: "Pretrained") -> None:
        """Raises UsageError where the guide does not see the same latents, noise and conditions."""

        def seen(one: Pretrained) -> dict[str, Any]:
            model, about = one.experiment.model, one._about
            return flatten({
                "autoencoder": {name: about["autoencoder"][name] for name in _OF_LATENTS},
                "diffusion": {k: v for k, v in about["diffusion"].items() if k not in _OF_TRAINING},
                "text_encoder": about["text_encoder"],
                "latents": one.experiment.latent_shape,
                "asked_by": model.asked_by,
                "num_classes": getattr(model, "num_classes", None),
            })  # fmt: skip

        was, now = seen(self), seen(guide)
        if differ := [name for name in was if was[name] != now[name]]:
            name = differ[0]
            fix = f"has {name} {now[name]}, and --ckpt {was[name]}: give one with the same"
            raise UsageError("--guide", guide._about["ckpt"], fix)

    @functools.cached_property
    def params(self) -> Any:
        """The network's weights, on every device of `mesh`; read when first asked for."""
        (step, weights, ema_width), sharding = self._which, replicated(self.mesh)
        if ema_width is not None:
            return jax.device_put(rebuilt_ema(self._saved.folder, ema_width, step), sharding)
        target = abstract_params(self.experiment.model)
        target = jax.tree.map(lambda leaf: leaf.update(sharding=sharding), target)
        return self._saved.read(weights, target)

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """What decides the images but for how they are sampled, and where it is from."""
        saved, (step, weights, ema_width) = self._saved, self._which
        if isinstance(saved, FileWeights):
            digest = saved.digest(weights)  # which reads all of the file
        else:
            digest = weights_digest(saved.folder, step, weights, ema_width is not None)
        guide = {"guide": self.guide.settings["weights_digest"]} if self.guide else {}
        return self._about | {"weights_digest": digest} | guide

    def generator(self, config: ConfigDict, with_latents: bool = False) -> GenerateFn:
        """The function that makes images as `config.sampling` and `config.seed` say."""
        process, options = sampling_from_config(config)
        made = self.experiment
        parts = made.model, process, made.autoencoder, made.latent_shape, options, self.mesh
        if self.guide is None:
            return make_generate_fn(*parts, with_latents=with_latents)
        guide = self.guide.experiment.model
        generate = make_generate_fn(*parts, with_latents=with_latents, guide=guide)
        return functools.partial(generate, guide_params=self.guide.params)

    def programs(self, config: ConfigDict) -> tuple[Programs, np.ndarray]:
        """What makes images step by step, as `config.sampling` says, and its guidance scales."""
        process, options = sampling_from_config(config)
        made, guide = self.experiment, self.guide and self.guide.experiment.model
        parts = made.model, process, made.autoencoder, made.latent_shape, options, self.mesh
        return make_programs(*parts, guide=guide), np.asarray(options.scales(process), np.float32)


def _experiment(config: ConfigDict, vae: str | None) -> tuple[Experiment, str | None]:
    """The experiment of a config, with the weights or "preview" of --vae, and the decoder's digest.

    Errors about the autoencoder's file name the flag, or say that there is one.
    """
    autoencoder, field = config.autoencoder, "autoencoder.path="
    if vae is not None and autoencoder.name == "identity":
        fix = ": this checkpoint is a model of pixels, which needs no autoencoder; leave it out"
        raise UsageError("--vae", vae, fix)
    if vae == PREVIEW:
        autoencoder.name = "latent_preview"
    elif vae is not None:
        autoencoder.update(name="sd_vae", path=vae)
    try:
        experiment = experiment_from_config(config)
        return experiment, experiment.autoencoder.decoder_digest  # reads the weights, and may fail
    except UsageError as error:
        text = str(error).removeprefix("config.")
        if not text.startswith(field):
            raise
        said = f"config.{text}" if vae is None else text.replace(field, "--vae=", 1)
        fix = f"give --vae=FILE, or --vae={PREVIEW} for small false-colour pictures"
        raise UsageError(f"{said.removesuffix(WAYS_OUT)}; {fix}") from error
