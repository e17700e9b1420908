r"""Images per second of the Inception network on CPU, beside the same network in PyTorch.

    python benchmarks/inception_speed.py [--torch_python=PATH --batch_sizes 1 2 4 8 16 --cores=1]

Both sides run in processes of their own, in turn and never at once, on all cores, in float32 and
from uint8 pictures; PyTorch's network is made of the same table and the same (random) weights, and
its features are compared first. PATH is a Python that has torch and numpy; without it, this one.
PyTorch runs both in its default layout and channels-last. Every side counts with the median over
rounds at the batch size that suits it best. The bar: no less than 0.9 of PyTorch's speed. Where
other work keeps a core busy, PyTorch's threads wait for each other and the ratio says little:
--cores=1 compares then.
"""

import argparse
import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable

import numpy as np
from side_by_side import Program, medians, serve

MIN_RATIO = 0.9
MAX_DISTANCE = 1e-5
SIDES = ("jax", "torch", "torch channels-last")
_NETWORK, _WEIGHTS, _TABLES, _IMAGES = "network.json", "weights.npz", "tables.npz", "images.npy"
_FEATURES = "{}.npy"


def write_inputs(folder: pathlib.Path, image_size: int, batch_size: int) -> None:
    """The network, random weights, positions for resizing, and pictures, for both sides."""
    import flax

    from dico_jax.evaluation.inception import NETWORK, abstract_params, resize_tables

    def plain(layer):
        if isinstance(layer, tuple) and hasattr(layer, "_asdict"):
            fields = {name: plain(value) for name, value in layer._asdict().items()}
            return {"type": type(layer).__name__, **fields}
        return [plain(part) for part in layer] if isinstance(layer, tuple) else layer

    (folder / _NETWORK).write_text(json.dumps(plain(NETWORK)))
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (batch_size, image_size, image_size, 3), dtype=np.uint8)
    np.save(folder / _IMAGES, images)
    flat = flax.traverse_util.flatten_dict(abstract_params(), sep="/")
    np.savez(folder / _WEIGHTS, **{name: _drawn(rng, leaf.shape) for name, leaf in flat.items()})
    np.savez(folder / _TABLES, *resize_tables(image_size, np.float32))


