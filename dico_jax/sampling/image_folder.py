"""Images of a checkpoint, into a folder."""

import concurrent.futures
import contextlib
import json
import os
import re
import time
import zipfile
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from dico_jax.config import DEFAULTS, flatten
from dico_jax.errors import UsageError
from dico_jax.files import (
    as_path,
    is_remote,
    library_versions,
    names_in,
    new_file,
    opened,
    result_path,
    write_json,
)
from dico_jax.sampling.checkpoint_sampler import CheckpointSampler
from dico_jax.sampling.generate import check_finite
from dico_jax.sampling.grids import image_grid, is_png, load_png, save_png
from dico_jax.sampling.latent_file import LatentFile, create_latents
from dico_jax.sampling.trajectory import FRAMES, save_trajectory
from dico_jax.terminal import Bar

# What lies in a folder of samples, and may lie there besides.
_OURS = re.compile(
    r"\d{6,}\.png|grid\.png|trajectory\.(png|gif)|latents\.npy|sampling\.json|prompts\.txt"
    r"|.*\.npz|\..*"
)
_IN_GRID, _IN_TRAJECTORY = 400, 6  # most images in grid.png and trajectory.*
_GROUPS_IN_GRID = 1024  # of which there is one image at least
_HOPELESS = 64  # images, of which not one is finite
_MADE, _BAD = 1, 2  # what this call has done about an image
_READ = 256  # pictures at once


def save(
    sampler: CheckpointSampler,
    out: str,
    *,
    num_images: int | None = None,
    per_class: int | None = None,
    npz: str | None = None,
    trajectory: bool = False,
    **asked: str,
) -> int:
    """Writes OUT/000000.png and on, grid.png and sampling.json (how they were made).

    Whole images that an earlier call with the same weights and settings left are kept; with
    others it is refused. NotFiniteError, once the others are there, for images that are not finite.
    Of several processes each makes and writes a share, and the first one all other files. A sampler
    that gives latents has them in latents.npy, float32 (N, H, W, C).

    Args:
      sampler: of the checkpoint; its mesh is of devices of this process.
      out: the folder, which all processes share.
      num_images: of all that is asked for, in turn; `CheckpointSampler.default_number` if None.
      per_class: in its place, how many of every class that is asked for, class by class.
      trajectory: also writes trajectory.gif and trajectory.png, of the first images.
      npz: file that also gets all images, arr_0 (uint8 NHWC), and labels, arr_1.
      **asked: `classes` or `prompts`, see `CheckpointSampler.conditions`.

    Returns:
      the number of images.
    """
    settings = sampler.about(**asked)
    if per_class is None:
        num_images = num_images or sampler.default_number(**asked)
        conditions = sampler.conditions(num_images, **asked)
    else:
        conditions = jax.tree.map(
            lambda leaf: leaf.repeat(per_class, axis=0), sampler.conditions(None, **asked)
        )
        num_images = len(jax.tree.leaves(conditions)[0])
        settings["per_class"] = per_class
    folder, process = as_path(out), jax.process_index()
    known, latents = process == 0 and _claim_folder(folder, settings), folder / "latents.npy"
    if process == 0 and sampler.with_latents:
        create_latents(latents, num_images, sampler.experiment.latent_shape, known)
    known = bool(multihost_utils.broadcast_one_to_all(np.asarray(known)))
    _check_shared(folder)
    rows = LatentFile(latents) if sampler.with_latents else None
    files = [folder / f"{i:06d}.png" for i in range(num_images)]
    state = _make(sampler, conditions, files, rows, known)
    state = multihost_utils.process_allgather(state).reshape(-1, num_images).max(axis=0)
    check_finite(np.flatnonzero(state == _BAD).tolist(), int(np.count_nonzero(state)))
    if process == 0:
        names = _finish(sampler, folder, files, conditions, npz, **asked)
        if trajectory:
            first = jax.tree.map(lambda leaf: leaf[:_IN_TRAJECTORY], conditions)
            save_trajectory(folder, *sampler.trajectory(first, FRAMES), names[:_IN_TRAJECTORY])
    return num_images


def _make(
    sampler: CheckpointSampler, conditions: Any, files: list[Any], rows: Any, known: bool
) -> np.ndarray:
    """Makes the images of this process that are not `known` to be there; what was done (N,)."""
    mine = range(jax.process_index(), len(files), jax.process_count())
    remote = is_remote(files[0])  # where what is there is whole
    there = set(names_in(files[0].parent)) if remote and known else set[str]()
    lacking = [
        i
        for i in mine
        if not known
        or not (files[i].name in there if remote else is_png(files[i]))
        or not (rows is None or rows.has(i))
    ]
    state = np.zeros(len(files), np.uint8)

    def write(index: int, image: np.ndarray, *latents: np.ndarray) -> None:
        for row in latents:  # first: what has a picture has a row
            rows.write(index, row)
        with new_file(files[index], survives=False) as stream:
            save_png(stream, image)

    with (
        Bar(total=len(mine), initial=len(mine) - len(lacking), **_bar()) as bar,
        _threads() as pool,
    ):
        before: list[concurrent.futures.Future[None]] = []
        hopeless = len(lacking) == len(mine)
        for part, images, finite, *more in sampler.batches(
            conditions, lacking, progress=bar.update
        ):
            state[part] = np.where(finite, _MADE, _BAD)
            after = [
                pool.submit(write, part[i], *(array[i] for array in (images, *more)))
                for i in np.flatnonzero(finite)
            ]
            for written in before:
                written.result()
            before = after
            hopeless = hopeless and not finite.any()
            if hopeless and np.count_nonzero(state) >= _HOPELESS:  # as those to come, most likely
                break
        for written in before:
            written.result()
    return state


