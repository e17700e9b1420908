r"""Weights in from PyTorch and out again, autoencoders and the Inception network in.

python -m dico_jax.convert from_pytorch --input=FILE --out=DIR
    [--model=DiCo-XL --weights=auto|ema|model --image_size=256 --training]
    FILE: .pt, .pth, .safetensors, an index of .safetensors, or hf://OWNER/REPO/FILE.
    DIR: a checkpoint for sample, evaluate, and config.training.init_from of main.

python -m dico_jax.convert to_pytorch --ckpt=DIR --out=FILE.pt|FILE.safetensors
    [--weights=ema|params --step=N --training]

python -m dico_jax.convert vae --input=FILE|DIR --out=FILE.safetensors
    [--norm_num_groups=32 --scaling_factor=0.18215]
    FILE: an AutoencoderKL in the layout of diffusers, or hf://OWNER/REPO/FILE; DIR: with its
    config.json. The result is for config.autoencoder.path and --vae of sample.

python -m dico_jax.convert inception --input=FILE --out=FILE.safetensors
    FILE: pt_inception-2015-12-05-6726825d.pth or weights-inception-2015-12-05-6726825d.pth. The
    result is for --inception of evaluate.

With --training the whole state of a run goes over: both sets of weights, AdamW's averages and step.
"""

from collections.abc import Mapping
from typing import Any

from absl import flags

from dico_jax import cli
from dico_jax.errors import UsageError

flags.DEFINE_string("input", None, "from_pytorch, vae, inception: the file to read.")
flags.DEFINE_string("ckpt", None, "to_pytorch: workdir of a run, or a converted checkpoint.")
flags.DEFINE_string("out", None, "What to write: a new folder, or a new file.")
_WEIGHTS = flags.DEFINE_string(
    "weights", None,
    "from_pytorch: ema, model, or auto, the averaged ones where there are some [auto]. "
    "to_pytorch: ema or params [ema].",
)  # fmt: skip
_TRAINING = flags.DEFINE_bool("training", False, "Convert the whole state of a training run.")
flags.DEFINE_string("model", None, "from_pytorch: its name [found from the shapes].")
for _name, _text in {
    "image_size": "from_pytorch: side of the images in pixels [the run's, or 256].",
    "num_classes": "from_pytorch: number of classes [one less than rows in the label table].",
    "num_heads": "from_pytorch: attention heads of a DiT [its args', or those of the width].",
    "norm_num_groups": "vae: groups of its GroupNorm [config.json beside the file, or 32].",
}.items():
    flags.DEFINE_integer(_name, None, _text, lower_bound=1)
flags.DEFINE_float(
    "scaling_factor", None, "vae: of its latents [config.json beside the file, or 0.18215].",
)  # fmt: skip
flags.DEFINE_integer("step", None, "to_pytorch: of the checkpoint [the newest].")

_ACTIONS = {
    "from_pytorch": ("input out", "model weights image_size num_classes num_heads training"),
    "to_pytorch": ("ckpt out", "weights step training"),
    "vae": ("input out", "norm_num_groups scaling_factor"),
    "inception": ("input out", ""),
}
_WEIGHTS_OF = {"from_pytorch": ("auto", "ema", "model"), "to_pytorch": ("ema", "params")}


def main(action: str) -> None:
    """Parses flags and converts."""
    _check(action)
    given = {name: flags.FLAGS[name].value for name in " ".join(_ACTIONS[action]).split()}
    print(_CONVERT[action](**{name: value for name, value in given.items() if value is not None}))


# Late imports: --help answers before JAX is imported.


def _from_pytorch(input: str, out: str, **options: Any) -> str:
    from dico_jax.pytorch.conversion import from_pytorch

    return from_pytorch(input, out, **options)


def _to_pytorch(ckpt: str, out: str, **options: Any) -> str:
    from ml_collections import ConfigDict

    from dico_jax.experiment import experiment_from_config
    from dico_jax.pytorch.conversion import to_pytorch
    from dico_jax.training.optimizer import learning_rate_schedule

    def side_of(config: Mapping[str, Any]) -> int:
        return experiment_from_config(ConfigDict(config)).latent_shape[0]

    def rate_of(config: Mapping[str, Any], step: int) -> float:
        optimizer = ConfigDict(config["optimizer"])
        return float(learning_rate_schedule(optimizer, config["training"]["num_steps"])(step))

    return to_pytorch(ckpt, out, side_of=side_of, rate_of=rate_of, **options)


def _vae(input: str, out: str, **options: Any) -> str:
    from dico_jax.autoencoders.weights import convert_vae

    return convert_vae(input, out, **options)


def _inception(input: str, out: str) -> str:
    from dico_jax.evaluation.inception_weights import convert_inception

    return convert_inception(input, out)


_CONVERT = {f.__name__[1:]: f for f in (_from_pytorch, _to_pytorch, _vae, _inception)}


def _check(action: str) -> None:
    if _WEIGHTS.present and _WEIGHTS.value not in _WEIGHTS_OF[action]:
        fix = f": {action} knows {', '.join(_WEIGHTS_OF[action])}"
        raise UsageError("--weights", _WEIGHTS.value, fix)
    if _WEIGHTS.present and _TRAINING.value:
        raise UsageError("--weights: with --training all weights are converted; leave it out")


if __name__ == "__main__":
    cli.run(main, _ACTIONS)
