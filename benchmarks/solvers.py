"""The digits by solver and number of steps: class agreement, spread, and FID of a classifier.

    python benchmarks/solvers.py --out=DIR RUN [RUN ...]

Each RUN is a workdir of configs/digits.py, digits_flow.py or digits_mean_flow.py (which is sampled
by "jump" alone). DIR/solvers.jsonl gets a row at a time, and the same command goes on where it
stopped; then come a table and DIR/solvers.png. FID is between the features of the samples and of
all real digits, by a classifier that is trained first (DIR/classifier.npz).
"""

import argparse
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import numpy as np

from dico_jax.ops.cpu import use_all_cores

STEPS = (5, 10, 15, 25, 50, 100, 250)
JUMPS = (1, 2, 4)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--out", required=True)
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--solvers", default="")
    args = parser.parse_args()
    use_all_cores(keep_memory=True)

    from dico_jax import Sampler, fid
    from dico_jax.data.pictures import PictureReader
    from dico_jax.data.sources import create_source
    from dico_jax.diffusion import SOLVERS
    from dico_jax.evaluation.networks import class_agreement, train_classifier

    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    table, features = out / "solvers.jsonl", out / "classifier.npz"
    rows = [json.loads(line) for line in table.read_text().splitlines()] if table.exists() else []
    solvers = args.solvers.split(",") if args.solvers else sorted({*SOLVERS} - {"dpmpp", "euler"})
    for run in args.runs:
        sampler = Sampler.from_pretrained(run)
        source, read = create_source(sampler.pretrained.config.data), PictureReader(8, 1)
        if not features.exists():
            train_classifier(source, read).save(features)
        real = np.stack([read(source[i]["image"], False) for i in range(len(source))])
        objective = sampler.pretrained.config.diffusion.objective
        jumps = objective == "mean_flow"
        for solver in ["jump"] if jumps else [name for name in solvers if name != "jump"]:
            for steps in JUMPS if jumps else STEPS:
                key = {"objective": objective, "solver": solver, "steps": steps}
                if any(key.items() <= row.items() for row in rows):
                    continue
                images = sampler("all", num_images=args.samples, steps=steps, solver=solver)
                labels = np.arange(len(images)) % 10
                judged = class_agreement(np.asarray(images), labels, source, read)
                distance = fid(np.asarray(images), real, features=str(features))
                row = {**key, "evaluations": 2 * steps - 1 if solver == "heun" else steps}
                row |= {"agreement": judged.agreement, "spread": judged.spread, "fid": distance}
                rows.append(row)
                with table.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(row, flush=True)
    show(rows)
    plot(rows, out / "solvers.png")


def show(rows):
    """A table: per objective and solver, of every number of steps agreement / spread / FID."""
    columns = sorted({row["steps"] for row in rows})
    print(f"| objective | solver | {' | '.join(map(str, columns))} |")
    print(f"|---|---|{'---|' * len(columns)}")
    for key in dict.fromkeys((row["objective"], row["solver"]) for row in rows):
        of = {row["steps"]: row for row in rows if (row["objective"], row["solver"]) == key}
        cells = [
            f"{100 * of[n]['agreement']:.1f} / {of[n]['spread']:.2f} / {of[n]['fid']:.1f}"
            if n in of else ""
            for n in columns
        ]  # fmt: skip
        print(f"| {key[0]} | {key[1]} | {' | '.join(cells)} |")


def plot(rows, path):
    """FID and class agreement against evaluations of the network."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    names = sorted({row["solver"] for row in rows})
    for key in dict.fromkeys((row["objective"], row["solver"]) for row in rows):
        of = sorted(
            (row for row in rows if (row["objective"], row["solver"]) == key),
            key=lambda row: row["evaluations"],
        )
        style = {"noise": "-o", "flow": "--s", "mean_flow": ":^"}[key[0]]
        for axis, name, scale in zip(axes, ("fid", "agreement"), (1, 100), strict=True):
            x = [row["evaluations"] for row in of]
            axis.plot(x, [scale * row[name] for row in of], style, label=f"{key[0]}, {key[1]}",
                      markersize=3, linewidth=1, color=f"C{names.index(key[1])}")  # fmt: skip
    for axis, name in zip(axes, ("FID (classifier's features)", "class agreement, %"), strict=True):
        axis.set(xscale="log", xlabel="evaluations of the network", ylabel=name)
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    figure.legend(
        *axes[1].get_legend_handles_labels(), fontsize=7, ncols=7, loc="outside lower center"
    )
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
