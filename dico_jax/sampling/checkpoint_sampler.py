"""Images of a checkpoint, into a folder."""

import contextlib
import hashlib
import json
import os
import pathlib
import re
import zipfile
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import tqdm
from ml_collections import ConfigDict

from dico_jax.autoencoders import WAYS_OUT
from dico_jax.checkpoints.averages import rebuilt_ema, snapshot_steps, weights_digest
from dico_jax.checkpoints.reader import SavedWeights
from dico_jax.config import flatten
from dico_jax.errors import UsageError
from dico_jax.experiment import Experiment, experiment_from_config, sampling_from_config
from dico_jax.files import library_versions, new_file, result_path, write_json
from dico_jax.models import abstract_params
from dico_jax.parallel.mesh import create_mesh, replicated
from dico_jax.sampling import generate as generation
from dico_jax.sampling.grids import SIDE, captioned_grid, image_grid, is_png, load_png, save_png
from dico_jax.sampling.prompts import read_prompts

# What lies in a folder of samples, and may lie there besides.
_OURS = re.compile(r"\d{6,}\.png|grid\.png|sampling\.json|prompts\.txt|.*\.npz|\..*")
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

    def _given(self, conditions: Any) -> tuple[generation.GenerateFn, Any, Any, int, int]:
        told = self.experiment.model.as_condition(conditions)
        at_a_time = self._config.sampling.batch_size, self._mesh.size
        return self._generate, self._params, told, *at_a_time

    def save(self, out: str, *, num_images: int, npz: str | None = None, **asked: str):
        """Writes OUT/000000.png and on, grid.png and sampling.json (how they were made).

        Whole images that an earlier call with the same weights and settings left are kept; with
        others it is refused. `npz` also gets all images, arr_0 (uint8 NHWC), and labels, arr_1.
        NotFiniteError, once the others are there, for images that are not finite.
        """
        conditions, folder = self.conditions(num_images, **asked), pathlib.Path(out)
        known = _claim_folder(folder, self.about(**asked))
        files = [folder / f"{i:06d}.png" for i in range(num_images)]
        lacking = [i for i, file in enumerate(files) if not (known and is_png(file))]
        done, bad, given = num_images - len(lacking), [], self._given(conditions)
        with tqdm.tqdm(total=num_images, initial=done, unit="image", dynamic_ncols=True) as bar:
            for part, images, finite in generation.generate_batches(*given, lacking):
                for i in np.flatnonzero(finite):
                    with new_file(files[part[i]], survives=False) as stream:
                        save_png(stream, images[i])
                bad += part[~finite].tolist()
                bar.update(len(part))
                if not finite.any():  # nor will those to come be, most likely
                    break
        generation.check_finite(bad, bar.n - done)
        model = self.experiment.model
        if "prompts" not in asked:
            names = model.describe_conditions(conditions, self.class_names)
            arrays = model.named_arrays(conditions)
        else:
            names = self.texts(num_images, asked["prompts"])
            arrays = {"prompts": np.array(names)}
            with new_file(folder / "prompts.txt") as stream:  # one a line, as the images
                stream.write("".join(f"{line}\n" for line in names).encode())
        with new_file(folder / "grid.png") as stream:
            save_png(stream, self._grid(files, conditions, names))
        if npz is not None:
            _write_npz(npz, files, arrays)

    def _grid(self, files: list[pathlib.Path], conditions: Any, names: list[str]) -> np.ndarray:
        """The first conditions with the first images of each, and their names."""
        images: dict[Any, list[int]] = {}
        leaves, under = jax.tree.leaves(conditions), self.experiment.model.asked_by == "prompts"
        for i in range(len(files)):
            key = names[i] if under else tuple(leaf[i].tobytes() for leaf in leaves)
            images.setdefault(key, []).append(i)
        picked = [indices[:SIDE] for indices in images.values()]
        picked = picked[: SIDE * max(1, SIDE // max(map(len, picked))) if under else SIDE]
        rows = [np.stack([load_png(files[i]) for i in indices]) for indices in picked]
        labels = [names[indices[0]] for indices in picked]
        return (captioned_grid if under else image_grid)(rows, labels)


def check_outputs(out: str, npz: str | None, overwrite: bool) -> None:
    """UsageError unless `CheckpointSampler.save` can write there; it is cheap, and comes first."""
    folder = pathlib.Path(out)
    if not folder.is_dir() and os.path.lexists(folder):
        raise UsageError("--out", out, "is a file: name a folder")
    if npz is not None:
        result_path(npz, "", "--npz", overwrite)
    found = os.listdir(folder) if folder.is_dir() else []
    if others := [name for name in found if not _OURS.fullmatch(name)]:
        fix = f"holds other files ({len(others)}, such as {min(others)}): give a new folder"
        raise UsageError("--out", out, fix)
    if any(name[0].isdigit() for name in found) and "sampling.json" not in found:
        fix = "holds images but no sampling.json to say how they were made: give another folder"
        raise UsageError("--out", out, fix)


def _claim_folder(folder: pathlib.Path, settings: dict[str, Any]) -> bool:
    """Whether a folder's images are known to be of these settings; UsageError if of others."""
    folder.mkdir(parents=True, exist_ok=True)
    file, old = folder / "sampling.json", None
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
        old = dict(json.loads(file.read_text())["settings"])
    if old is not None and (found := differences(old, settings)):
        fix = f"holds images made with other settings ({found}): give another folder"
        raise UsageError("--out", folder, fix)
    write_json(file, {"settings": settings, "versions": library_versions()})
    return old is not None


def differences(was: dict[str, Any], now: dict[str, Any]) -> str:
    """What differs between two descriptions, but for the places of checkpoints and other files."""
    was, now = flatten(was), flatten(now)
    names = [n for n in {**was, **now} if n.split(".")[-1] not in ("ckpt", "path", "prompts")]
    both = [(n, was.get(n), now.get(n)) for n in names if was.get(n) != now.get(n)]
    return "; ".join(f"{n} was {str(old)[:40]}, is {str(new)[:40]}" for n, old, new in both[:5])


def _write_npz(path: str, files: list[pathlib.Path], arrays: dict[str, np.ndarray]) -> None:
    """Writes arr_0 (uint8 images), image by image: 50,000 need no memory; and other arrays."""
    shape = (len(files), *load_png(files[0]).shape)
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with new_file(path) as stream, zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as entry:
            np.lib.format.write_array_header_1_0(entry, header)
            for file in files:
                entry.write(load_png(file).tobytes())
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w") as entry:
                np.lib.format.write_array(entry, array)
