"""How long training waits for its asynchronous saves.

    python benchmarks/save_wait.py [--model=DiCo-S --batch_size=2 --every=20 --saves=4]

Trains a network of random latents and saves as the training loop does. Prints the seconds of a step
without saving, and per save the seconds in which the loop was inside `save` and what the steps
until the next save took longer. Bar: the wait in `save`, divided by the steps between two saves, is
under 5% of a step.
"""

import argparse
import pathlib
import statistics
import sys
import tempfile
import time

import jax

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from dico_jax.benchmarking import Options
from dico_jax.benchmarking.programs import draw, plan_train
from dico_jax.benchmarking.runner import make_config
from dico_jax.checkpoints.checkpointer import Checkpointer
from dico_jax.parallel.mesh import create_mesh, replicated


def main():
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="DiCo-S")
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--saves", type=int, default=4)
    args = parser.parse_args()

    mesh = create_mesh(jax.devices()[:1])
    config = make_config(Options("train", batch_size=args.batch_size), args.model)
    step, abstract, batch, _ = plan_train(config, mesh)
    state = draw(abstract, replicated(mesh))

    def steps(state, count):
        start = time.perf_counter()
        for _ in range(count):
            state, metrics = step(state, batch)
            jax.block_until_ready(metrics)
        return state, (time.perf_counter() - start) / count

    state, _ = steps(state, 1)  # compiles
    state, alone = steps(state, args.every)
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    print(f"{args.model}, state {nbytes / 1e6:,.0f} MB; a step without saving: {alone:.3f} s")
    waits = []
    with (
        tempfile.TemporaryDirectory() as folder,
        Checkpointer(pathlib.Path(folder), {"config": {}, "class_names": []}, keep=2) as saver,
    ):
        for number in range(args.saves):
            start = time.perf_counter()
            saver.save(number + 1, state)
            waits.append(time.perf_counter() - start)
            state, during = steps(state, args.every)
            share = waits[-1] / (args.every * during)
            print(
                f"save {number + 1}: {waits[-1]:.3f} s in save, {share:.2%} of the step time until "
                f"the next one; a step then: {during:.3f} s"
            )
    middle = statistics.median(waits)
    print(
        f"wait per step, saving every {args.every} steps: {middle / args.every / alone:.2%} of a "
        f"step (bar: 5%); every 1,000: {middle / 1000 / alone:.4%}"
    )


if __name__ == "__main__":
    main()
