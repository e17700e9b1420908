"""How fast examples are read: prepared latents, and JPEGs against Pillow alone.

    python benchmarks/data_throughput.py [--pictures=FOLDER] [--rounds=3]

Latents: 256x256 pictures' moments, both orientations, of random numbers, are read, put on the
devices, drawn from and waited for, in batches of 256. JPEGs: the pictures of FOLDER (a subfolder
per class) are decoded and cropped to 256x256, by a process per core that does nothing else, and by
the training pipeline, batches included; in turns, and the middle one of the rounds counts.
"""

import functools
import multiprocessing
import os
import pathlib
import statistics
import tempfile
import time

import jax
import numpy as np
from absl import app, flags
from etils import epath
from PIL import Image

from dico_jax.autoencoders import Autoencoder, make_latents_fn
from dico_jax.data.bad_examples import BadExampleLog
from dico_jax.data.latent_preparation import write_manifest, write_shard
from dico_jax.data.latents import Plan, PreparedLatents
from dico_jax.data.pictures import PictureReader
from dico_jax.data.pipeline import DeviceBatches, read_label, read_orientation, training_batches
from dico_jax.parallel.mesh import batch_sharding, create_mesh, to_global

_PICTURES = flags.DEFINE_string("pictures", None, "Folder of JPEGs, a subfolder per class.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "How often each is measured.")
_NUM_PICTURES = flags.DEFINE_integer("num_pictures", 1280, "JPEGs of a round.")

_SIZE, _BATCH = 256, 256


def write_latents(folder: str, num_examples: int = 8192) -> PreparedLatents:
    """A folder of latents of random numbers."""
    plan = Plan("random", "", num_examples, _SIZE, False, "sd_vae", "", (2, 32, 32, 8), "float16",
                4096, tuple(map(str, range(1000))))  # fmt: skip
    rng = np.random.default_rng(0)
    for shard, part in enumerate(plan.shards):
        examples = (
            ((f"example/{i}", {"label": i % 1000}, None), rng.normal(size=plan.shape)) for i in part
        )
        write_shard(epath.Path(folder), plan, shard, examples, {})
    write_manifest(epath.Path(folder), plan, {})
    return PreparedLatents(folder)


def latents_per_second(source: PreparedLatents, num_workers: int, num_batches: int = 100) -> float:
    """Examples per second that are read, drawn and ready on the devices."""
    mesh = create_mesh()
    preview = Autoencoder("latent_preview", 8, 4, decode=lambda params, x: x)
    to_latents = make_latents_fn("moments", preview, latent_sampling="sample", seed=0, mesh=mesh)
    stream = training_batches(
        source, read_orientation, read_label, batch_size=_BATCH, seed=0, horizontal_flip=True,
        num_workers=num_workers,
    )  # fmt: skip
    put = functools.partial(to_global, sharding=batch_sharding(mesh))
    with DeviceBatches(stream, put, BadExampleLog(source, read_orientation, 0.0)) as batches:
        for step in range(10):  # workers start, the draw compiles, buffers empty to their usual
            jax.block_until_ready(to_latents(next(batches), np.int32(step)))
        start = time.perf_counter()
        for step in range(num_batches):
            jax.block_until_ready(to_latents(next(batches), np.int32(step)))
        return num_batches * _BATCH / (time.perf_counter() - start)


def pillow_crop(path: str) -> int:
    """What the published code does to a picture, in Pillow's words; returns a byte of it."""
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    while min(image.size) >= 2 * _SIZE:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = _SIZE / min(image.size)
    image = image.resize(
        (round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC
    )
    array = np.asarray(image)
    top, left = (array.shape[0] - _SIZE) // 2, (array.shape[1] - _SIZE) // 2
    return int(array[top : top + _SIZE, left : left + _SIZE].copy()[0, 0, 0])


def pillow_per_second(pool, files: list[str], num_pictures: int) -> float:
    """Pictures per second of Pillow alone, a process per core."""
    todo = [files[i % len(files)] for i in range(num_pictures)]
    start = time.perf_counter()
    for _ in pool.imap_unordered(pillow_crop, todo, chunksize=16):
        pass
    return num_pictures / (time.perf_counter() - start)


def pipeline_per_second(source, num_workers: int, num_pictures: int, batch_size: int = 64) -> float:
    """Pictures per second that come out of the training pipeline in batches."""
    read = PictureReader(_SIZE, 3)
    stream = iter(
        training_batches(
            source, read, read_label, batch_size=batch_size, seed=0, num_workers=num_workers
        )
    )
    # What was read ahead before the clock starts is made up for by what is read ahead at its end.
    for _ in range(4):
        next(stream)
    start = time.perf_counter()
    for _ in range(num_pictures // batch_size):
        next(stream)
    rate = num_pictures // batch_size * batch_size / (time.perf_counter() - start)
    stream.close()
    return rate


def report(name: str, rates: list[float], bar: str = "") -> float:
    """Prints the middle rate and returns it."""
    middle = statistics.median(rates)
    print(f"{name}: {middle:,.0f} per second (of {', '.join(f'{r:,.0f}' for r in rates)}) {bar}")
    return middle


def main(_):
    """Measures and prints."""
    rounds = range(_ROUNDS.value)
    print(f"{os.cpu_count()} cores, {jax.devices()[0].device_kind} x {jax.device_count()}")
    with tempfile.TemporaryDirectory() as folder:
        source = write_latents(folder)
        for workers in (0, 2):
            rates = [latents_per_second(source, workers) for _ in rounds]
            report(f"prepared latents, num_workers={workers}", rates, "bar: 5,000")
    if _PICTURES.value is None:
        return
    from dico_jax.data.class_files import FolderSource

    pictures = FolderSource(_PICTURES.value)
    files = sorted(str(path) for path in pathlib.Path(_PICTURES.value).glob("*/*"))
    cores = os.cpu_count() or 1
    rates: dict[str, list[float]] = {}
    with multiprocessing.get_context("spawn").Pool(cores) as pool:
        pillow_per_second(pool, files, 64)
        for _ in rounds:
            rates.setdefault("Pillow alone", []).append(
                pillow_per_second(pool, files, _NUM_PICTURES.value)
            )
            for workers in (0, cores):
                rates.setdefault(f"pipeline, num_workers={workers}", []).append(
                    pipeline_per_second(pictures, workers, _NUM_PICTURES.value)
                )
    alone = report("Pillow alone", rates.pop("Pillow alone"))
    for name, values in rates.items():
        middle = report(name, values)
        print(f"  {middle / alone:.2f} of Pillow alone, bar: 0.8")


if __name__ == "__main__":
    app.run(main)
