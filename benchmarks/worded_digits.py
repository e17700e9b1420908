"""Whether digits look as the words ask: class, stroke thickness and slant, with two controls.

    python benchmarks/worded_digits.py --ckpt=DIR [--out=DIR --cfg_scale=1.4 --per_prompt=2]

For a run of configs/worded_digits.py. Every digit is asked for at five levels of thickness and of
slant. A classifier fitted on the real digits says which digit each sample shows; thickness and
slant are measured as they were for the captions, and ranked within each digit against the level
that was asked for (Spearman). The same samples are held against other prompts than theirs
("shuffled"), and samples of no prompt are made ("no prompt"): both must fail. Bars: 95%, 0.7.

Writes thickness.png and slant.png, a row per digit, a column per level, and result.json.
"""

import argparse
import itertools
import json
import pathlib
import sys

import numpy as np
from scipy.stats import spearmanr

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from dico_jax.data.pictures import PictureReader
from dico_jax.data.worded_digits import DIGITS, SLANT, THICKNESS, WordedDigits, measures
from dico_jax.evaluation.networks import class_agreement
from dico_jax.files import library_versions
from dico_jax.ops.cpu import use_all_cores
from dico_jax.sampling.checkpoint_sampler import CheckpointSampler
from dico_jax.sampling.grids import image_grid, save_png

BARS = {"class": 0.95, "thickness": 0.7, "slant": 0.7}


def judged(images, asked, source):
    """Of images and what was asked, (N, 3) of digit and levels: the share and the correlations."""
    agreement = class_agreement(images, asked[:, 0], source, PictureReader(8, 1))
    found = {"class": agreement.agreement}
    seen = measures(images)
    for column, name in enumerate(("thickness", "slant"), start=1):
        each = [asked[:, 0] == digit for digit in range(10)]
        ranks = [spearmanr(asked[of, column], seen[name][of]).statistic for of in each]
        found[name] = float(np.mean(ranks))
    return found


def grid_of(images, asked, column):
    """A row per digit; a column per level of what is in `column`, the other one in the middle."""
    other = 3 - column
    rows = []
    for digit in range(10):
        level = [(asked[:, 0] == digit) & (asked[:, column] == k) & (asked[:, other] == 2)
                 for k in range(5)]  # fmt: skip
        rows.append(np.stack([images[of][0] for of in level]))
    return image_grid(rows, DIGITS)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt", required=True)
    parser.add_argument("--out")
    parser.add_argument("--cfg_scale", type=float)
    parser.add_argument("--per_prompt", type=int, default=2)
    args = parser.parse_args()
    use_all_cores(keep_memory=True)

    overrides = {"batch_size": 100} | ({"cfg_scale": args.cfg_scale} if args.cfg_scale else {})
    sampler = CheckpointSampler(args.ckpt, overrides=overrides)
    model, source = sampler.experiment.model, WordedDigits()
    asked = np.array(list(itertools.product(range(10), range(5), range(5))) * args.per_prompt)
    texts = [f"a {THICKNESS[t]} {DIGITS[d]} {SLANT[s]}" for d, t, s in asked]

    def sample(prompts):
        return np.concatenate(list(sampler.images(model.as_condition(prompts))))

    images = sample(texts)
    others = np.random.default_rng(0).permutation(asked)
    rows = {
        "asked": judged(images, asked, source),
        "shuffled": judged(images, others, source),
        "no prompt": judged(sample([""] * len(texts)), asked, source),
    }
    print("| samples | digit asked for | thickness | slant |\n|---|---|---|---|")
    for name, found in rows.items():
        numbers = f"{found['class']:.1%} | {found['thickness']:.3f} | {found['slant']:.3f}"
        print(f"| {name} | {numbers} |")
    print(f"bars: {BARS}")
    if args.out:
        folder = pathlib.Path(args.out)
        folder.mkdir(parents=True, exist_ok=True)
        for column, name in enumerate(("thickness", "slant"), start=1):
            save_png(folder / f"{name}.png", grid_of(images, asked, column))
        made = {"settings": sampler.about(prompts=";".join(texts)), "versions": library_versions()}
        (folder / "result.json").write_text(json.dumps({"found": rows, **made}, indent=2) + "\n")
    reached = all(rows["asked"][name] >= bar for name, bar in BARS.items())
    failed = all(
        rows[c][name] < bar for c in ("shuffled", "no prompt") for name, bar in BARS.items()
    )
    return 0 if reached and failed else 1


if __name__ == "__main__":
    sys.exit(main())
