r"""Images per second of DiCo and DiT beside the released PyTorch code, on the same device.

    git clone https://github.com/shallowdream204/DiCo
    python benchmarks/vs_pytorch.py --reference=DiCo [--torch_python=PATH --model=DiCo-S --out=FILE]

The same model, weights, inputs, dtype and device; every side in a process of its own, in turn and
never at once. Outputs are compared first, with random weights everywhere. PyTorch runs eagerly and
compiled, each in its default layout and channels-last. "forward" is without gradients, in PyTorch's
inference mode; "gradient" is the gradient of a mean square for all parameters. In bfloat16 forward
has bfloat16 weights in PyTorch; its gradient has float32 weights under autocast, as dico_jax always
has. PATH is a Python that has torch and numpy; without it, this one.

The ceiling is what a large matrix product reaches in the same run, on all cores or on the GPU, in
the better of the two libraries; the network's own arithmetic over it is the utilisation. Needs a
quiet machine: a busy core makes threads wait for each other.
"""

import argparse
import functools
import importlib
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import NoReturn

import numpy as np
from side_by_side import Program, medians, serve

JAX = "dico_jax"
EAGER = ("eager", "eager channels-last")
COMPILED = ("compile", "compile channels-last")
CEILING = "matrix product"
LATENT_STEP = 8  # pixels per position of the latents, each way
MAX_DISTANCE = {"float32": 1e-4, "bfloat16": 5e-2}
# Over torch.compile, of the ceiling, over eager; by model, batch, dtype and device, at 256x256.
_GPU_BARS = {"forward/compile": 1.5, "forward/ceiling": 0.55}
BARS = {
    ("DiCo-S", 8, "float32", "cpu"): {
        "forward/compile": 1.1,
        "forward/ceiling": 0.8,
        "gradient/eager": 1.2,
    },
    ("DiCo-XL", 64, "bfloat16", "cuda"): _GPU_BARS,
    ("DiCo-XL", 256, "bfloat16", "cuda"): _GPU_BARS,
}
_INPUTS, _WEIGHTS, _OUTPUT, _TORCH = "inputs.npz", "weights.pt", "{}.npy", "torch.json"


def write_inputs(folder: pathlib.Path, options: argparse.Namespace) -> None:
    """Noisy latents, timesteps and labels, for both sides."""
    rng = np.random.default_rng(0)
    side, n = options.image_size // LATENT_STEP, options.batch_size
    np.savez(
        folder / _INPUTS,
        x=rng.standard_normal((n, side, side, 4), np.float32),
        t=rng.integers(0, 1000, n),
        y=rng.integers(0, 1000, n),
    )


# ----------------------------------------------------------------------------------------- JAX


def jax_tasks(folder: pathlib.Path, options: argparse.Namespace) -> Callable:
    """Makes functions of tasks for this project."""
    import jax
    import jax.numpy as jnp

    from dico_jax import create_model, load_pytorch
    from dico_jax.ops.cpu import use_all_cores
    from dico_jax.parallel.mesh import batch_sharding, create_mesh, replicated

    if options.device == "cpu":
        jax.config.update("jax_platforms", "cpu")
        use_all_cores(keep_memory=True)
    elif jax.default_backend() != "gpu":
        refuse(f"--device=cuda: JAX has no GPU here, only {jax.default_backend()}")
    precision = "tensorfloat32" if options.tf32 else "highest"
    jax.config.update("jax_default_matmul_precision", precision)
    # As PyTorch: all cores, but one GPU.
    mesh = create_mesh() if options.device == "cpu" else create_mesh(jax.devices()[:1])
    if options.batch_size % mesh.size:
        refuse(
            f"--batch_size={options.batch_size} does not divide over {mesh.size} devices: use "
            f"{-(-options.batch_size // mesh.size) * mesh.size}"
        )
    whole, split = replicated(mesh), batch_sharding(mesh)
    model = create_model(options.model, dtype=options.dtype)
    params = jax.device_put(load_pytorch(folder / _WEIGHTS, model), whole)
    inputs = np.load(folder / _INPUTS)
    x, t, y = (jax.device_put(inputs[name], split) for name in "xty")

    def loss(params, x, t, y):  # not as constants, which every device would have whole
        return jnp.square(model.apply({"params": params}, x, t, y)).mean()

    def prepare(task):
        if task == CEILING:
            n = options.ceiling_size
            # Every device has a block of rows, as it has a part of the batch.
            a = jax.device_put(np.full((n, n), 0.5, np.float32), split).astype(options.dtype)
            b = jax.device_put(np.full((n, n), 0.5, np.float32), whole).astype(options.dtype)
            product = jax.jit(jnp.matmul)
            return lambda: jax.block_until_ready(product(a, b))
        if task == "forward":
            forward = jax.jit(lambda params, *xty: model.apply({"params": params}, *xty))
            return lambda: jax.block_until_ready(forward(params, x, t, y))
        gradient = jax.jit(jax.grad(loss), out_shardings=whole)
        return lambda: jax.block_until_ready(gradient(params, x, t, y))

    if not (folder / _OUTPUT.format(JAX)).exists():  # once, whatever the task
        np.save(folder / _OUTPUT.format(JAX), np.asarray(prepare("forward")()))
    return prepare


