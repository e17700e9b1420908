"""What being told a text costs: DiCo-S with each fusion beside the class-conditional network.

    python benchmarks/text_speed.py [--model=DiCo-S --side=32 --batch=8 --dtype=float32]

A forward pass reads the features of a text (77 x 768) too; a step of the sampler is given what
the fusions make of them, which is done once per prompt, and guides (two forward passes). All are
timed in turn, in one process, on all devices; times are medians over rounds. Bars on a CPU, for
"dwc": forward at least 0.6 of the class-conditional speed, a step at least 0.75.
"""

import argparse
import pathlib
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import numpy as np

from dico_jax.ops.cpu import use_all_cores

BARS = {("dwc", "forward"): 0.6, ("dwc", "step"): 0.75}
_WARM_UP = 10  # a CPU's malloc needs some until it has all that is asked for


def programs(model, side, batch):
    """Functions that run a forward pass and a guided step once, and wait."""
    import jax

    from dico_jax.diffusion import guided_model_fn
    from dico_jax.parallel.mesh import batch_sharding, create_mesh, replicated

    mesh = create_mesh()
    split = batch_sharding(mesh)
    inputs = model.example_inputs(batch, side)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *model.example_inputs(1, side))
    # No zeros: what starts at zero must count in full.
    drawn = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.01, np.float32), shapes["params"])
    params = jax.device_put(drawn, replicated(mesh))
    x, t, condition = jax.device_put(inputs, split)

    def apply(params, *args):
        return model.apply({"params": params}, *args)

    encoded = jax.jit(model.encode_condition)(params, condition)
    encoded = jax.device_put(encoded, split)
    null = jax.tree.map(lambda leaf: leaf[:1], encoded)

    @jax.jit
    def step(params, x, t, encoded, null):
        def model_fn(x, t, condition):
            return apply(params, x, t, condition)

        channels = model.in_channels
        return guided_model_fn(model_fn, encoded, null, 2.0, channels, "all")(x, t)

    forward = jax.jit(apply)
    return {
        "forward": lambda: jax.block_until_ready(forward(params, x, t, condition)),
        "step": lambda: jax.block_until_ready(step(params, x, t, encoded, null)),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="DiCo-S")
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    use_all_cores(keep_memory=True)
    import jax

    from dico_jax import create_model

    models = {"class": create_model(args.model, dtype=args.dtype)}
    for fusion in ("dwc", "cross_attention"):
        models[fusion] = create_model(f"Text{args.model}", text_fusion=fusion, dtype=args.dtype)
    tasks = {
        (name, task): run
        for name, model in models.items()
        for task, run in programs(model, args.side, args.batch).items()
    }
    for run in tasks.values():
        for _ in range(_WARM_UP):
            run()
    times = {task: [] for task in tasks}
    for _ in range(args.rounds):
        for task, run in tasks.items():
            start = time.perf_counter()
            run()
            times[task].append(time.perf_counter() - start)
    median = {task: statistics.median(found) for task, found in times.items()}
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}"
    print(f"{args.model}, batch {args.batch} of {args.side}x{args.side}, {args.dtype}, {devices}")
    print("| network | forward, ms | its speed | step, ms | its speed |\n|---|---|---|---|---|")
    missed = False
    for name in models:
        cells = []
        for task in ("forward", "step"):
            share, bar = median["class", task] / median[name, task], BARS.get((name, task))
            missed |= bar is not None and share < bar
            beside = "" if bar is None else f" (bar {bar})"
            cells += [f"{1000 * median[name, task]:.0f}", f"{share:.3f}{beside}"]
        print(f"| {name} | {' | '.join(cells)} |")
    return int(missed and jax.default_backend() == "cpu")


if __name__ == "__main__":
    sys.exit(main())
