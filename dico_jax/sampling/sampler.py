"""Images in a line of Python: `Sampler.from_pretrained(path)(classes=["cat"])`."""

import contextlib
import functools
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from dico_jax.config import check_item, check_values
from dico_jax.errors import UsageError
from dico_jax.models.class_names import ClassNames
from dico_jax.sampling.generate import GenerateFn, generate_images
from dico_jax.sampling.pretrained import Pretrained

_ARGUMENTS = {"num_steps": "steps", "sampler": "solver"}  # of fields that are named otherwise here
_LEFT_OUT = ("grid_rows", "grid_columns", "grid_every_steps", "batch_size")  # of config.sampling
_MOST = 1_000_000  # images of a call, which are all in memory


class Images(np.ndarray):
    """Images as an array, uint8 (N, H, W, 3), or (N, H, W, 1) of a grey model."""

    def pil(self) -> list[Image.Image]:
        """Each as a picture of Pillow's."""
        images = np.asarray(self).reshape(-1, *self.shape[-3:])  # one alone is one, too
        return [Image.fromarray(x[..., 0] if x.shape[-1] == 1 else x) for x in images]


class Sampler:
    """Makes images. A call compiles once per number of images, steps, solver and kind of guidance.

    Another seed, scale, class or prompt does not compile again, but for guidance against none.
    """

    def __init__(self, pretrained: Pretrained):
        """`from_pretrained` makes one."""
        self.pretrained = pretrained
        self._programs: dict[str, GenerateFn] = {}

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike, **how: Any) -> "Sampler":
        """The sampler of weights, which are read now; nothing is written.

        Args:
          source: workdir of a run, a converted checkpoint, a .pt, .pth or .safetensors file or an
            index of several, or hf://OWNER/REPO[@REVISION][/FILE] with one of these.
          **how: step, weights ("ema" or "params"), ema_width, vae (a file, or "preview"),
            text_encoder, mesh; see `Pretrained`.

        Raises:
          UsageError: a value is wrong; it starts with the argument's name.
        """
        with _arguments():
            pretrained = Pretrained(source, **how)
            pretrained.params  # noqa: B018  reads them
        return cls(pretrained)

    @property
    def classes(self) -> list[str]:
        """Per class its number and its names; [] of a model that is told a text."""
        model = self.pretrained.experiment.model
        if model.asked_by != "classes":
            return []
        return ClassNames(model.num_classes, self.pretrained.class_names).lines()

    def __call__(
        self,
        classes: str | int | Sequence[str | int] | None = None,
        *,
        prompts: str | Sequence[str] | None = None,
        num_images: int | None = None,
        per_class: int = 1,
        seed: int = 0,
        batch_size: int | None = None,
        cfg_scale: float | None = None,
        steps: int | None = None,
        solver: str | None = None,
        **options: Any,
    ) -> Images:
        """Images, uint8 (N, H, W, 3): image i follows from the seed, i, and what it is of.

        Args:
          classes: numbers and names, taken in turn; "all" or "random".
          prompts: in place of classes, for a model that is told a text.
          num_images: how many [one of each class or prompt; of "all" and "random" 1].
          per_class: in place of num_images, so many of each.
          seed: of all noise, and of "random" classes.
          batch_size: how many at a time [the config's].
          cfg_scale: how strong guidance is; 1 for none [the config's].
          steps: of the solver [the config's].
          solver: such as "ddpm", "ddim" or "dpmpp_2m" [the config's].
          **options: other fields of `config.sampling`, see configs/default.py.

        Raises:
          UsageError: a value is wrong; it starts with the argument's name.
          NotFiniteError: an image is NaN or infinite.
        """
        given = {"cfg_scale": cfg_scale, "num_steps": steps, "sampler": solver, **options}
        with _arguments(classes=classes):
            check_item("seed", seed, 0, 2**32 - 1)
            config = self._config({k: v for k, v in given.items() if v is not None}, batch_size)
            told = self._conditions(classes, prompts, num_images, per_class, seed)
            program = self._program(config)
        model, mesh, scale = self._model, self.pretrained.mesh, config.sampling.cfg_scale
        generate = functools.partial(program, seed=seed, cfg_scale=scale)
        size, params = config.sampling.batch_size, self.pretrained.params
        with _arguments():
            batches = generate_images(generate, params, model.as_condition(told), size, mesh.size)
            return np.concatenate([*batches]).view(Images)

    @property
    def _model(self) -> Any:
        return self.pretrained.experiment.model

    def _config(self, fields: dict[str, Any], batch_size: int | None) -> ConfigDict:
        config = self.pretrained.config.copy_and_resolve_references()
        known = [name for name in config.sampling if name not in _LEFT_OUT]
        for name in fields:
            if name not in known:
                have = ", ".join(_ARGUMENTS.get(name, name) for name in known)
                raise UsageError(name, fields[name], f"is no option of a sampler: it has {have}")
        fields = fields if batch_size is None else fields | {"batch_size": batch_size}
        with config.sampling.ignore_type():
            config.sampling.update(fields)
        check_values(config, "sampling")
        return config

    def _conditions(
        self, classes: Any, prompts: Any, num_images: int | None, per_class: int, seed: int
    ) -> Any:
        asked, other = (
            (classes, prompts) if self._model.asked_by == "classes" else (prompts, classes)
        )
        if other is not None:
            name = "prompts" if other is prompts else "classes"
            fix = (
                f": {self.pretrained.config.model.name} is told {self._model.asked_by}: give these"
            )
            raise UsageError(name, other, fix)
        if asked is None and self._model.asked_by == "prompts":
            raise UsageError(f"{self.pretrained.config.model.name} is told a text: give prompts")
        asked = "all" if asked is None else asked
        drawn = asked in ("all", "random") if isinstance(asked, str) else False
        asked = [asked] if isinstance(asked, str | int) and not drawn else asked
        if not drawn and not len(asked):
            raise UsageError(self._model.asked_by, asked, "is empty: name some")
        check_item("per_class", per_class, 1, _MOST)
        count = per_class * (1 if drawn else len(asked)) if num_images is None else num_images
        check_item("num_images", count, 1, _MOST)
        names = self.pretrained.class_names
        return self._model.parse_conditions(asked if drawn else list(asked), count, seed, names)

    def _program(self, config: ConfigDict) -> GenerateFn:
        """The function for these options, which compiles for each number of images."""
        sampling = {k: v for k, v in config.sampling.items() if k not in (*_LEFT_OUT, "cfg_scale")}
        key = json.dumps(sampling, sort_keys=True)
        if key not in self._programs:
            self._programs[key] = self.pretrained.generator(config)
        return self._programs[key]


@contextlib.contextmanager
def _arguments(**given: Any) -> Iterator[None]:
    """Makes errors name arguments, in place of fields and flags, with the values that are given."""
    try:
        yield
    except UsageError as error:
        name = error.field.removeprefix("--").removeprefix("config.").removeprefix("sampling.")
        name = "source" if name == "ckpt" else name
        error.value = given.get(name, error.value)
        error.field, error.fix = _ARGUMENTS.get(name, name), error.fix.replace("sampling.", "")
        raise
