"""Images from noise: the sampler, the network and the autoencoder, jitted, batch by batch.

Image i of a seed is the same whatever the batch size, the devices, or an interruption: all its
noise follows from (seed, i).
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dico_jax import diffusion
from dico_jax.autoencoders import to_uint8
from dico_jax.diffusion import Objective, SamplingOptions
from dico_jax.errors import TrainingStopped, UsageError
from dico_jax.models.block_stacks import whole_where_used
from dico_jax.ops.cpu import compiler_options
from dico_jax.parallel.mesh import batch_sharding, from_same, replicated

GenerateFn = Callable[..., tuple[jax.Array, ...]]  # of `make_generate_fn`
_MARKS = 10  # of a batch at most, by which it can be seen how far it is
_UNSEEN: Callable[[float], object] = lambda _: None  # noqa: E731


class NotFiniteError(TrainingStopped):
    """Images, or a score of them, that are NaN or infinite, and are not shown as if they were."""


def guided_steps(scales: np.ndarray) -> str:
    """Of the guidance scales at all points: whether "all" steps, "some" or "none" have guidance."""
    guided = np.asarray(scales)[1:] != 1  # no step starts at clean data
    return "all" if guided.all() else "some" if guided.any() else "none"


def make_latents_fn(
    model: Any,
    objective: Objective,
    latent_shape: tuple[int, int, int],
    options: SamplingOptions,
    *,
    guide: Any = None,
    return_trajectory: bool = False,
) -> Callable[..., Any]:
    """The function (params, indices (N,), conditions) -> latents (N, H, W, C), to be jitted.

    It also takes `seed` () and `scales` (T + 1,), see `SamplingOptions.scales`, in place of those
    of the options, with `steps`, what `guided_steps` says of these; and `guide_params`, of `guide`,
    a weaker network, which the samples are guided away from in place of the null condition. With
    `return_trajectory` it gives the latents and the predicted x_0 of all steps, (T, N, H, W, C).
    """
    own = options.scales(objective)
    check_guidance(model, guided_steps(own), options.cfg_scale, guide)
    encode, model_fn = _network_fns(model, latent_shape, options, guide)

    def sample_latents(
        params, indices, conditions, seed=None, scales=None, steps=None, guide_params=None
    ):
        scales, steps = (own, guided_steps(own)) if scales is None else (scales, steps)
        keys = diffusion.image_keys(options.seed if seed is None else seed, indices)
        told = encode(params, conditions, guide_params, steps)
        samples = diffusion.sample_loop(
            objective,
            model_fn(params, told, guide_params, scales, steps),
            diffusion.initial_noise(keys, latent_shape),
            lambda i: diffusion.step_noise(keys, i, latent_shape),
            sampler=options.sampler,
            eta=options.ddim_eta,
            scales=None if steps == "none" else scales,
            return_trajectory=return_trajectory,
        )
        return (samples[0], samples[1].pred_x0) if return_trajectory else samples

    return sample_latents


def _network_fns(model, latent_shape, options, guide) -> tuple[Callable[..., Any], ...]:
    """What follows from the conditions alone, and with that the network as solvers call it."""

    def encode(params, conditions, guide_params, steps):
        plain, of_guide = steps == "none", None
        if guide is not None and not plain:
            of_guide = guide.encode_condition(guide_params, conditions)
        null = None if plain or guide is not None else model.null_condition(1)
        told, nothing = (None if c is None else model.encode_condition(params, c)
                         for c in (conditions, null))  # fmt: skip
        return told, nothing, of_guide

    def model_fn(params, encoded, guide_params, scales, steps):
        (told, nothing, of_guide), weak_fn = encoded, None
        if of_guide is not None:
            weak_fn = functools.partial(_apply, guide, guide_params, condition=of_guide)
        return diffusion.guided_model_fn(
            functools.partial(_apply, model, params),
            told,
            nothing,
            1 if steps == "none" else scales,
            num_channels=latent_shape[-1],
            cfg_channels=options.cfg_channels,
            rescale=options.cfg_rescale,
            weak_fn=weak_fn,
            always=steps == "all",
        )

    return encode, model_fn


class Programs(NamedTuple):
    """Jitted parts of a sampler, see `make_programs`."""

    begin: Callable[..., Any]
    advance: Callable[..., Any]
    end: Callable[..., Any]
    decode: Callable[..., Any]


class Walk(NamedTuple):
    """Of N images the way from conditions and noise to others, as arguments of `Programs.begin`."""

    conditions: Any  # of the end, as those of the start
    shares: Any  # (N,), 0 at the start and 1 at the end


class Noise(NamedTuple):
    """What the noise of N images follows from: a draw, or the mixture of two.

    cos(angle) and sin(angle) of two draws make one that is as normal as they are.
    """

    seed: Any  # ()
    indices: Any  # (N,)
    other_seed: Any = None
    angles: Any = None  # (N,) in radians

    def draw(self, of: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """The noise (N, H, W, C) that a function of the images' keys draws."""
        noise = of(diffusion.image_keys(self.seed, self.indices))
        if self.other_seed is None:
            return noise
        other = of(diffusion.image_keys(self.other_seed, self.indices))
        angles = jnp.reshape(self.angles, (-1, 1, 1, 1))
        return jnp.cos(angles) * noise + jnp.sin(angles) * other


