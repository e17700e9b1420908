r"""Peak memory and time of converting DiCo-XL, both ways.

    python benchmarks/convert_memory.py [--model=DiCo-XL --folder=/tmp --training]

Makes a .pt file of random weights in a temporary folder, converts it to a checkpoint and back in
processes of their own, compares the two .pt files byte by byte, and prints for each conversion the
peak resident memory, the size of the file, their ratio, and the seconds. Bars: a ratio of at most
1.5 and at most 60 s, on two cores with a local disk. Needs three times the file's size on disk
(2.8 GB for DiCo-XL; four times as much with --training), and removes it in the end.
"""

import argparse
import collections
import filecmp
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from dico_jax.models import create_model
from dico_jax.pytorch.detection import parameters
from dico_jax.pytorch.optimizer_state import AdamWState, write_adamw
from dico_jax.pytorch.torch_files import Deferred, write_pt

MAX_RATIO = 1.5
MAX_SECONDS = 60
OPTIONS = {"learning_rate": 1e-4, "b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.0}


def random_state_dict(name: str, seed: int) -> dict[str, Deferred]:
    """A state dict of random weights, made when they are written."""
    model = create_model(name)
    shapes = {entry.key: entry.torch_shape for entry in parameters(model)}
    generator = np.random.Generator(np.random.SFC64(seed))

    def make(shape):
        # Random bits in the mantissa, exponents near 1: as hard to compress as real weights.
        bits = generator.integers(0, 1 << 25, shape, dtype=np.uint32)
        return (bits + np.uint32(0x3F000000)).view(np.float32)

    return collections.OrderedDict(
        (key, Deferred(np.float32, shape, lambda shape=shape: make(shape)))
        for key, shape in shapes.items()
    )


def random_file(path: pathlib.Path, name: str, training: bool) -> None:
    """Writes random weights, or a training checkpoint of them."""
    trees = [random_state_dict(name, seed) for seed in range(4 if training else 1)]
    if not training:
        return write_pt(path, trees[0])
    optimizer = write_adamw(AdamWState(400_000, trees[2], trees[3], OPTIONS), trees[0])
    arguments = argparse.Namespace(model=name, image_size=256)
    return write_pt(path, {"model": trees[0], "ema": trees[1], "opt": optimizer, "args": arguments})


def measured(*arguments: str) -> tuple[float, float]:
    """Runs a conversion; its peak resident memory in bytes, and its seconds."""
    start = time.monotonic()
    child = subprocess.Popen([sys.executable, "-m", "dico_jax.convert", *arguments])
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        sys.exit(f"the conversion failed: {arguments}")
    return usage.ru_maxrss * 1024, time.monotonic() - start


def main() -> None:
    """Parses arguments, measures, prints; exits 1 when a bar is not met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="DiCo-XL")
    parser.add_argument("--folder", default=tempfile.gettempdir())
    parser.add_argument("--training", action="store_true", help="with the optimizer's state")
    args = parser.parse_args()
    extra = ["--training"] if args.training else []
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="convert_memory.") as temporary:
        folder = pathlib.Path(temporary)
        source, ckpt, back = folder / "in.pt", folder / "ckpt", folder / "out.pt"
        random_file(source, args.model, args.training)
        size = source.stat().st_size
        print(f"{args.model}: {size / 1e9:.3f} GB, {os.cpu_count()} cores", flush=True)
        if shutil.disk_usage(folder).free < 2.2 * size:
            sys.exit("too little disk space")
        runs = {
            "from_pytorch": ("from_pytorch", f"--input={source}", f"--out={ckpt}", *extra),
            "to_pytorch": ("to_pytorch", f"--ckpt={ckpt}", f"--out={back}", *extra),
        }
        passed = True
        for name, arguments in runs.items():
            peak, seconds = measured(*arguments)
            passed &= peak <= MAX_RATIO * size and (seconds <= MAX_SECONDS or args.training)
            print(
                f"{name}: peak {peak / 1e9:.3f} GB = {peak / size:.2f} of the file "
                f"(bar {MAX_RATIO}), {seconds:.1f} s (bar {MAX_SECONDS})",
                flush=True,
            )
        same = filecmp.cmp(source, back, shallow=False)
        print(f"back to the same file: {same}")
    sys.exit(0 if passed and same else 1)


if __name__ == "__main__":
    main()
