"""Makes images of an exported sampler: python run.py --classes=1,2,3 --out=images.npy

This file lies beside sampler.stablehlo, weights.npz and meta.json, and needs jax, flatbuffers (with
which jax reads the first of them) and numpy alone. In Python:

    import run
    sample = run.load("FOLDER")
    images = sample([207, 88], seed=0)  # uint8 (N, H, W, C)
"""

import argparse
import json
import pathlib

import jax
import numpy as np
from jax import export


def load(folder=None):
    """The function (labels, seed=0, scale=None, first=0) -> images, uint8 (N, H, W, C).

    Image i of a call has number first + i, from which, with the seed, all its noise follows. The
    scale is that of guidance; None for the one that it was exported with.
    """
    folder = pathlib.Path(__file__).parent if folder is None else pathlib.Path(folder)
    meta = json.loads((folder / "meta.json").read_text())
    program = jax.jit(export.deserialize((folder / "sampler.stablehlo").read_bytes()).call)
    with np.load(folder / "weights.npz") as arrays:
        weights = jax.device_put({name: arrays[name] for name in arrays.files})
    share = np.asarray(meta["guidance"])  # of the scale, at every point of the path

    def sample(labels, seed=0, scale=None, first=0):
        labels = np.asarray(labels, np.int32)
        if labels.ndim != 1 or not all(0 <= label < meta["num_classes"] for label in labels):
            raise ValueError(f"labels must be a list of 0 to {meta['num_classes'] - 1}")
        scale = meta["cfg_scale"] if scale is None else float(scale)
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
    parser.add_argument("--classes", required=True, help="numbers, such as 1,2,3")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, help="of guidance [the exported one]")
    parser.add_argument("--out", default="images.npy")
    args = parser.parse_args()
    images = load()([int(label) for label in args.classes.split(",")], args.seed, args.scale)
    np.save(args.out, images)
    print(f"{args.out}: uint8 {images.shape}")


if __name__ == "__main__":
    main()
