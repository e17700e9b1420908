"""Images of a checkpoint."""

import functools
import hashlib
import json
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from dico_jax.autoencoders import to_uint8
from dico_jax.errors import UsageError
from dico_jax.experiment import sampling_from_config
from dico_jax.sampling import generate as generation
from dico_jax.sampling.pretrained import Pretrained
from dico_jax.sampling.programs import make_latents_fn
from dico_jax.sampling.prompts import read_prompts


class CheckpointSampler(Pretrained):
    """The sampler of a checkpoint, with its config's options or others."""

    def __init__(self, source, *, seed=0, overrides=None, with_latents=False, **how):
        """Loads the weights.

        Args:
          source: as of `Pretrained`.
          seed: decides, with an image's index, all its noise.
          overrides: fields of `config.sampling` to change.
          with_latents: `batches` give the latents as well.
          **how: options of `Pretrained`.
        """
        super().__init__(source, **how)
        self.config.seed = seed
        self.config.sampling.update(overrides or {})
        self._generate = self.generator(self.config, with_latents)
        self.with_latents = with_latents
        self.params  # noqa: B018  reads them, once all else is found to be right

    def set_guidance(self, cfg_scale: float) -> None:
        """Changes the guidance scale of all images from now on."""
        self.config.sampling.cfg_scale = cfg_scale
        sampling_from_config(self.config)  # which refuses what is none

    def about(self, **asked: str) -> dict[str, Any]:
        """What decides the images that are asked for, and where it is from, as JSON has it."""
        sampling = self.config.sampling.to_dict()
        del sampling["batch_size"]  # how many at a time does not change an image
        how = {"sampling": sampling, "seed": self.config.seed}
        told = asked or {self.experiment.model.asked_by: "all"}
        if "prompts" in asked:  # what a file of them holds may change
            texts = json.dumps(read_prompts(asked["prompts"], self.config.seed))
            told = asked | {"prompts_digest": hashlib.sha256(texts.encode()).hexdigest()}
        return json.loads(json.dumps(self.settings | how | told))

    def conditions(self, num_images: int | None, **asked: str) -> Any:
        """The conditions of all images: `classes` or `prompts`, see `Denoiser.parse_conditions`.

        One of each that is asked for where `num_images` is None.
        """
        model, name = self.experiment.model, self.config.model.name
        for flag, value in asked.items():
            if flag != model.asked_by:
                fix = f": {name} is told {model.asked_by}: use --{model.asked_by}"
                raise UsageError(f"--{flag}", value, fix)
        if not asked and model.asked_by == "prompts":
            raise UsageError(f"{name} is told a text: give --prompts")
        seed = self.config.seed
        given: Any = asked.get(model.asked_by, "all")
        if model.asked_by == "prompts":
            given = read_prompts(given, seed)
        return model.parse_conditions(given, num_images, seed, self.class_names)

    def default_number(self, prompts: str | None = None, **_: str) -> int:
        """How many images are made where nothing is said: one of each prompt."""
        return 100 if prompts is None else len(read_prompts(prompts, self.config.seed))

    def texts(self, num_images: int, prompts: str) -> list[str]:
        """The prompt of every image, as it was written, which its tokens need not tell."""
        found = read_prompts(prompts, self.config.seed)
        return [found[i % len(found)] for i in range(num_images)]

    def images(self, conditions: Any, start: int = 0) -> Iterator[np.ndarray]:
        """Images `start`, start + 1, ... of the conditions of all from 0 on: uint8 (N, H, W, C).

        NotFiniteError where one is not finite.
        """
        return generation.generate_images(*self._given(conditions), start)

    def batches(
        self, conditions: Any, indices: Any, progress: generation.Progress | None = None
    ) -> Iterator[tuple[np.ndarray, ...]]:
        """Of images `indices`, batch by batch, their numbers, themselves, and which are finite.

        `progress` is that of `generate_batches`.
        """
        return generation.generate_batches(*self._given(conditions), indices, progress)

    def trajectory(self, conditions: Any, most: int) -> tuple[np.ndarray, np.ndarray]:
        """Images 0 to N - 1 as they are predicted at `most` steps at most, the first and the last.

        Returns uint8 (T, N, H, W, C) and the numbers (T,) of the steps, from 1 on.
        """
        process, options = sampling_from_config(self.config)
        made = self.experiment
        parts = made.model, process, made.latent_shape, options
        guide = self.guide and self.guide.experiment.model
        sample = make_latents_fn(*parts, guide=guide, return_trajectory=True)
        weak = {"guide_params": self.guide.params} if self.guide else {}
        told = made.model.from_read(made.model.as_condition(conditions))
        indices = np.arange(len(jax.tree.leaves(told)[0]), dtype=np.int32)
        predicted = jax.jit(sample)(self.params, indices, told, **weak)[1]
        steps = np.unique(np.linspace(0, len(predicted) - 1, most).round().astype(int))
        decode = jax.jit(lambda params, latents: to_uint8(made.autoencoder.decode(params, latents)))
        images = [np.asarray(decode(made.autoencoder.params, predicted[i])) for i in steps]
        return np.stack(images), steps + 1

    def _given(self, conditions: Any) -> tuple[generation.GenerateFn, Any, Any, int, int]:
        told, sampling = self.experiment.model.as_condition(conditions), self.config.sampling
        generate = functools.partial(self._generate, cfg_scale=sampling.cfg_scale)
        return generate, self.params, told, sampling.batch_size, self.mesh.size