# ----------------------------------------------------------------------------------------- PyTorch


def family(options: argparse.Namespace) -> str:
    """The released module that has the model."""
    return "dico_models" if options.model.startswith("DiCo") else "dit_models"


def torch_model(options: argparse.Namespace):
    """The released network, from the user's checkout of the released code."""
    import torch

    sys.path.insert(0, options.reference)
    torch.manual_seed(0)
    model = importlib.import_module(family(options)).DiT_models[options.model]().eval()
    for parameter in model.parameters():
        if not parameter.abs().max():  # what starts at zero would hide half of the network
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def write_weights(folder: pathlib.Path, options: argparse.Namespace) -> None:
    """The weights of all sides, as PyTorch saves them, and what PyTorch it is."""
    import torch

    torch.save(torch_model(options).state_dict(), folder / _WEIGHTS)
    gpu = torch.cuda.get_device_name() if options.device == "cuda" else None
    (folder / _TORCH).write_text(json.dumps({"version": torch.__version__, "gpu": gpu}))


def torch_tasks(side: str, folder: pathlib.Path, options: argparse.Namespace) -> Callable:
    """Makes functions of tasks for PyTorch."""
    import torch

    device, dtype = options.device, getattr(torch, options.dtype)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = options.tf32
    torch.backends.cudnn.benchmark = True
    layout = torch.channels_last if "channels-last" in side else torch.contiguous_format
    inputs = np.load(folder / _INPUTS)
    x = torch.from_numpy(inputs["x"]).permute(0, 3, 1, 2).contiguous(memory_format=layout)
    x, t, y = x.to(device), *(torch.from_numpy(inputs[name]).to(device) for name in "ty")

    def wait(result):
        if device == "cuda":
            torch.cuda.synchronize()
        return result

    def network(dtype):
        model = torch_model(options)
        model.load_state_dict(torch.load(folder / _WEIGHTS))
        model = model.to(device, dtype).to(memory_format=layout)
        for name, module in model.named_modules():
            if "t_embedder" in name and name.endswith("mlp"):  # the time features are float32
                module.register_forward_pre_hook(lambda _, args: (args[0].to(dtype),))
        return torch.compile(model) if side in COMPILED else model

    def prepare(task):
        if task == CEILING:
            n = options.ceiling_size
            a, b = (torch.full((n, n), 0.5, device=device, dtype=dtype) for _ in range(2))
            return lambda: wait(a @ b)
        if task == "forward":
            model, images = network(dtype), x.to(dtype)
            return lambda: wait(torch.inference_mode()(model)(images, t, y))
        model = network(torch.float32)

        def gradient():
            model.zero_grad()
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                loss = model(x, t, y).float().square().mean()
            loss.backward()
            wait(None)

        return gradient

    if not (folder / _OUTPUT.format(side)).exists():
        output = prepare("forward")().float().permute(0, 2, 3, 1)
        np.save(folder / _OUTPUT.format(side), output.cpu().numpy())
    return prepare


# ----------------------------------------------------------------------------------------- both


def compare_outputs(folder: pathlib.Path, options: argparse.Namespace) -> dict[str, float]:
    """Distance of every PyTorch side's output from ours, over the peak; exits where too large."""
    ours, distances = np.load(folder / _OUTPUT.format(JAX)), {}
    for side in options.sides:
        theirs = np.load(folder / _OUTPUT.format(side))
        distances[side] = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
        print(f"outputs against {side}: {distances[side]:.1e} of the peak", flush=True)
        if not distances[side] < MAX_DISTANCE[options.dtype]:
            sys.exit(f"the outputs differ by more than {MAX_DISTANCE[options.dtype]}")
    return distances


