"""From a source to batches, on Grain, in an order that is a function of (seed, step).

Every epoch is shuffled anew. Batch k is the k-th `batch_size` examples of the endless sequence.
"""

import contextlib
import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np
from absl import flags

from dico_jax.data.bad_examples import BadExampleLog, too_many_bad
from dico_jax.data.pictures import BadExample
from dico_jax.data.sources import Source
from dico_jax.errors import TrainingStopped
from dico_jax.files import is_remote

# Makes the array of an example's image, mirrored or not: `PictureReader`, `read_orientation`.
Reader = Callable[[Any, bool], np.ndarray]
# Makes what the network is told of an example: arrays by name, of one shape for every example.
ConditionReader = Callable[[dict[str, Any]], dict[str, np.ndarray]]

_BATCHES_AHEAD = 2  # of every worker, and on the devices
_EXAMPLES_AHEAD = 8192  # about, of a bucket, which is asked by at most 64 threads


def read_orientation(image: np.ndarray, mirrored: bool) -> np.ndarray:
    """Latents or moments (h, w, C), or of (1 or 2, h, w, C) orientations the one asked for."""
    if image.ndim == 3:  # mirrored itself, which is right for pixels only
        return image[:, ::-1] if mirrored else image
    return image[int(mirrored)]


def read_label(example: dict[str, Any]) -> dict[str, np.ndarray]:
    """The class of an example as a condition: {"label": int32 ()}."""
    return {"label": np.asarray(example["label"], np.int32)}


def one_caption(example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """The example with one of its captions, and the features of that one, drawn anew each visit."""
    captions = example.get("captions")
    if not isinstance(captions, list | tuple) or not captions:
        return example  # or a field of that name that means something else
    drawn = slice(k := int(rng.integers(len(captions))), k + 1)
    kept = {n: example[n][drawn] for n in ("captions", "tokens", "pooled") if n in example}
    return example | kept


def training_batches(
    source: Source,
    read: Reader,
    read_condition: ConditionReader,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    horizontal_flip: bool = False,
    max_bad_fraction: float = 0.0,
    num_workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.IterDataset:
    """This process's part of every batch from `start_step` on, without end.

    Batch k of H processes is that of one, cut into equal blocks of rows. n = batch_size / H:
    {"image": (n, ...) as `read` makes them, "condition": {name: (n, ...)}, "index": int32 (n,) in
    the source, "mirrored": bool (n,), "skipped": int32 (n,), how many examples just before this one
    in the source were bad}. More bad ones in a row than max_bad_fraction of all are an error.
    `num_workers` processes read, or threads of this one.
    """
    count = len(source)

    def load(index: int, rng: np.random.Generator) -> dict[str, Any]:
        # What takes a bad one's place depends on the source alone, so every process agrees.
        mirrored = horizontal_flip and rng.random() < 0.5
        bad: dict[str, str] = {}
        while len(bad) <= max_bad_fraction * count:
            position = (int(index) + len(bad)) % count
            try:
                example = one_caption(source[position], rng)
                return {
                    "image": read(example["image"], mirrored),
                    "condition": read_condition(example),
                    "index": np.int32(position),
                    "mirrored": np.bool_(mirrored),
                    "skipped": np.int32(len(bad)),
                }
            except BadExample as error:
                bad[source.example_id(position)] = str(error)
        raise too_many_bad(bad, count, max_bad_fraction)

    dataset = grain.MapDataset.range(count).seed(seed).shuffle()
    dataset = dataset.repeat(2**48 // count + 1).random_map(load)  # Grain cuts no endless one
    size = batch_size // process_count
    dataset = dataset.batch(size)[process_index::process_count]
    # A start by position, not by a saved state of Grain: that one depends on the workers.
    waits = is_remote(getattr(source, "path", None) or "")
    threads = max(16, min(_EXAMPLES_AHEAD // size, 64)) if waits else None
    return read_ahead(dataset[start_step:], num_workers, threads)


def read_ahead(
    dataset: grain.MapDataset, num_workers: int, threads: int | None = None
) -> grain.IterDataset:
    """Reads batches in threads of this process, or in worker processes, in their order.

    `threads` is how many, over all workers, where they wait for others more than they compute.
    """
    if num_workers == 0:
        threads = threads or min(os.cpu_count() or 1, 16)  # each reads a batch
        return dataset.to_iter_dataset(grain.ReadOptions(threads, threads + _BATCHES_AHEAD))
    flags.FLAGS.mark_as_parsed()  # Grain's workers read flags, also where there are none
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")  # it cleans up after a kill
    each = max(1, (threads or 1) // num_workers)
    return dataset.to_iter_dataset(grain.ReadOptions(each, each)).mp_prefetch(
        grain.MultiprocessingOptions(num_workers, per_worker_buffer_size=_BATCHES_AHEAD),
        worker_init_fn=_end_with_parent,
    )


def _end_with_parent(worker: int, num_workers: int) -> None:
    parent: Any = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


class DeviceBatches(Iterator, contextlib.AbstractContextManager):
    """Batches of `training_batches`, put on the devices by a thread ahead of their use.

    A context manager, which ends all workers. `put` makes global arrays, `log` notes "skipped".
    """

    def __init__(self, batches: grain.IterDataset, put: Callable[[Any], Any], log: BadExampleLog):
        def to_devices(batch: dict) -> tuple[Any, np.ndarray, np.ndarray]:
            index, skipped = batch["index"], batch.pop("skipped")
            return put(batch), index, skipped

        ahead = grain.experimental.ThreadPrefetchIterDataset
        self._iterator = iter(ahead(batches.map(to_devices), prefetch_buffer_size=_BATCHES_AHEAD))
        self._log, self.waited = log, 0.0  # seconds, for the newest batch
        self.waits = False  # a signal's handler may raise StopIteration then: reading may hang
        # Signals to a whole group are for the main thread; other threads and workers inherit this.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM])
        self._iterator.start_prefetch()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def __next__(self) -> Any:
        start = time.monotonic()
        try:
            self.waits = True
            arrays, index, skipped = next(self._iterator)
        except RuntimeError as error:
            if not (found := re.search("Worker process.* (code .?[0-9]+)", str(error))):
                raise
            fix = "the same command goes on; --config.data.num_workers=1 or 0 needs less memory"
            text = f"a worker that reads data is gone ({found[1]}): {fix}"
            raise TrainingStopped(text) from error
        finally:
            self.waits = False
        self.waited = time.monotonic() - start
        self._log.add_skipped(index, skipped)
        return arrays

    def __exit__(self, *exc):
        closing = threading.Thread(target=self._iterator.close, daemon=True)  # it may hang
        closing.start()
        closing.join(5)
