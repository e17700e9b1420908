"""Images in a line of Python: `Sampler.from_pretrained(path)(classes=["cat"])`."""

import contextlib
import functools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from dico_jax.config import check_values, check_whole
from dico_jax.errors import UsageError
from dico_jax.experiment import sampling_from_config
from dico_jax.models.class_names import ClassNames
from dico_jax.parallel.mesh import batch_sharding, replicated
from dico_jax.sampling.generate import GenerateFn, check_finite, generate_images
from dico_jax.sampling.pretrained import Pretrained
from dico_jax.sampling.programs import Noise, Programs, Walk, guided_steps

_ARGUMENTS = {"num_steps": "steps", "sampler": "solver"}  # of fields that are named otherwise here
_LEFT_OUT = ("grid_rows", "grid_columns", "grid_every_steps", "batch_size")  # of config.sampling
_MOST_PROGRAMS = 32  # whose programs are kept, those used last: each has some MB
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
        self.pretrained, self._model = pretrained, pretrained.experiment.model
        self._generate: dict[str, GenerateFn] = {}
        self._programs: dict[str, Programs] = {}

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike, **how: Any) -> "Sampler":
        """The sampler of weights, which are read now; nothing is written.

        Args:
          source: workdir of a run, a converted checkpoint, a .pt, .pth or .safetensors file or an
            index of several, or hf://OWNER/REPO[@REVISION][/FILE] with one of these.
          **how: step, weights ("ema" or "params"), ema_width, vae (a file, or "preview"),
            text_encoder, guide and guide_step (of a weaker network), mesh; see `Pretrained`.

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
        if self._model.asked_by != "classes":
            return []
        return ClassNames(self._model.num_classes, self.pretrained.class_names).lines()

    def __call__(
        self,
        classes: str | int | Sequence[str | int] | None = None,
        *,
        prompts: str | Sequence[str] | None = None,
        num_images: int | None = None,
        per_class: int | None = None,
        seed: int = 0,
        batch_size: int | None = None,
        cfg_scale: float | None = None,
        steps: int | None = None,
        solver: str | None = None,
        **options: Any,
    ) -> Images:
        """Images, uint8 (N, H, W, 3): image i follows from the seed, i, and what it is of.

        Args:
          classes: numbers, and names as texts, taken in turn; "all" or "random".
          prompts: in place of classes, for a model that is told a text.
          num_images: how many [one of each class or prompt; of "all" and "random" 1].
          per_class: in place of num_images, so many of each, class by class; not of "random".
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
        given = {"cfg_scale": cfg_scale, "steps": steps, "solver": solver, **options}
        with _arguments(classes=classes):
            check_whole("seed", seed, 0, 2**32 - 1)
            config = self._config(given, batch_size)
            told = self._conditions(classes, prompts, num_images, per_class, seed)
            scale, size = config.sampling.cfg_scale, config.sampling.batch_size
            generate = functools.partial(self._program(config), seed=seed, cfg_scale=scale)
            parts = self.pretrained.params, self._model.as_condition(told), size
            batches = generate_images(generate, *parts, self.pretrained.mesh.size)
            return np.concatenate([*batches]).view(Images)

    def check(self, **asked: Any) -> None:
        """Raises UsageError for options that a call would refuse, before anything is made."""
        with _arguments():
            sampling_from_config(self._config(asked, None))

    def stream(
        self, classes: Any = None, *, seed: int = 0, every: int = 1, **asked: Any
    ) -> Iterator[tuple[int, Images]]:
        """The images of a call with these arguments while they are made, all at once.

        All but `batch_size` can be asked for. Yields how many steps are done, after every so many,
        and the images as the network then predicts them; at last the images themselves, some bits
        of which may be rounded otherwise. Another `every` compiles.
        """
        with _arguments(classes=classes):
            check_whole("seed", seed, 0, 2**32 - 1)
            prompts, *counts = (asked.pop(n, None) for n in ("prompts", "num_images", "per_class"))
            told = self._conditions(classes, prompts, counts[0], counts[1], seed)
            indices = np.arange(len(jax.tree.leaves(told)[0]), dtype=np.int32)
            noise = Noise(np.uint32(seed), indices)
            yield from self._stream(self._config(asked, None), every, noise, self._told(told))

    def walk(
        self, start: str | int, end: str | int, *, seeds: tuple[int, int] = (0, 0),
        num_images: int = 10, every: int = 1, **asked: Any,
    ) -> Iterator[tuple[int, Images]]:  # fmt: skip
        """Images on the way from a class, or prompt, and seed to others, yielded as by `stream`.

        The first and the last are image 0 of each. Between them embeddings are mixed linearly, and
        noise on a circle, where the mixture is as normal as its parts.
        """
        with _arguments(classes=[start, end]):
            for seed in seeds:
                check_whole("seed", seed, 0, 2**32 - 1)
            check_whole("num_images", num_images, 2, _MOST)
            shares = np.linspace(0, 1, num_images, dtype=np.float32)
            ends: Any = {"classes": None, "prompts": None, self._model.asked_by: [start, end]}
            told = self._conditions(**ends, num_images=2, per_class=None, seed=0)
            first, last = (
                self._told(jax.tree.map(lambda leaf, i=i: leaf[[i] * num_images], told))
                for i in (0, 1)
            )
            other = None if seeds[0] == seeds[1] else np.uint32(seeds[1])
            angles = None if other is None else shares * np.float32(np.pi / 2)
            noise = Noise(np.uint32(seeds[0]), np.zeros(num_images, np.int32), other, angles)
            way = None if start == end else Walk(last, shares)
            yield from self._stream(self._config(asked, None), every, noise, first, way)

    def _told(self, conditions: Any) -> Any:
        return self._model.from_read(self._model.as_condition(conditions))

    def _stream(
        self, config: ConfigDict, every: int, noise: Noise, told: Any, walk: Walk | None = None
    ) -> Iterator[tuple[int, Images]]:
        check_whole("every", every, 1, _MOST)
        made, scales = self.pretrained.programs(config)
        mesh, guide, number = self.pretrained.mesh, self.pretrained.guide, len(noise.indices)
        kind = guided_steps(scales)
        key = f"{_key(config)} {kind} {number}"
        programs = self._programs[key] = self._programs.pop(key, made)
        if len(self._programs) > _MOST_PROGRAMS:
            del self._programs[next(iter(self._programs))]
        rows = np.minimum(np.arange(-(-number // mesh.size) * mesh.size), number - 1)

        def spread(tree: Any) -> Any:  # over the devices, which share the images
            split = batch_sharding(mesh)
            return jax.tree.map(lambda a: jax.device_put(a[rows], split) if a.ndim else a, tree)

        def images(latents: jax.Array) -> tuple[Images, np.ndarray]:
            pictures, finite = (np.asarray(a)[:number] for a in programs.decode(decoder, latents))
            return pictures.view(Images), finite

        decoder = jax.device_put(self.pretrained.experiment.autoencoder.params, replicated(mesh))
        given = self.pretrained.params, spread(noise), scales, guide and guide.params
        (of, x), count = programs.begin(*given, spread(told), spread(walk), kind), len(scales) - 1
        for left in range(count, 0, -every):
            x, predicted, _ = programs.advance(
                *given, of, x, np.int32(left - 1), min(every, left), kind
            )
            if left > every:
                yield count - left + every, images(predicted)[0]
        pictures, finite = images(programs.end(*given, of, x, kind))
        check_finite(np.flatnonzero(~finite), number)
        yield count, pictures

    def _config(self, given: dict[str, Any], batch_size: int | None) -> ConfigDict:
        config = self.pretrained.config.copy_and_resolve_references()
        known = {_ARGUMENTS.get(n, n): n for n in config.sampling if n not in _LEFT_OUT}
        if others := [name for name in given if name not in known]:
            found, have = f"{others[0]}={given[others[0]]!r}", ", ".join(known)
            raise UsageError(f"{found} is no option of a sampler: it has {have}")
        fields = {known[name]: value for name, value in given.items()} | {"batch_size": batch_size}
        with config.sampling.ignore_type():
            config.sampling.update({k: v for k, v in fields.items() if v is not None})
        check_values(config, "sampling")
        return config

    def _conditions(
        self, classes: Any, prompts: Any, num_images: int | None, per_class: int | None, seed: int
    ) -> Any:
        model, name = self._model, self.pretrained.config.model.name
        given = {"classes": classes, "prompts": prompts}
        asked: Any = given.pop(model.asked_by)
        for other, value in given.items():
            if value is not None:
                raise UsageError(other, value, f": {name} is told {model.asked_by}: give these")
        if asked is None and model.asked_by == "prompts":
            raise UsageError(f"{name} is told a text: give prompts")
        if per_class is not None and num_images is not None:
            raise UsageError("per_class", per_class, ": num_images is given, too: give one of them")
        asked = asked.tolist() if hasattr(asked, "tolist") else "all" if asked is None else asked
        one = isinstance(asked, str) or not isinstance(asked, Iterable)
        drawn = model.asked_by == "classes" and one and asked in ("all", "random")
        if not drawn and not (asked := [asked] if one else [*asked]):
            raise UsageError(model.asked_by, asked, "is empty: name some")
        if model.asked_by == "prompts" and not all(isinstance(text, str) for text in asked):
            raise UsageError("prompts", prompts, "must be texts")
        if per_class is not None and asked == "random":
            raise UsageError("per_class", per_class, "is for classes that are named, or all")
        count = 1 if drawn and num_images is None and per_class is None else num_images
        if count is not None:
            check_whole("num_images", count, 1, _MOST)
        told = model.parse_conditions(asked, count, seed, self.pretrained.class_names)
        each = 1 if per_class is None else per_class
        check_whole("per_class", each, 1, _MOST // len(jax.tree.leaves(told)[0]))
        return jax.tree.map(lambda leaf: leaf.repeat(each, axis=0), told)

    def _program(self, config: ConfigDict) -> GenerateFn:
        """The function for these options, which compiles for each number of images."""
        if (key := _key(config)) not in self._generate:
            self._generate[key] = self.pretrained.generator(config)
        return self._generate[key]


def _key(config: ConfigDict) -> str:
    """What programs are kept by: all options but the guidance scale, which they are given."""
    sampling = {k: v for k, v in config.sampling.items() if k not in (*_LEFT_OUT, "cfg_scale")}
    return json.dumps(sampling, sort_keys=True, default=float)  # NumPy's numbers


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
