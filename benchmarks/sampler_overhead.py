"""What sampling costs beside the forward passes it consists of, on all devices of this machine.

    python benchmarks/sampler_overhead.py [--model=DiCo-S --side=32 --batch=2 --steps=250]

Timed in turn, in one process: so many single forward passes, the sampler with as many steps without
guidance, with guidance, and with guidance in half of the steps (an interval of noise levels). Bars:
the sampler at most 1.03 of the forward passes, the interval at most 0.8 of full guidance.
With --digits=WORKDIR also what PNG files add to 1,000 images of a run of configs/digits.py, at
most 0.05 (its pixels need no decoder).
"""

import argparse
import pathlib
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import numpy as np

from dico_jax.ops.cpu import use_all_cores


def seconds(functions, rounds):
    """The shortest time of every function, run in turn."""
    best = dict.fromkeys(functions, np.inf)
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def network(args):
    """Ratios of the network's programs."""
    import jax
    from ml_collections import ConfigDict

    from dico_jax import create_diffusion, create_model
    from dico_jax.autoencoders import create_autoencoder
    from dico_jax.config import DEFAULTS
    from dico_jax.diffusion import SamplingOptions
    from dico_jax.diffusion.paths import alpha_sigma
    from dico_jax.models import abstract_params
    from dico_jax.parallel.mesh import batch_sharding, create_mesh, replicated
    from dico_jax.sampling.generate import make_generate_fn

    model, shape, mesh = create_model(args.model), (args.side, args.side, 4), create_mesh()
    params = jax.tree.map(lambda p: np.full(p.shape, 0.01, np.float32), abstract_params(model))
    params = jax.device_put(params, replicated(mesh))
    pixels = create_autoencoder(ConfigDict(DEFAULTS["autoencoder"] | {"name": "identity"}))
    told, indices = {"label": np.arange(args.batch) % 1000}, np.arange(args.batch)
    diffusion, few = create_diffusion(str(args.steps)), create_diffusion(str(args.steps // 5))
    alpha, sigma = alpha_sigma(few)
    level = (sigma[1:] / alpha[1:])[few.num_steps // 2]

    def sampler(process, **options):
        fn = make_generate_fn(model, process, pixels, shape, SamplingOptions(**options), mesh)
        return lambda: jax.block_until_ready(fn(params, indices, told))

    x, t, _ = model.example_inputs(args.batch, args.side)
    x, t, labels = jax.device_put((x, t, told), batch_sharding(mesh))
    forward = jax.jit(lambda params, x, t, y: model.apply({"params": params}, x, t, y))

    def passes():
        for _ in range(args.steps):
            jax.block_until_ready(forward(params, x, t, labels))

    functions = {
        "forward passes": passes,
        "sampler": sampler(diffusion),
        "guided": sampler(few, cfg_scale=2.0),
        "half guided": sampler(few, cfg_scale=2.0, cfg_interval=f"0:{level * 0.9999}"),
    }
    for function in functions.values():
        function()
    took = seconds(functions, args.rounds)
    for name, value in took.items():
        print(f"{name}: {value:.2f} s")
    ratio = took["sampler"] / took["forward passes"]
    print(f"sampler / forward passes: {ratio:.3f} (at most 1.03)")
    print(f"half guided / guided: {took['half guided'] / took['guided']:.3f} (at most 0.8)")


def files(args):
    """What a folder of 1,000 images takes more than the images."""
    from dico_jax.sampling.checkpoint_sampler import CheckpointSampler
    from dico_jax.sampling.image_folder import save

    overrides = {"batch_size": 100} | (
        {"num_steps": args.digits_steps} if args.digits_steps else {}
    )
    sampler = CheckpointSampler(args.digits, overrides=overrides)

    def images():
        for _ in sampler.images(sampler.conditions(1000)):
            pass

    def folder():
        with tempfile.TemporaryDirectory() as out:
            save(sampler, out, num_images=1000)

    images()
    took = seconds({"images": images, "folder": folder}, args.rounds)
    print(f"1,000 digits: {took['images']:.2f} s, into a folder {took['folder']:.2f} s: ", end="")
    print(f"{took['folder'] / took['images'] - 1:+.3f} (at most 0.05)")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="DiCo-S")
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--digits")
    parser.add_argument("--digits_steps", type=int)
    args = parser.parse_args()
    use_all_cores(keep_memory=True)
    network(args)
    if args.digits:
        files(args)


if __name__ == "__main__":
    main()