def make_programs(
    model: Any, objective: Objective, autoencoder: Any, latent_shape: tuple[int, int, int],
    options: SamplingOptions, mesh: Mesh, *, guide: Any = None,
) -> Programs:  # fmt: skip
    """What makes images, some steps at a time: so it can be seen how far it is.

    All but `decode` take (params, `Noise`, scales (T + 1,), guide_params), with arrays (N, ...)
    split over the mesh, and as their last what `guided_steps` says of the scales. Between these
    `begin` takes the conditions, and None or a `Walk`, and gives what is told and the carry x;
    `advance` these with i, from T - 1 to 0, and count: it runs steps i to i - count + 1 and gives
    the next x, the latents as they were last predicted, and a number that is there when they are;
    `end` gives the latents (N, H, W, C) of what is told and x. `decode`, of (decoder_params,
    latents), gives the images, uint8, and which are finite, to every process.
    """
    check_guidance(model, guided_steps(options.scales(objective)), options.cfg_scale, guide)
    encode, model_fn = _network_fns(model, latent_shape, options, guide)
    split, whole = batch_sharding(mesh), replicated(mesh)

    def solver(params, noise, scales, guide_params, told, kind):
        network = model_fn(params, told, guide_params, scales, kind)
        path = diffusion.Path(objective, network, scales=None if kind == "none" else scales)

        def noise_fn(i):
            return noise.draw(lambda keys: diffusion.step_noise(keys, i, latent_shape))

        return diffusion.solver_loop(path, noise_fn, options.sampler, options.ddim_eta)

    def begin(params, noise, scales, guide_params, conditions, walk, kind):
        told = encode(params, conditions, guide_params, kind)
        if walk is not None:
            ends = encode(params, walk.conditions, guide_params, kind)
            told = tuple(
                None if start is None else of.mixed_conditions(start, end, walk.shares)
                for of, start, end in zip((model, model, guide), told, ends, strict=True)
            )
        x = noise.draw(lambda keys: diffusion.initial_noise(keys, latent_shape))
        x = solver(params, noise, scales, guide_params, told, kind).begin(x)
        return told, jax.lax.with_sharding_constraint(x, split)

    def advance(params, noise, scales, guide_params, told, x, i, count, kind):
        loop = solver(params, noise, scales, guide_params, told, kind)

        def step(done, carry):
            x, point = loop.step(carry[0], i - done)
            return x, point.pred_x0

        x, predicted = jax.lax.fori_loop(0, count, step, (x, jnp.zeros_like(loop.end(x))))
        x = jax.lax.with_sharding_constraint(x, split)
        return x, predicted, predicted[0, 0, 0, 0]

    def end(params, noise, scales, guide_params, told, x, kind):
        return solver(params, noise, scales, guide_params, told, kind).end(x)

    def jitted(function, *lie, **how):
        options = compiler_options(mesh.devices.flat[0].platform)
        return jax.jit(function, in_shardings=lie, compiler_options=options, **how)

    # The network's parameters stay as they lie: a run may share them among devices.
    given = None, Noise(whole, split, whole, split), whole, None
    return Programs(
        jitted(begin, *given, split, split, static_argnums=6),
        jitted(advance, *given, None, None, whole, whole, static_argnums=8, donate_argnums=5),
        jitted(end, *given, None, None, static_argnums=6),
        jitted(functools.partial(_images, autoencoder), whole, split, out_shardings=whole),
    )


