r"""Weights in from PyTorch and out again, autoencoders, the Inception network and CLIP in.

python -m dico_jax.convert from_pytorch --input=FILE --out=DIR
    [--model=DiCo-XL --weights=auto|ema|model|NAME --image_size=256 --training]
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

python -m dico_jax.convert clip --input=FILE|DIR --out=FILE.safetensors
    DIR: CLIP, or one of its towers, as transformers writes it; or a FILE in one, also hf://.
    The result, with the tokenizer, is for config.text.path and --clip of evaluate.

With --training the whole state of a run goes over: both sets of weights, AdamW's averages and step.
"""

import importlib
from collections.abc import Mapping
from typing import Any

from absl import flags

from dico_jax import cli
from dico_jax.errors import UsageError

flags.DEFINE_string("input", None, "from_pytorch, vae, inception, clip: the file to read.")
flags.DEFINE_string("ckpt", None, "to_pytorch: workdir of a run, or a converted checkpoint.")
flags.DEFINE_string("out", None, "What to write: a new folder, or a new file.")
_WEIGHTS = flags.DEFINE_string(
    "weights", None,
    "from_pytorch: ema, model, or auto, the averaged ones where there are some; or the name of a "
    "set in the file [auto]. to_pytorch: ema or params [ema].",
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
flags.DEFINE_float("scaling_factor", None, "vae: of its latents [config.json's, or 0.18215].")
flags.DEFINE_integer("step", None, "to_pytorch: of the checkpoint [the newest].")

_ACTIONS = {
    "from_pytorch": ("input out", "model weights image_size num_classes num_heads training"),
    "to_pytorch": ("ckpt out", "weights step training"),
    "vae": ("input out", "norm_num_groups scaling_factor"),
    "inception": ("input out", ""),
    "clip": ("input out", ""),
}
_MODULES = {"vae": "autoencoders.weights", "inception": "evaluation.inception_weights"}
_MODULES["clip"] = "text.clip_weights"


def main(action: str) -> None:
    """Parses flags and converts."""
    if _WEIGHTS.present and _TRAINING.value:
        raise UsageError("--weights: with --training all weights are converted; leave it out")
    needed, optional = (names.split() for names in _ACTIONS[action])
    options = {n: value for n in optional if (value := flags.FLAGS[n].value) is not None}
    # Late imports: --help answers before JAX is imported.
    options |= _of_configs() if action == "to_pytorch" else {}
    module = importlib.import_module(f"dico_jax.{_MODULES.get(action, 'pytorch.conversion')}")
    convert = getattr(module, f"convert_{action}" if action in _MODULES else action)
    print(convert(*(flags.FLAGS[name].value for name in needed), **options))


def _of_configs() -> dict[str, Any]:
    from ml_collections import ConfigDict

    from dico_jax.experiment import experiment_from_config, model_from_config
    from dico_jax.training.optimizer import learning_rate_schedule

    def model_of(config: Mapping[str, Any]) -> Any:
        return model_from_config(ConfigDict(config))

    def side_of(config: Mapping[str, Any]) -> int:
        return experiment_from_config(ConfigDict(config), sizes_alone=True).latent_shape[0]

    def rate_of(config: Mapping[str, Any], step: int) -> float:
        optimizer = ConfigDict(config["optimizer"])
        return float(learning_rate_schedule(optimizer, config["training"]["num_steps"])(step))

    return {"model_of": model_of, "side_of": side_of, "rate_of": rate_of}


if __name__ == "__main__":
    cli.run(main, _ACTIONS)