def _drawn(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    fan_in = int(np.prod(shape[:-1]))
    gain = np.sqrt(2 / fan_in) if len(shape) > 1 else 0.1
    return (gain * rng.standard_normal(shape)).astype(np.float32)


def jax_features(folder: pathlib.Path, batch_size: int) -> Callable[[np.ndarray], np.ndarray]:
    """The features of pictures, as `dico_jax.evaluate` makes them."""
    import flax

    from dico_jax.evaluation.inception_weights import InceptionFeatures
    from dico_jax.evaluation.networks import make_feature_fn
    from dico_jax.ops.cpu import use_all_cores
    from dico_jax.parallel.mesh import create_mesh

    use_all_cores()
    params = flax.traverse_util.unflatten_dict(dict(np.load(folder / _WEIGHTS)), sep="/")
    network = InceptionFeatures(params, "random")
    features = make_feature_fn(network, batch_size, create_mesh())
    return lambda images: features(images).pool


def torch_features(folder: pathlib.Path, layout: str) -> Callable[[np.ndarray], np.ndarray]:
    """The features of pictures, by PyTorch; batch norm is folded there too."""
    import torch
    import torch.nn.functional as F

    memory_format = torch.channels_last if layout else torch.contiguous_format
    network = json.loads((folder / _NETWORK).read_text())
    lower, upper, weight = (torch.from_numpy(a) for a in np.load(folder / _TABLES).values())
    weights = {}
    for name, value in np.load(folder / _WEIGHTS).items():
        tensor = torch.from_numpy(value)
        if tensor.ndim == 4:
            tensor = tensor.permute(3, 2, 0, 1).contiguous(memory_format=memory_format)
        weights[name] = tensor

    def run(layer, x, prefix=""):
        if layer["type"] == "Conv":
            name, kernel = prefix + layer["name"], layer["kernel"]
            padding = [(k - 1) // 2 * layer["padded"] for k in kernel]
            kernel, bias = weights[f"{name}/kernel"], weights[f"{name}/bias"]
            return F.relu_(F.conv2d(x, kernel, bias, layer["stride"], padding))
        if layer["type"] == "Pool":
            padding = int(layer["stride"] == 1)
            if layer["kind"] == "max":
                return F.max_pool2d(x, 3, layer["stride"], padding)
            return F.avg_pool2d(x, 3, layer["stride"], padding, count_include_pad=False)
        if layer["type"] == "Fork":
            return torch.cat([run(part, x, prefix) for part in layer["layers"]], 1)
        outputs = []
        for branch in layer["branches"]:
            y = x
            for part in branch:
                y = run(part, y, f"{layer['name']}/")
            outputs.append(y)
        return torch.cat(outputs, 1)

    def resized(x):
        for axis, shape in ((2, (-1, 1)), (1, (-1, 1, 1))):
            if x.shape[axis] != len(lower):
                low, high = (x.index_select(axis, i).float() for i in (lower, upper))
                x = low + (high - low) * weight.reshape(shape)
        return (x.float() - 128) / 128

    def features(images):
        with torch.inference_mode():
            x = resized(torch.from_numpy(images)).permute(0, 3, 1, 2)
            x = x.contiguous(memory_format=memory_format)
            for layer in network:
                x = run(layer, x)
            return x.mean((2, 3)).numpy()

    return features


def serve_side(side: str, folder: pathlib.Path, cores: int) -> None:
    """Serves batch sizes as tasks; the features of the first pictures go to a file."""
    if cores:  # before either library starts its threads
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    images = np.load(folder / _IMAGES)
    framework, _, layout = side.partition(" ")
    run = (
        jax_features(folder, len(images)) if framework == "jax" else torch_features(folder, layout)
    )
    np.save(folder / _FEATURES.format(side), run(images[:2]))
    serve(lambda batch_size: lambda: run(images[:batch_size]))


def main() -> None:
    """Parses arguments, measures, prints; exits 1 when the bar is not met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch_python", default=sys.executable)
    parser.add_argument("--image_size", type=int, default=256)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="per measurement")
    parser.add_argument("--cores", type=int, default=0, help="how many to use [all]")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        serve_side(args.child[0], pathlib.Path(args.child[1]), args.cores)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write_inputs(folder, args.image_size, max(2, *args.batch_sizes))
        programs = [_program(side, folder, args) for side in SIDES]
        _compare_features(folder)
        times = medians(programs, args.batch_sizes, args.rounds, args.seconds)
        for program in programs:
            program.close()
    best = {}
    for side in SIDES:
        speeds = {size: size / times[side, json.dumps(size)] for size in args.batch_sizes}
        listed = ", ".join(f"{speed:.1f} ({size})" for size, speed in speeds.items())
        best[side] = max(speeds.values())
        print(f"{side}: images/s (batch size) {listed}; best {best[side]:.1f}")
    ratio = best["jax"] / max(best[side] for side in SIDES[1:])
    print(f"ratio to the faster of PyTorch's: {ratio:.2f} (bar {MIN_RATIO})")
    sys.exit(0 if ratio >= MIN_RATIO else 1)


def _program(side: str, folder: pathlib.Path, args: argparse.Namespace) -> Program:
    python = sys.executable if side == "jax" else args.torch_python
    return Program(side, [python, __file__, "--child", side, str(folder), f"--cores={args.cores}"])


def _compare_features(folder: pathlib.Path) -> None:
    """Prints the distances of PyTorch's features from ours; fails where they are too large."""
    features = {side: np.load(folder / _FEATURES.format(side)) for side in SIDES}
    for side in SIDES[1:]:
        distance = np.abs(features["jax"] - features[side]).max() / np.abs(features[side]).max()
        print(f"features against {side}: {distance:.1e} of the peak (bar {MAX_DISTANCE})")
        assert distance < MAX_DISTANCE


if __name__ == "__main__":
    main()