def _bar() -> dict[str, Any]:
    """How progress is shown, by the first process."""
    processes = jax.process_count()
    said = f"process 0 of {processes}" if processes > 1 else None
    return {
        "desc": said,
        "disable": jax.process_index() > 0,
        "unit": "image",
        "compiles": "compiling the sampler",
    }


@contextlib.contextmanager
def _threads() -> Iterator[concurrent.futures.Executor]:
    """Threads for PNG files; what they have not begun when the block fails is not done."""
    with concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        try:
            yield pool
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _check_shared(folder: Any) -> None:
    """UsageError where a process does not see the folder that process 0 has claimed."""
    for _ in range(30):  # seconds until a network disk shows it
        if (folder / "sampling.json").exists():
            return
        time.sleep(1)
    fix = f"is another folder for process {jax.process_index()}: give one that all processes share"
    raise UsageError("--out", folder, fix)


def _finish(
    sampler: CheckpointSampler, folder: Any, files: list[Any], conditions: Any,
    npz: str | None, **asked: str,
) -> list[str]:  # fmt: skip
    """Writes what is of all images; returns their names."""
    model = sampler.experiment.model
    if "prompts" not in asked:
        names = model.describe_conditions(conditions, sampler.class_names)
        arrays = model.named_arrays(conditions)
    else:
        names = sampler.texts(len(files), asked["prompts"])
        arrays = {"prompts": np.array(names)}
        with new_file(folder / "prompts.txt") as stream:  # one a line, as the images
            stream.write("".join(f"{line}\n" for line in names).encode())
    leaves = jax.tree.leaves(conditions)
    told = zip(*([row.tobytes() for row in leaf] for leaf in leaves), strict=True)
    with new_file(folder / "grid.png") as stream:
        save_png(stream, _grid(files, names if "prompts" in asked else told, names))
    if npz is not None:
        _write_npz(npz, files, arrays)
    return names


def _grid(files: list[Any], of: Iterable[Any], names: list[str]) -> np.ndarray:
    """All images, or the first of each of those that `of` calls the same, with their names."""
    groups: dict[Any, list[int]] = {}
    for i, key in enumerate(of):
        groups.setdefault(key, []).append(i)
    each = len(files) if len(files) <= _IN_GRID else max(1, _IN_GRID // len(groups))
    picked = [indices[:each] for indices in groups.values()][:_GROUPS_IN_GRID]
    shown = sum(map(len, picked))
    title = f"{shown:,} of {len(files):,} images" if shown < len(files) else ""
    pictures = _pictures([files[i] for indices in picked for i in indices])
    images = [np.stack([next(pictures) for _ in indices]) for indices in picked]
    return image_grid(images, [names[indices[0]] for indices in picked], title)


def check_outputs(out: str, npz: str | None, overwrite: bool, latents: bool = False) -> None:
    """UsageError unless `save` can write there; it is cheap, and comes first."""
    if latents and is_remote(out):
        fix = "cannot have latents.npy, which is written row by row: give a local folder"
        raise UsageError("--out", out, fix)
    folder = as_path(out)
    if folder.is_file() or (not folder.is_dir() and os.path.lexists(folder)):
        raise UsageError("--out", out, "is a file: name a folder")
    if npz is not None:
        result_path(npz, "", "--npz", overwrite)
    found = names_in(folder)
    if others := [name for name in found if not _OURS.fullmatch(name)]:
        fix = f"holds other files ({len(others)}, such as {min(others)}): give a new folder"
        raise UsageError("--out", out, fix)
    if any(name[0].isdigit() for name in found) and "sampling.json" not in found:
        fix = "holds images but no sampling.json to say how they were made: give another folder"
        raise UsageError("--out", out, fix)


def _claim_folder(folder: Any, settings: dict[str, Any]) -> bool:
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
    was, now, defaults = flatten(was), flatten(now), flatten(DEFAULTS)
    was = {n: defaults[n] for n in now if n in defaults} | was  # of fields that are new
    names = [n for n in {**was, **now} if n.split(".")[-1] not in ("ckpt", "path", "prompts")]
    both = [(n, was.get(n), now.get(n)) for n in names if was.get(n) != now.get(n)]
    return "; ".join(f"{n} was {str(old)[:40]}, is {str(new)[:40]}" for n, old, new in both[:5])


def _pictures(files: list[Any]) -> Iterator[np.ndarray]:
    """Pictures in their order, read ahead: an answer of a bucket takes its time."""

    def load(file: Any) -> np.ndarray:
        with opened(file) as stream:
            return load_png(stream)

    with _threads() as pool:
        for start in range(0, len(files), _READ):
            yield from pool.map(load, files[start : start + _READ])


def _write_npz(path: str, files: list[Any], arrays: dict[str, np.ndarray]) -> None:
    """Writes arr_0 (uint8 images), image by image: 50,000 need no memory; and other arrays."""
    shape = (len(files), *next(_pictures(files[:1])).shape)
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with new_file(path) as stream, zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as entry:
            np.lib.format.write_array_header_1_0(entry, header)
            for picture in _pictures(files):
                entry.write(picture.tobytes())
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w") as entry:
                np.lib.format.write_array(entry, array)
