"""Makes images of an exported sampler: python run.py --classes=1,2,cat --out=images.npy

This file lies beside sampler.stablehlo, weights.npz and meta.json, and needs jax, flatbuffers (with
which jax reads the first of them) and numpy alone. In Python:

    import run
    sample = run.load("FOLDER")
    images = sample([207, "macaw"], seed=0)  # uint8 (N, H, W, C)
"""

import argparse
import json
import pathlib

import jax
import numpy as np
from jax import export


def load(folder=None):
    """The function (labels, seed=0, scale=None, first=0) -> images, uint8 (N, H, W, C).

    Labels are numbers and names of classes, in a list, or between commas (#1 is a number where a
    class is named 1). What is wrong is a ValueError of one line.
    Image i of a call has number first + i, from which, with the seed, all its noise follows. The
    scale is that of guidance; None for the one that it was exported with.
    """
    folder = pathlib.Path(__file__).parent if folder is None else pathlib.Path(folder)
    meta = json.loads((folder / "meta.json").read_text())
    program = jax.jit(export.deserialize((folder / "sampler.stablehlo").read_bytes()).call)
    with np.load(folder / "weights.npz") as arrays:
        weights = jax.device_put({name: arrays[name] for name in arrays.files})
    share = np.asarray(meta["guidance"])  # of the scale, at every point of the path

    def label_of(asked):
        text = asked.strip() if isinstance(asked, str) else f"#{asked}"  # which is no name
        digits, last = text.removeprefix("#"), meta["num_classes"] - 1
        found = set(meta["names"].get(text.casefold(), []))
        found |= {int(digits)} if digits.isdecimal() and int(digits) <= last else set()
        if len(found) != 1:
            many = f"may be each of classes {sorted(found)[:9]}: give the number, such as #1"
            fix = many if found else f"is no class: use 0 to {last}, or a name"
            raise ValueError(f"{str(asked)!r} {fix}")
        return found.pop()

    def sample(labels, seed=0, scale=None, first=0):
        asked = labels.split(",") if isinstance(labels, str) else np.asarray(labels, object)
        labels = np.array([label_of(label) for label in np.atleast_1d(asked)], np.int32)
        for name, value, end in (("seed", seed, 2**32), ("first", first, 2**31 - len(labels))):
            whole = isinstance(value, (int, np.integer)) and type(value) is not bool
            if not whole or not 0 <= value < end:
                raise ValueError(f"{name}={value} must be a whole number from 0 to {end - 1}")
        scale = meta["cfg_scale"] if scale is None else float(scale)
        if not len(labels):
            raise ValueError("labels are empty: name some classes")
        if not 0 <= scale < np.inf:
            raise ValueError(f"scale={scale} must be a number from 0 on")
        if not meta["guided"] and scale != 1:
            raise ValueError(f"scale={scale}: this was exported without guidance (--cfg_scale=1)")
        scales = np.where(share == 1, scale, 1.0 + (scale - 1.0) * share).astype(np.float32)
        numbers = np.arange(first, first + len(labels), dtype=np.int32)
        size, images = meta["batch_size"] or max(1, len(labels)), []
        for at in range(0, len(labels), size):
            part = [array[at : at + size] for array in (numbers, labels)]
            count = len(part[0])
            part = [np.pad(array, (0, size - count), mode="edge") for array in part]
            made, finite = program(weights, *part, np.uint32(seed), scales)
            if not np.all(np.asarray(finite)[:count]):
                raise ValueError("some images are not finite: use a lower scale")
            images.append(np.asarray(made)[:count])
        return np.concatenate(images)

    return sample


def main():
    """Writes the images that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--classes", required=True, help="numbers and names, such as 1,2,cat")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, help="of guidance [the exported one]")
    parser.add_argument("--out", default="images.npy")
    args = parser.parse_args()
    try:
        if not pathlib.Path(args.out).parent.is_dir():
            raise ValueError(f"--out={args.out}: there is no such folder")
        images = load()(args.classes, args.seed, args.scale)
        with open(args.out, "wb") as file:
            np.save(file, images)
    except (ImportError, OSError, ValueError) as error:
        parser.exit(2, f"error: {error}\n")
    print(f"{args.out}: uint8 {images.shape}")


if __name__ == "__main__":
    main()
