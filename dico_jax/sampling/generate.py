"""Images from noise, batch by batch.

Image i of a seed is the same whatever the batch size, the devices, or an interruption: all its
noise follows from (seed, i).
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dico_jax.diffusion import SamplingOptions
from dico_jax.errors import TrainingStopped
from dico_jax.models.block_stacks import whole_where_used
from dico_jax.parallel.mesh import batch_sharding, from_same, replicated
from dico_jax.sampling.programs import (
    Noise,
    check_guidance,
    guided_steps,
    make_programs,
    steps_at_a_time,
)

GenerateFn = Callable[..., tuple[jax.Array, ...]]  # of `make_generate_fn`
Progress = Callable[[float], object]  # is told how many more images have been made
_MOST_AHEAD = 20  # marks that a device is sent work for before one is waited for


class NotFiniteError(TrainingStopped):
    """Images, or a score of them, that are NaN or infinite, and are not shown as if they were."""


def make_generate_fn(
    model,
    objective,
    autoencoder,
    latent_shape,
    options: SamplingOptions,
    mesh: Mesh,
    *,
    load=True,
    guide=None,
    with_latents=False,
) -> GenerateFn:
    """The jitted function (params, indices (N,), conditions) -> images, and which are finite.

    Those are uint8 (N, H, W, C) and bool (N,). Conditions are a tree of arrays (N, ...), see
    `Denoiser`. N must divide over the mesh, see `generate_batches`. It takes `seed` and `cfg_scale`
    in place of the options' and compiles for neither, but once for a scale of 1 and once for all
    others; `guide_params`; and `mark`, which is called with an array that is there when some of the
    steps of some images are done, and which share of all steps of all images these are.

    Args:
      model: the network.
      objective: with the steps of sampling.
      autoencoder: an `Autoencoder`; its weights are put on the devices once.
      latent_shape: (H, W, C) of the network's input.
      options: how to sample; guidance without a null condition is a UsageError.
      mesh: images are split over it.
      load: reads the autoencoder's weights now; False leaves that, and what may be wrong with
        them, to the first images.
      guide: a weaker network for autoguidance, see `make_latents_fn`.
      with_latents: gives the latents as well, float32 (N, H, W, C).
    """
    what = model, objective, autoencoder, latent_shape, options, mesh
    programs = make_programs(*what, guide=guide)
    split, whole = batch_sharding(mesh), replicated(mesh)
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    size = images_at_a_time(latent_shape) * mesh.size if on_cpu else None
    keep = jax.jit(lambda latents: latents.astype(jnp.float32), out_shardings=whole)
    # An argument and no constant: XLA would fold and copy 300 MB of constants.
    decoder_params = functools.cache(lambda: jax.device_put(autoencoder.params, whole))
    if load:
        decoder_params()

    def landed(found):
        # XLA for CPU has a thread per core for all programs of all devices that are ready. One that
        # waits for another device would wait for those that were sent after it, or for ever.
        return jax.block_until_ready(found) if on_cpu else found

    def call(
        params, indices, conditions, *, seed=None, cfg_scale=None, guide_params=None, mark=None
    ):
        changed = {"seed": seed, "cfg_scale": cfg_scale}
        how = dataclasses.replace(options, **{k: v for k, v in changed.items() if v is not None})
        scales = how.scales(objective)
        kind, count = guided_steps(scales), len(scales) - 1
        check_guidance(model, kind, how.cfg_scale, guide)
        # Sent to the devices once, and not by each of the programs.
        params = jax.tree.map(
            lambda a: a if isinstance(a, jax.Array) else jax.device_put(a, whole), params
        )
        params = whole_where_used(params, model, jax.tree.map(lambda a: a.sharding, params))
        told = model.from_read(model.as_condition(conditions))
        each = steps_at_a_time(count)
        share = each / count / (1 if size is None else -(-len(indices) // size))

        def part(rows):
            spread = jax.tree.map(lambda leaf: from_same(leaf[rows], split), (indices, told))
            noise = Noise(np.uint32(how.seed), spread[0])
            given = params, noise, np.float32(scales), guide_params
            of, x = programs.begin(*given, spread[1], None, kind)
            for i in range(count - 1, -1, -each):
                x, _, done = programs.advance(*given, of, x, np.int32(i), each, kind)
                landed(done)
                if mark is not None:
                    mark(done, share)
            latents = programs.end(*given, of, x, kind)
            images = landed(programs.decode(decoder_params(), latents))
            return (*images, landed(keep(latents))) if with_latents else images

        return _in_parts(part, len(indices), size)

    return call


def images_at_a_time(latent_shape: tuple[int, int, int]) -> int:
    """How many images a CPU device makes at a time, whatever the batch: of 1,024 positions.

    XLA for CPU rounds the sums of other shapes differently, and is as fast with these.
    """
    return max(1, 1024 // (latent_shape[0] * latent_shape[1]))


def _in_parts(part: Callable[..., Any], count: int, size: int | None) -> Any:
    """Rows 0 to count - 1 of arrays that part(numbers of rows) gives, `size` rows at a time."""
    if size is None:
        return part(slice(None))
    rows = np.minimum(np.arange(-(-count // size) * size), count - 1).reshape(-1, size)
    return jax.tree.map(lambda *a: jnp.concatenate(a)[:count], *map(part, rows))


def generate_images(
    generate: GenerateFn, params, conditions: Any, batch_size: int, num_devices: int,
    start: int = 0, progress: Progress | None = None,
) -> Iterator[np.ndarray]:  # fmt: skip
    """Images start, ... of `generate_batches`, uint8 (n, H, W, C); NotFiniteError for bad ones."""
    indices = np.arange(start, len(jax.tree.leaves(conditions)[0]))
    given = generate, params, conditions, batch_size, num_devices, indices, progress
    for part, images, finite in generate_batches(*given):
        check_finite(part[~finite], len(part))
        yield images


def generate_batches(
    generate: GenerateFn, params, conditions: Any, batch_size: int, num_devices: int, indices: Any,
    progress: Progress | None = None,
) -> Iterator[tuple[np.ndarray, ...]]:  # fmt: skip
    """Of images `indices` (N,), their numbers (n,), uint8 (n, H, W, C), and which are finite (n,).

    Then what else `generate` gives. The devices make a batch while the caller has the one before.

    `conditions` are a tree of arrays (N, ...), those of every image from 0 on. Every batch has one
    size on the devices, a multiple of num_devices; what is over at the end is cut off. `progress`
    is told of steps: some of a batch are worth as many images as they are a share of its work.
    """
    count = max(1, len(jax.tree.leaves(conditions)[0]))
    size = -(-min(batch_size, count) // num_devices) * num_devices
    ahead = collections.deque[tuple[np.ndarray, Any]]()
    marks = collections.deque[tuple[np.ndarray, Any, float]]()  # with the batch they are of

    def wait() -> None:
        _, done, images = marks.popleft()
        done.block_until_ready()
        if progress is not None:
            progress(images)

    def send(part: np.ndarray) -> Any:
        def mark(done: Any, share: float) -> None:
            marks.append((part, done, share * len(part)))
            while marks and (len(marks) > _MOST_AHEAD or marks[0][1].is_ready()):
                wait()

        padded = np.pad(part, (0, size - len(part)), mode="edge")
        told = jax.tree.map(lambda leaf: leaf[padded], conditions)
        return generate(params, padded, told, mark=mark)

    def finished() -> tuple[np.ndarray, ...]:
        part, made = ahead.popleft()
        while marks and marks[0][0] is part:
            wait()
        return part, *(array[: len(part)] for array in jax.device_get(made))

    for first in range(0, len(indices), size):
        part = np.asarray(indices[first : first + size], np.int32)
        ahead.append((part, send(part)))
        if len(ahead) > 1:
            yield finished()
    if ahead:
        yield finished()


def check_finite(bad: Sequence[int] | np.ndarray, count: int) -> None:
    """NotFiniteError if there are `bad` images, by their numbers, among `count`."""
    if len(bad):
        listed = ", ".join(map(str, bad[:10])) + ", ..." * (len(bad) > 10)
        fix = "use the weights of another step, a lower guidance scale, or model.dtype float32"
        raise NotFiniteError(f"{len(bad)} of {count} images are not finite ({listed}): {fix}")
