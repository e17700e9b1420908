"""Images of a checkpoint, into a folder."""

import contextlib
import json
import pathlib
import zipfile
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import tqdm
from ml_collections import ConfigDict

from dico_jax.autoencoders import WAYS_OUT
from dico_jax.checkpoints.averages import rebuilt_ema, snapshot_steps
from dico_jax.checkpoints.reader import SavedWeights
from dico_jax.errors import UsageError
from dico_jax.experiment import experiment_from_config, sampling_from_config
from dico_jax.files import library_versions, new_file
from dico_jax.models import abstract_params
from dico_jax.parallel.mesh import create_mesh, replicated
from dico_jax.sampling import generate as generation
from dico_jax.sampling.grids import image_grid, is_png, load_png, save_png

_GRID_SIDE = 10
PREVIEW = "preview"  # of --vae


def choose_autoencoder(config: ConfigDict, vae: str) -> None:
    """Changes `config.autoencoder` to the one that --vae names: weights, or "preview"."""
    autoencoder = config.autoencoder
    if autoencoder.name == "identity":
        fix = ": this checkpoint is a model of pixels, which needs no autoencoder; leave it out"
        raise UsageError("--vae", vae, fix)
    if vae == PREVIEW:
        autoencoder.name = "latent_preview"
    else:
        autoencoder.update(name="sd_vae", path=vae)


@contextlib.contextmanager
def _vae_errors(vae: str | None) -> Iterator[None]:
    """Names the flag in errors about the autoencoder's file, or says that there is one."""
    try:
        yield
    except UsageError as error:
        text, field = str(error).removeprefix("config."), "autoencoder.path="
        if not text.startswith(field):
            raise
        said = f"config.{text}" if vae is None else text.replace(field, "--vae=", 1)
        fix = f"give --vae=FILE, or --vae={PREVIEW} for small false-colour pictures"
        raise UsageError(f"{said.removesuffix(WAYS_OUT)}; {fix}") from error


