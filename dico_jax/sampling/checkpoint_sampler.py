"""Images of a checkpoint."""

import hashlib
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from dico_jax.autoencoders import WAYS_OUT
from dico_jax.checkpoints.averages import rebuilt_ema, snapshot_steps, weights_digest
from dico_jax.checkpoints.reader import SavedWeights
from dico_jax.errors import UsageError
from dico_jax.experiment import Experiment, experiment_from_config, sampling_from_config
from dico_jax.models import abstract_params
from dico_jax.parallel.mesh import create_mesh, replicated
from dico_jax.sampling import generate as generation
from dico_jax.sampling.prompts import read_prompts

PREVIEW = "preview"  # of --vae


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


class CheckpointSampler:
    """The sampler of a checkpoint, with its config's options or others."""

    def __init__(
        self,
        ckpt,
        *,
        step=None,
        weights="ema",
        ema_width=None,
        seed=0,
        overrides=None,
        vae=None,
        text_encoder=None,
    ):
        """Loads the weights.

        Args:
          ckpt: workdir of a run, or a converted checkpoint.
          step: of the checkpoint; the newest if None.
          weights: "ema" or "params".
          ema_width: in place of `weights`, the relative width of an average that is rebuilt from
            the run's snapshots; `step` is then one of theirs.
          seed: decides, with an image's index, all its noise.
          overrides: fields of `config.sampling` to change.
          vae: in place of the config's autoencoder: a file of weights, or "preview".
          text_encoder: in place of the config's, where CLIP is.
        """
        saved = SavedWeights(ckpt, None if ema_width is not None else step)
        config = ConfigDict(saved.config)
        config.seed = seed
        config.sampling.update(overrides or {})
        config.text.path = text_encoder or config.text.path
        self.experiment, digest = _experiment(config, vae)
        texts = getattr(self.experiment.model, "texts", None)
        if texts and saved.text_digest not in (None, texts.digest):
            was, now = f"{saved.text_digest:.12}", texts.digest[:12]
            fix = f"is another encoder ({now}) than that of the training ({was})"
            raise UsageError("--text_encoder", config.text.path, f"{fix}: give that one")
        self.class_names, self._config, self._mesh = saved.class_names, config, create_mesh()
        self.set_guidance(config.sampling.cfg_scale)
        sharding = replicated(self._mesh)
        if ema_width is None:
            params = abstract_params(self.experiment.model)
            target = jax.tree.map(lambda leaf: leaf.update(sharding=sharding), params)
            self._params, used_step = saved.read(weights, target), saved.step
        else:
            self._params = jax.device_put(rebuilt_ema(ckpt, ema_width, step), sharding)
            used_step = snapshot_steps(ckpt)[-1] if step is None else step
        self.settings: dict[str, Any] = {
            "ckpt": str(pathlib.Path(ckpt).absolute()),
            "step": used_step,
            "weights": weights if ema_width is None else f"ema_width={ema_width}",
            "weights_digest": weights_digest(ckpt, used_step, weights, ema_width is not None),
            "class_names_digest": hashlib.sha256(json.dumps(self.class_names).encode()).hexdigest(),
            **{section: config[section].to_dict() for section in ("model", "diffusion")},
            "seed": seed,
            "text_encoder": texts and texts.digest,
            "autoencoder": {
                **config.autoencoder.to_dict(),
                "path": config.autoencoder.path if digest else None,  # read, or of no use
                "scaling_factor": self.experiment.autoencoder.scaling_factor,
                "decoder_digest": digest,
            },
        }

    def set_guidance(self, cfg_scale: float) -> None:
        """Changes the guidance scale of all images from now on."""
        self._config.sampling.cfg_scale = cfg_scale
        process, options = sampling_from_config(self._config)
        made = self.experiment
        parts = made.model, process, made.autoencoder, made.latent_shape
        self._generate = generation.make_generate_fn(*parts, options, self._mesh)

    def about(self, **asked: str) -> dict[str, Any]:
        """What decides the images that are asked for, and where it is from, as JSON has it."""
        sampling = self._config.sampling.to_dict()
        del sampling["batch_size"]  # how many at a time does not change an image
        told = asked or {self.experiment.model.asked_by: "all"}
        if "prompts" in asked:  # what a file of them holds may change
            texts = json.dumps(read_prompts(asked["prompts"], self.settings["seed"]))
            told = asked | {"prompts_digest": hashlib.sha256(texts.encode()).hexdigest()}
        return json.loads(json.dumps(self.settings | {"sampling": sampling} | told))

    def conditions(self, num_images: int, **asked: str) -> Any:
        """The conditions of all images: `classes` or `prompts`, see `Denoiser.parse_conditions`."""
        model, name = self.experiment.model, self._config.model.name
        for flag, value in asked.items():
            if flag != model.asked_by:
                fix = f": {name} is told {model.asked_by}: use --{model.asked_by}"
                raise UsageError(f"--{flag}", value, fix)
        if not asked and model.asked_by == "prompts":
            raise UsageError(f"{name} is told a text: give --prompts")
        seed: int = self.settings["seed"]
        given: Any = asked.get(model.asked_by, "all")
        if model.asked_by == "prompts":
            given = read_prompts(given, seed)
        return model.parse_conditions(given, num_images, seed, self.class_names)

    def default_number(self, prompts: str | None = None, **_: str) -> int:
        """How many images are made where nothing is said: one of each prompt."""
        return 100 if prompts is None else len(read_prompts(prompts, self.settings["seed"]))

    def texts(self, num_images: int, prompts: str) -> list[str]:
        """The prompt of every image, as it was written, which its tokens need not tell."""
        found = read_prompts(prompts, self.settings["seed"])
        return [found[i % len(found)] for i in range(num_images)]

    def images(self, conditions: Any, start: int = 0) -> Iterator[np.ndarray]:
        """Images `start`, start + 1, ... of the conditions of all from 0 on: uint8 (N, H, W, C).

        NotFiniteError where one is not finite.
        """
        return generation.generate_images(*self._given(conditions), start)

    def batches(self, conditions: Any, indices: Any) -> Iterator[tuple[np.ndarray, ...]]:
        """Of images `indices`, batch by batch, their numbers, themselves, and which are finite."""
        return generation.generate_batches(*self._given(conditions), indices)

    def _given(self, conditions: Any) -> tuple[generation.GenerateFn, Any, Any, int, int]:
        told = self.experiment.model.as_condition(conditions)
        at_a_time = self._config.sampling.batch_size, self._mesh.size
        return self._generate, self._params, told, *at_a_time