def child_command(python: str, child: str, folder: pathlib.Path, tasks: list[str]) -> list[str]:
    """This script with its arguments, for a process that does a part."""
    arguments = [*sys.argv[1:], "--tasks", *tasks, "--child_folder", str(folder), "--child", child]
    return [python, __file__, *arguments]


def write_weights_in_torch(folder: pathlib.Path, options: argparse.Namespace) -> None:
    """`write_weights` where PyTorch is."""
    python = options.torch_python or sys.executable
    subprocess.run(child_command(python, "weights", folder, options.tasks), check=True)


def start(folder: pathlib.Path, task: str, options: argparse.Namespace) -> list[Program]:
    """Starts all sides for a task, one after the other."""
    env = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}

    def program(side):
        python = sys.executable if side == JAX else options.torch_python or sys.executable
        return Program(side, child_command(python, side, folder, [task]), env)

    return [program(side) for side in (JAX, *options.sides)]


def summarise(times: dict[tuple[str, str], float], options: argparse.Namespace) -> dict:
    """Images per second, ratios and utilisation, printed and returned."""
    from dico_jax import create_model
    from dico_jax.models import forward_flops, training_flops

    side = options.image_size // LATENT_STEP
    counts = {"forward": forward_flops, "gradient": training_flops}
    model = create_model(options.model)
    flops = {task: count(model, (side, side, 4)) for task, count in counts.items()}
    products = {name: t for (name, task), t in times.items() if json.loads(task) == CEILING}
    ceiling = 2 * options.ceiling_size**3 / min(products.values())
    for name, seconds in products.items():
        print(f"{CEILING}, {name}: {2 * options.ceiling_size**3 / seconds / 1e9:.0f} GFLOP/s")
    summary: dict = {"ceiling_gflops_per_second": ceiling / 1e9, "tasks": {}}
    for task in options.tasks:
        speeds = {
            name: options.batch_size / times[name, json.dumps(task)]
            for name in (JAX, *options.sides)
        }
        limit = ceiling / flops[task]
        print(f"\n{task}: the ceiling allows {limit:.1f} images/s")
        for name, speed in speeds.items():
            print(
                f"  {name:24} {speed:8.2f} images/s, {speed / limit:.2f} of the ceiling, "
                f"{JAX} is {speeds[JAX] / speed:.2f} times as fast"
            )
        ratios = {f"{task}/ceiling": speeds[JAX] / limit}
        for kind, names in (("eager", EAGER), ("compile", COMPILED)):
            fastest = max((speeds[name] for name in names if name in speeds), default=None)
            if fastest:
                ratios[f"{task}/{kind}"] = speeds[JAX] / fastest
        summary["tasks"][task] = {"images_per_second": speeds, "ratios": ratios}
    return summary


