"""From a source to batches, on Grain, in an order that is a function of (seed, step).

Every epoch is shuffled anew. Batch k of the run is made of the k-th `batch_size` examples of the
endless shuffled sequence, whatever the number of processes: process h of H takes every H-th of
them. So the position of a run is its step, and a checkpoint needs no other data state.
"""

from collections.abc import Iterator

import grain
import numpy as np

from dico_jax.data.sources import Source


def to_model_range(image: np.ndarray) -> np.ndarray:
    """uint8 pixels to float32 in [-1, 1]; latents (any float dtype) to float32 as they are."""
    if image.dtype == np.uint8:
        return image.astype(np.float32) / np.float32(127.5) - np.float32(1)
    return image.astype(np.float32)


def prepare_example(example: dict, rng: np.random.Generator, horizontal_flip: bool) -> dict:
    """One example for training: mirrored with probability 1/2 if asked, in the model's range.

    Returns:
      {"x": float32 (H, W, C), "y": int32 label}.
    """
    image = example["image"]
    mirrored = horizontal_flip and rng.random() < 0.5
    if image.ndim == 4:  # a pair of orientations
        image = image[int(mirrored)]
    elif mirrored:
        image = image[:, ::-1]
    return {"x": to_model_range(image), "y": np.int32(example["label"])}


def training_batches(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    horizontal_flip: bool = False,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
    """This process's part of every batch from `start_step` on, without end.

    Args:
      source: the examples.
      batch_size: examples per step over all processes; divides by process_count.
      seed: decides the order and the mirroring.
      start_step: number of batches already used.
      horizontal_flip: see `prepare_example`.
      process_index, process_count: which part.

    Yields:
      {"x": float32 (batch_size / process_count, H, W, C), "y": int32 (batch_size / process_count,)}
    """
    dataset = (
        grain.MapDataset.source(source)
        .seed(seed)
        .shuffle()
        .repeat(None)
        .random_map(lambda example, rng: prepare_example(example, rng, horizontal_flip))
    )
    dataset = dataset[process_index::process_count].batch(batch_size // process_count)
    iterator = iter(dataset.to_iter_dataset())
    state = iterator.get_state()
    if set(state) != {"next_index"}:
        raise RuntimeError(f"Grain's iterator state {state} is not a plain position any more")
    iterator.set_state({"next_index": start_step})
    return iterator
