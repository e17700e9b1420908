r"""Seconds to trace and to compile the training step, by depth, with and without `scan_blocks`.

    python benchmarks/compile_time.py [--model=DiCo-XL --remat=none --parts step gradient]

Compiles the step of a DiCo at two depths for one CPU device, each in a process of its own: that of
the published model, and that of DiCo-H. Nothing but the depth differs. Nothing is computed and no
parameter is made. The bar: with `scan_blocks` the deeper one takes less than 1.3 times as long. The
processor's time for both is printed, too; where what passed is much longer, the machine was busy
with something else.

Parts: "step" is the training step, "gradient" the network's gradient alone, "init" the fresh state.
Initialisation makes the blocks one by one, so that init keeps a part that grows with the depth.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import time

MAX_RATIO = 1.3
DEPTHS = {"published": None, "of DiCo-H": (14, 12, 10, 12, 14)}
PARTS = ("step", "gradient", "init")
BATCH_SIZE = 8


def compile_part(options: dict, what: str) -> dict[str, float]:
    """Compiles one part of the training of a DiCo; the seconds of tracing and of compiling."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    import jax.numpy as jnp

    from dico_jax.benchmarking import Options
    from dico_jax.benchmarking.programs import compile_ahead, memory_gb, plan_train
    from dico_jax.benchmarking.runner import make_config
    from dico_jax.checkpoints.state import initializer
    from dico_jax.experiment import experiment_from_config
    from dico_jax.parallel.mesh import create_mesh
    from dico_jax.training.optimizer import create_optimizer

    config = make_config(Options("train", batch_size=BATCH_SIZE), "DiCo")
    config.model.update(options)
    experiment = experiment_from_config(config)
    model, shape = experiment.model, experiment.latent_shape
    function, *args, _ = plan_train(config, create_mesh(jax.devices()[:1]))
    if what == "gradient":

        def loss(params, batch):
            t = jnp.zeros(len(batch["x"]))
            out = model.apply({"params": params}, batch["x"], t, batch["condition"])
            return jnp.square(out).mean()

        state, batch = args
        function, args = jax.jit(jax.grad(loss)), [state.params, batch]
    elif what == "init":
        init = initializer(model, create_optimizer(config.optimizer, 1), shape)
        function, args = jax.jit(init), [jax.eval_shape(lambda: jax.random.key(0))]
    processor = time.process_time()
    found = compile_ahead(function, *args)
    return {
        "trace": found.trace_seconds,
        "compile": found.compile_seconds,
        "processor": time.process_time() - processor,
        "temporary_gb": memory_gb(found)["temporaries"],
    }


def measured(options: dict, what: str) -> dict[str, float]:
    """`compile_part` in a process of its own."""
    arguments = [sys.executable, __file__, "--child", json.dumps([options, what])]
    return json.loads(subprocess.run(arguments, check=True, stdout=subprocess.PIPE).stdout)


def main() -> None:
    """Parses arguments, measures, prints; exits 1 when the bar is not met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    models = [f"DiCo-{size}" for size in ("S", "B", "L", "XL", "H")]
    parser.add_argument("--model", choices=models, default="DiCo-XL")
    parser.add_argument("--remat", default="none")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["step"])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(compile_part(*json.loads(args.child))))
        return
    from dico_jax.models import model_options

    known = model_options(args.model)
    sizes = {"hidden_size": known["hidden_size"], "mlp_ratio": known["mlp_ratio"]}
    passed = True
    for what, scan in itertools.product(args.parts, (True, False)):
        if what == "init" and not scan:
            continue  # the same program
        seconds = []
        for name, depth in DEPTHS.items():
            options = {**sizes, "depth": depth or known["depth"]}
            options |= {"scan_blocks": scan, "remat": args.remat}
            found = measured(options, what)
            seconds.append(found["compile"])
            print(
                f"{args.model} {what}, depth {name} {tuple(options['depth'])}, "
                f"scan_blocks={scan}, remat={args.remat}: trace {found['trace']:.1f} s, compile "
                f"{found['compile']:.1f} s (both: processor {found['processor']:.1f} s), "
                f"temporary memory {found['temporary_gb']:.1f} GB",
                flush=True,
            )
        ratio = seconds[1] / seconds[0]
        bar = f" (bar {MAX_RATIO})" if what == "step" and scan else ""
        passed &= not bar or ratio < MAX_RATIO
        print(f"{what}, scan_blocks={scan}: ratio of compile times {ratio:.2f}{bar}", flush=True)
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