class CheckpointSampler:
    """The sampler of a checkpoint, with its config's options or others."""

    def __init__(
        self,
        ckpt: str,
        *,
        step: int | None = None,
        weights: str = "ema",
        ema_width: float | None = None,
        seed: int = 0,
        overrides: dict[str, Any] | None = None,
        vae: str | None = None,
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
          vae: in place of the config's autoencoder, see `choose_autoencoder`.
        """
        saved = SavedWeights(ckpt, None if ema_width is not None else step)
        config = ConfigDict(saved.config)
        config.seed = seed
        config.sampling.update(overrides or {})
        if vae is not None:
            choose_autoencoder(config, vae)
        with _vae_errors(vae):
            self.experiment = experiment_from_config(config)
            autoencoder = self.experiment.autoencoder
            digest = autoencoder.decoder_digest  # reads the weights, and may fail
        self.class_names, self._config, self._mesh = saved.class_names, config, create_mesh()
        self.set_guidance(config.sampling.cfg_scale)
        sharding = replicated(self._mesh)
        if ema_width is None:
            target = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
                abstract_params(self.experiment.model),
            )
            self._params, used_step = saved.read(weights, target), saved.step
        else:
            self._params = jax.device_put(rebuilt_ema(ckpt, ema_width, step), sharding)
            used_step = snapshot_steps(ckpt)[-1] if step is None else step
        self.settings: dict[str, Any] = {
            "ckpt": str(pathlib.Path(ckpt).absolute()),
            "step": used_step,
            "weights": weights if ema_width is None else f"ema_width={ema_width}",
            "seed": seed,
            "autoencoder": {
                **config.autoencoder.to_dict(),
                "path": config.autoencoder.path if digest else None,  # read, or of no use
                "scaling_factor": autoencoder.scaling_factor,
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

    def about(self, classes: str) -> dict[str, Any]:
        """What decides the images of these classes, and where it is from, as JSON has it."""
        sampling = self._config.sampling.to_dict()
        del sampling["batch_size"]  # how many at a time does not change an image
        return json.loads(json.dumps(self.settings | {"sampling": sampling, "classes": classes}))

    def conditions(self, num_images: int, classes: str = "all") -> Any:
        """The conditions of all images, see `ClassConditional.parse_conditions`."""
        return self.experiment.model.parse_conditions(
            classes, num_images, self.settings["seed"], self.class_names
        )

    def images(self, conditions: Any, start: int = 0) -> Iterator[np.ndarray]:
        """Images `start`, start + 1, ... of the conditions of all from 0 on: uint8 (N, H, W, C).

        NotFiniteError where one is not finite.
        """
        return generation.generate_images(*self._given(conditions), start)

    def _given(self, conditions: Any) -> tuple[generation.GenerateFn, Any, Any, int, int]:
        told = self.experiment.model.as_condition(conditions)
        size = self._config.sampling.batch_size
        return self._generate, self._params, told, size, self._mesh.size

    def save(self, out: str, *, num_images: int, classes: str = "all", npz: str | None = None):
        """Writes OUT/000000.png and on, grid.png and sampling.json (how they were made).

        Images that an earlier call with the same settings left are kept and not made again; with
        others it is refused. `npz` also gets all images, arr_0 (uint8 NHWC), and labels, arr_1.
        """
        conditions = self.conditions(num_images, classes)
        folder = pathlib.Path(out)
        _claim_folder(folder, self.about(classes), library_versions())
        files = [folder / f"{i:06d}.png" for i in range(num_images)]
        lacking = [i for i, file in enumerate(files) if not is_png(file)]
        done, bad, given = num_images - len(lacking), [], self._given(conditions)
        with tqdm.tqdm(total=num_images, initial=done, unit="image", dynamic_ncols=True) as bar:
            for part, images, finite in generation.generate_batches(*given, lacking):
                for i in np.flatnonzero(finite):
                    with new_file(files[part[i]]) as stream:  # half of one would be kept later
                        save_png(stream, images[i])
                bad += part[~finite].tolist()
                bar.update(len(part))
                if not finite.any():  # nor will those to come be, most likely
                    break
        generation.check_finite(bad, bar.n - done)
        with new_file(folder / "grid.png") as stream:
            save_png(stream, self._grid(files, conditions))
        if npz is not None:
            _write_npz(npz, files, self.experiment.model.named_arrays(conditions))

    def _grid(self, files: list[pathlib.Path], conditions: Any) -> np.ndarray:
        """The first conditions, a row each, with the first images of each."""
        images: dict[tuple[bytes, ...], list[int]] = {}
        leaves = jax.tree.leaves(conditions)
        for i in range(len(files)):
            images.setdefault(tuple(leaf[i].tobytes() for leaf in leaves), []).append(i)
        picked = [indices[:_GRID_SIDE] for indices in images.values()][:_GRID_SIDE]
        rows = [np.stack([load_png(files[i]) for i in indices]) for indices in picked]
        firsts = jax.tree.map(lambda leaf: leaf[[i[0] for i in picked]], conditions)
        names = self.experiment.model.describe_conditions(firsts, self.class_names)
        return image_grid(rows, names)


def _claim_folder(folder: pathlib.Path, settings: dict, versions: dict) -> None:
    """Writes sampling.json, or checks that the folder's images were made in the same way."""
    file = folder / "sampling.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError("--out", folder, f"cannot be made: {error}") from error
    if file.exists():
        old, new = (_decisive(s) for s in (json.loads(file.read_text())["settings"], settings))
        if old != new:
            differing = [k for k in new if old.get(k) != new[k]]
            fix = f"({', '.join(differing)}; see {file.name}): give another folder"
            raise UsageError("--out", folder, f"holds images made with other settings {fix}")
    elif any(folder.glob("[0-9]*.png")):
        fix = f"holds images but no {file.name} to say how they were made: give another folder"
        raise UsageError("--out", folder, fix)
    file.write_text(json.dumps({"settings": settings, "versions": versions}, indent=2) + "\n")


def _decisive(settings: dict) -> dict:
    """The settings that decide an image: of the autoencoder's file its content, not its place."""
    autoencoder = {k: v for k, v in settings.get("autoencoder", {}).items() if k != "path"}
    return settings | {"autoencoder": autoencoder}


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