def processor() -> str:
    """The CPU's name, family and model: virtual machines often hide the name."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line)
    known = {name.strip(): value.strip() for name, value in fields.items()}
    names = [name for name in ("model name", "cpu family", "model") if name in known]
    return ", ".join(f"{name} {known[name]}" for name in names) or platform.machine()


def how_made(folder: pathlib.Path, options: argparse.Namespace) -> dict:
    """Options, processor, versions and date."""
    from dico_jax.benchmarking.report import about

    return {
        "options": {k: v for k, v in vars(options).items() if "child" not in k},
        "processor": processor(),
        "pytorch": json.loads((folder / _TORCH).read_text()),
        **about(),
    }


def check_bars(summary: dict, options: argparse.Namespace) -> bool:
    """Prints the bars that these options have; whether all are met."""
    settings = options.model, options.batch_size, options.dtype, options.device
    bars = BARS.get(settings, {}) if options.image_size == 256 else {}
    ratios = {k: v for task in summary["tasks"].values() for k, v in task["ratios"].items()}
    passed = True
    print()
    for name, bar in bars.items():
        if name in ratios:
            print(f"{name}: {ratios[name]:.2f} (bar {bar})")
            passed &= ratios[name] >= bar
    return passed


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reference", required=True, help="a checkout of the released code")
    parser.add_argument("--torch_python", help="a Python with torch and numpy [this one]")
    parser.add_argument("--model", default="DiCo-S", help="[%(default)s]")
    parser.add_argument("--batch_size", type=int, default=8, help="[%(default)s]")
    parser.add_argument("--image_size", type=int, default=256, help="[%(default)s]")
    parser.add_argument("--dtype", choices=list(MAX_DISTANCE), default="float32")
    parser.add_argument("--tf32", action="store_true", help="TF32 products in float32, on a GPU")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--tasks", nargs="+", choices=["forward", "gradient"],
                        default=["forward", "gradient"])  # fmt: skip
    parser.add_argument("--sides", nargs="+", choices=[*EAGER, *COMPILED],
                        default=[*EAGER, *COMPILED])  # fmt: skip
    parser.add_argument("--ceiling_size", type=int, default=4096, help="side of the matrices")
    parser.add_argument("--rounds", type=int, default=5, help="[%(default)s]")
    parser.add_argument("--seconds", type=float, default=2.0, help="per measurement [%(default)s]")
    parser.add_argument("--out", help="a new .json file for the figures")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--child_folder", type=pathlib.Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def refuse(message: str) -> NoReturn:
    """Ends the program for wrong usage."""
    print(message, file=sys.stderr)
    sys.exit(2)


def check_usage(options: argparse.Namespace) -> None:
    """Refuses what cannot be done as asked, before anything is measured."""
    from dico_jax import create_model
    from dico_jax.errors import UsageError
    from dico_jax.files import result_path

    try:
        step = LATENT_STEP * create_model(options.model).size_divisor
        if options.out:
            result_path(options.out, ".json")
    except UsageError as error:
        refuse(str(error))
    if options.image_size < step or options.image_size % step:
        refuse(f"--image_size={options.image_size}: use a multiple of {step}")
    for name in ("batch_size", "ceiling_size", "rounds"):
        if getattr(options, name) < 1:
            refuse(f"--{name}={getattr(options, name)}: use 1 or more")
    if not (pathlib.Path(options.reference) / f"{family(options)}.py").is_file():
        refuse(
            f"--reference={options.reference} has no {family(options)}.py: name a checkout of "
            "https://github.com/shallowdream204/DiCo"
        )
    check_torch(options)


def check_torch(options: argparse.Namespace) -> None:
    """Refuses a Python without what the released code needs, or without the GPU."""
    python = options.torch_python or sys.executable
    needed = "torch, numpy" if options.model.startswith("DiCo") else "torch, numpy, timm"
    code = f"import {needed}"
    if options.device == "cuda":
        code += "; torch.cuda.get_device_name()"
    try:
        subprocess.run([python, "-c", code], check=True, capture_output=True, text=True)
    except OSError as error:
        refuse(f"--torch_python={python} does not run ({error.strerror}): name a Python")
    except subprocess.CalledProcessError as error:
        why = (error.stderr.strip() or f"exit status {error.returncode}").splitlines()[-1]
        refuse(f"{python} fails at '{code}' ({why}): name one that does it, --torch_python=PATH")


def main() -> None:
    """Measures and prints; exits 1 when a bar is not met, 2 for wrong usage."""
    options = parse_arguments()
    if options.child == "weights":
        write_weights(options.child_folder, options)
    elif options.child:
        make = jax_tasks if options.child == JAX else functools.partial(torch_tasks, options.child)
        serve(make(options.child_folder, options))
    else:
        check_usage(options)
        sys.exit(0 if compare(options) else 1)


def compare(options: argparse.Namespace) -> bool:
    """All of it; whether the bars are met."""
    from dico_jax.files import write_json

    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write_inputs(folder, options)
        write_weights_in_torch(folder, options)
        made = how_made(folder, options)
        times: dict[tuple[str, str], float] = {}
        for task in options.tasks:
            programs = start(folder, task, options)
            distances = compare_outputs(folder, options)
            measured = medians(programs, [task, CEILING], options.rounds, options.seconds)
            for key, seconds in measured.items():  # the best of the matrix products
                times[key] = min(seconds, times.get(key, seconds))
            for program in programs:
                program.close()
    summary = summarise(times, options)
    if options.out:
        figures = made | {"distances_over_peak": distances} | summary
        write_json(pathlib.Path(options.out), figures)
    return check_bars(summary, options)


if __name__ == "__main__":
    main()
