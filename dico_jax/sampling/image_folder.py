"""Images of a checkpoint, into a folder."""

import contextlib
import json
import os
import pathlib
import re
import zipfile
from typing import Any

import jax
import numpy as np
import tqdm

from dico_jax.config import flatten
from dico_jax.errors import UsageError
from dico_jax.files import library_versions, new_file, result_path, write_json
from dico_jax.sampling.checkpoint_sampler import CheckpointSampler
from dico_jax.sampling.generate import check_finite
from dico_jax.sampling.grids import SIDE, captioned_grid, image_grid, is_png, load_png, save_png

# What lies in a folder of samples, and may lie there besides.
_OURS = re.compile(r"\d{6,}\.png|grid\.png|sampling\.json|prompts\.txt|.*\.npz|\..*")


def save(
    sampler: CheckpointSampler, out: str, *, num_images: int, npz: str | None = None, **asked: str
) -> None:
    """Writes OUT/000000.png and on, grid.png and sampling.json (how they were made).

    Whole images that an earlier call with the same weights and settings left are kept; with
    others it is refused. `npz` also gets all images, arr_0 (uint8 NHWC), and labels, arr_1.
    NotFiniteError, once the others are there, for images that are not finite.
    """
    conditions, folder = sampler.conditions(num_images, **asked), pathlib.Path(out)
    known = _claim_folder(folder, sampler.about(**asked))
    files = [folder / f"{i:06d}.png" for i in range(num_images)]
    lacking = [i for i, file in enumerate(files) if not (known and is_png(file))]
    done, bad = num_images - len(lacking), []
    with tqdm.tqdm(total=num_images, initial=done, unit="image", dynamic_ncols=True) as bar:
        for part, images, finite in sampler.batches(conditions, lacking):
            for i in np.flatnonzero(finite):
                with new_file(files[part[i]], survives=False) as stream:
                    save_png(stream, images[i])
            bad += part[~finite].tolist()
            bar.update(len(part))
            if not finite.any():  # nor will those to come be, most likely
                break
    check_finite(bad, bar.n - done)
    model = sampler.experiment.model
    if "prompts" not in asked:
        names = model.describe_conditions(conditions, sampler.class_names)
        arrays = model.named_arrays(conditions)
    else:
        names = sampler.texts(num_images, asked["prompts"])
        arrays = {"prompts": np.array(names)}
        with new_file(folder / "prompts.txt") as stream:  # one a line, as the images
            stream.write("".join(f"{line}\n" for line in names).encode())
    with new_file(folder / "grid.png") as stream:
        save_png(stream, _grid(sampler, files, conditions, names))
    if npz is not None:
        _write_npz(npz, files, arrays)


def _grid(
    sampler: CheckpointSampler, files: list[pathlib.Path], conditions: Any, names: list[str]
) -> np.ndarray:
    """The first conditions with the first images of each, and their names."""
    images: dict[Any, list[int]] = {}
    leaves, under = jax.tree.leaves(conditions), sampler.experiment.model.asked_by == "prompts"
    for i in range(len(files)):
        key = names[i] if under else tuple(leaf[i].tobytes() for leaf in leaves)
        images.setdefault(key, []).append(i)
    picked = [indices[:SIDE] for indices in images.values()]
    picked = picked[: SIDE * max(1, SIDE // max(map(len, picked))) if under else SIDE]
    rows = [np.stack([load_png(files[i]) for i in indices]) for indices in picked]
    labels = [names[indices[0]] for indices in picked]
    return (captioned_grid if under else image_grid)(rows, labels)


def check_outputs(out: str, npz: str | None, overwrite: bool) -> None:
    """UsageError unless `save` can write there; it is cheap, and comes first."""
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
