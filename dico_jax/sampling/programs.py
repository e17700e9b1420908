"""The jitted programs of the sampler: noise and conditions, some steps of a solver, the decoder."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dico_jax import diffusion
from dico_jax.autoencoders import to_uint8
from dico_jax.diffusion import Objective, SamplingOptions
from dico_jax.errors import UsageError
from dico_jax.ops.cpu import compiler_options
from dico_jax.parallel.mesh import batch_sharding, replicated

_MARKS = 16  # of an image at most, by which it can be seen how far it is


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

    begin: Any
    advance: Any
    end: Any
    decode: Any


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
    the next x, the latents as they were last predicted, and numbers that are there when they are;
    each count compiles. `end` gives the latents (N, H, W, C) of what is told and x. `decode`, of
    (decoder_params, latents), gives the images, uint8, and which are finite, to every process.
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
        lie = shardings(x, mesh, len(noise.indices))
        return told, jax.lax.with_sharding_constraint(x, lie)

    def advance(params, noise, scales, guide_params, told, x, i, count, kind):
        loop = solver(params, noise, scales, guide_params, told, kind)

        def step(done, carry):
            x, point = loop.step(carry[0], i - done)
            return x, point.pred_x0.astype(carry[1].dtype)

        # A loop of so many steps: XLA for GPU asks the host after each where it does not know.
        carry = jax.lax.fori_loop(0, count, step, (x, jnp.zeros_like(loop.end(x))))
        lie = shardings(carry, mesh, len(noise.indices))
        x, predicted = jax.lax.with_sharding_constraint(carry, lie)
        return x, predicted, predicted[:, 0, 0, 0]

    def end(params, noise, scales, guide_params, told, x, kind):
        return solver(params, noise, scales, guide_params, told, kind).end(x)

    def jitted(function, *lie, **how):
        options = compiler_options(mesh.devices.flat[0].platform)
        return jax.jit(function, in_shardings=lie, compiler_options=options, **how)

    # The network's parameters stay as they lie: a run may share them among devices.
    given = None, Noise(whole, split, whole, split), whole, None
    return Programs(
        jitted(begin, *given, split, split, static_argnums=6),
        jitted(advance, *given, None, None, whole, static_argnums=(7, 8), donate_argnums=5),
        jitted(end, *given, None, None, static_argnums=6),
        jitted(functools.partial(_images, autoencoder), whole, split, out_shardings=whole),
    )


def shardings(tree: Any, mesh: Mesh, number: int) -> Any:
    """How arrays lie: split where they have a row for each of so many images, others whole."""
    split, whole = batch_sharding(mesh), replicated(mesh)
    return jax.tree.map(lambda a: split if a.shape[:1] == (number,) else whole, tree)


def steps_at_a_time(count: int) -> int:
    """The fewest steps that divide `count` into at most `_MARKS` equal parts."""
    return count // max(parts for parts in range(1, _MARKS + 1) if count % parts == 0)


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