def _images(autoencoder: Any, decoder_params: Any, latents: jax.Array) -> tuple[jax.Array, ...]:
    """Of latents the images, uint8, and which are finite."""
    decoded = autoencoder.decode(decoder_params, latents)
    finite = [jnp.isfinite(x).all(axis=(1, 2, 3)) for x in (latents, decoded)]
    return to_uint8(decoded), finite[0] & finite[1]


def _apply(model: Any, params: Any, x, t, condition) -> jax.Array:
    return model.apply({"params": params}, x, t, condition)


def check_guidance(model: Any, steps: str, cfg_scale: float, guide: Any = None) -> None:
    """Raises UsageError for guidance of a network that was never trained without its condition."""
    if steps != "none" and guide is None and model.null_condition(1) is None:
        what = "needs a model that was trained to do without its condition"
        fix = f"{what} (model.class_dropout_prob, of a text model.text_dropout_prob, above 0)"
        fix += ": use sampling.cfg_scale=1"
        raise UsageError("sampling.cfg_scale", cfg_scale, fix)


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
    others; `guide_params`; and `marks`, a list that gets a number for every tenth of the steps,
    which is there when these are done.

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

    def call(
        params, indices, conditions, *, seed=None, cfg_scale=None, guide_params=None, marks=None
    ):
        changed = {"seed": seed, "cfg_scale": cfg_scale}
        how = dataclasses.replace(options, **{k: v for k, v in changed.items() if v is not None})
        scales = how.scales(objective)
        kind, count = guided_steps(scales), len(scales) - 1
        check_guidance(model, kind, how.cfg_scale, guide)
        lie = jax.tree.map(lambda leaf: getattr(leaf, "sharding", whole), params)
        params = whole_where_used(params, model, lie)
        told = model.from_read(model.as_condition(conditions))
        some = -(-count // _MARKS)

        def part(rows):
            spread = jax.tree.map(lambda leaf: from_same(leaf[rows], split), (indices, told))
            noise = Noise(np.uint32(how.seed), spread[0])
            given = params, noise, np.float32(scales), guide_params
            of, x = programs.begin(*given, spread[1], None, kind)
            for i in range(count - 1, -1, -some):
                steps = np.int32(i), np.int32(min(some, i + 1))
                x, _, mark = programs.advance(*given, of, x, *steps, kind)
                if marks is not None:
                    marks.append(mark)
            latents = programs.end(*given, of, x, kind)
            images = programs.decode(decoder_params(), latents)
            return (*images, keep(latents)) if with_latents else images

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
    start: int = 0, progress: Callable[[float], object] = _UNSEEN,
) -> Iterator[np.ndarray]:  # fmt: skip
    """Images start, ... of `generate_batches`, uint8 (n, H, W, C); NotFiniteError for bad ones."""
    indices = np.arange(start, len(jax.tree.leaves(conditions)[0]))
    given = generate, params, conditions, batch_size, num_devices, indices, progress
    for part, images, finite in generate_batches(*given):
        check_finite(part[~finite], len(part))
        yield images


def generate_batches(
    generate: GenerateFn, params, conditions: Any, batch_size: int, num_devices: int, indices: Any,
    progress: Callable[[float], object] = _UNSEEN,
) -> Iterator[tuple[np.ndarray, ...]]:  # fmt: skip
    """Of images `indices` (N,), their numbers (n,), uint8 (n, H, W, C), and which are finite (n,).

    Then what else `generate` gives. The devices make a batch while the caller has the one before.

    `conditions` are a tree of arrays (N, ...), those of every image from 0 on. Every batch has one
    size on the devices, a multiple of num_devices; what is over at the end is cut off. `progress`
    is told, after some steps of a batch, how many images more these are worth: a tenth of it.
    """
    count = max(1, len(jax.tree.leaves(conditions)[0]))
    size = -(-min(batch_size, count) // num_devices) * num_devices
    ahead = collections.deque[tuple[np.ndarray, Any, list[jax.Array]]]()

    def finished() -> tuple[np.ndarray, ...]:
        part, made, marks = ahead.popleft()
        for mark in marks:
            mark.block_until_ready()
            progress(len(part) / len(marks))
        return part, *(array[: len(part)] for array in jax.device_get(made))

    for first in range(0, len(indices), size):
        part = np.asarray(indices[first : first + size], np.int32)
        padded = np.pad(part, (0, size - len(part)), mode="edge")
        told = jax.tree.map(lambda leaf, rows=padded: leaf[rows], conditions)
        marks: list[jax.Array] = []
        ahead.append((part, generate(params, padded, told, marks=marks), marks))
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
