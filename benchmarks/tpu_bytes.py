r"""Bytes that a TPU moves for one image, beside the fewest that fused stages could move.

    pip install "jax[tpu]"  # for libtpu; no TPU is needed
    python benchmarks/tpu_bytes.py [--model=DiCo-XL --batch=256 --topology=v5e:2x2]

Compiles the forward pass (bfloat16, float32 parameters as arguments) for one chip of a TPU topology
and compares XLA's count of bytes accessed with `ideal_stages`: every fused stage reads each of its
inputs once and writes its output once. Nothing is run. Bar: at most 1.5 times the ideal. XLA's
count includes what it keeps in, or copies ahead to, the memory on the chip. With --train the
gradient of a loss is compiled; the ideal beside it is still that of the forward pass. With
--text_fusion=dwc (or cross_attention) the network is told a text, and the ideal is that without it.
"""

import argparse
import os
import sys
import time

MAX_RATIO = 1.5


def compile_forward(options: dict, batch: int, side: int, topology: str, train: bool = False):
    """The forward pass of a DiCo (or the gradient of a loss), compiled for one chip."""
    for name, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("TPU_ACCELERATOR_TYPE", "v5litepod-4"),
        ("JAX_PLATFORMS", "cpu"),
    ):
        os.environ.setdefault(name, value)
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    from dico_jax.benchmarking import Options
    from dico_jax.benchmarking.programs import plan_forward
    from dico_jax.benchmarking.runner import make_config
    from dico_jax.parallel.mesh import create_mesh

    name = "TextDiCo" if "text_fusion" in options else "DiCo"
    config = make_config(Options("forward", image_size=8 * side, batch_size=batch), name)
    config.model.update(options, dtype="bfloat16")
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    function, *args, _ = plan_forward(config, create_mesh(devices[:1]))

    def gradient(params, arrays):
        return jax.grad(lambda p: jnp.square(function(p, arrays)).mean())(params)

    return (jax.jit(gradient) if train else function).lower(*args).compile()


def main() -> None:
    """Parses arguments, compiles, prints; exits 1 when the bar is not met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="DiCo-XL")
    parser.add_argument("--depth", type=int, nargs=5, help="instead of the model's")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--side", type=int, default=32, help="of the latents")
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--text_fusion", choices=("dwc", "cross_attention"))
    parser.add_argument("--hlo", help="write the optimised program to this file")
    args = parser.parse_args()
    from dico_jax.models import model_options
    from dico_jax.planning.roofline import ideal_stages

    known = model_options(args.model)
    options = {name: known[name] for name in ("hidden_size", "depth", "mlp_ratio")}
    if args.depth:
        options["depth"] = tuple(args.depth)
    stages = ideal_stages(side=args.side, **options)
    ideal = sum(stage.bytes(args.batch) for stage in stages)
    if args.text_fusion:
        options["text_fusion"] = args.text_fusion
    for stage in stages:
        print(f"{stage.bytes(args.batch) / 1e6:10.2f} MB  {stage.count:3d} x {stage.name}")
    print(f"{ideal / 1e6:10.2f} MB  ideal per image")
    start = time.monotonic()
    compiled = compile_forward(options, args.batch, args.side, args.topology, args.train)
    print(f"compiled in {time.monotonic() - start:.0f} s")
    if args.hlo:
        with open(args.hlo, "w") as file:
            file.write(compiled.as_text())
    counted = compiled.cost_analysis()["bytes accessed"] / args.batch
    print(f"{counted / 1e6:10.2f} MB  compiled per image: {counted / ideal:.3f} times the ideal")
    sys.exit(0 if counted <= MAX_RATIO * ideal else 1)


if __name__ == "__main__":
    main()
