r"""A page to try checkpoints: python -m dico_jax.app --ckpt=DIR

python -m dico_jax.app --ckpt=DIR [--ckpt=DIR2 ...]
    Serves a page on this machine: pictures that become clear while they are made, links that make
    them again, two checkpoints or settings side by side, walks between classes and seeds.

Flags of sampling say what the page begins with, and what it has no control for. docs/app.md shows
it. Needs pip install 'dico_jax[app]'.
"""

import importlib.util
from typing import Any

from absl import flags

from dico_jax import cli
from dico_jax.errors import UsageError
from dico_jax.sampling import flags as sampler_flags

_CKPT = flags.DEFINE_multi_string(
    "ckpt", [],
    "Workdir of a run, a converted checkpoint, or a file of PyTorch weights; also hf://OWNER/REPO. "
    "Again for others to compare with.",
)  # fmt: skip
_MAX_IMAGES = flags.DEFINE_integer("max_images", 16, "Pictures at once, at most.", 1, 256)
_HOST = flags.DEFINE_string(
    "host", "127.0.0.1", "Address to serve on: this machine alone; 0.0.0.0: whoever reaches it."
)
_PORT = flags.DEFINE_integer("port", 7860, "Port; 0: one that is free.", 0, 65535)
for _module in (cli, sampler_flags):
    flags.adopt_module_key_flags(_module)  # so that --help shows them


def main() -> None:
    """Reads the checkpoints and serves the page."""
    if not _CKPT.value:
        raise UsageError("--ckpt is missing: name a checkpoint")
    asked = sampler_flags.asked()
    if importlib.util.find_spec("gradio") is None:
        raise UsageError("the page needs gradio: pip install 'dico_jax[app]'")
    sampler_flags.use_all_cores(_CKPT.value[0])
    # Late imports: --help answers before JAX and gradio are there.
    from dico_jax.experiment import sampling_from_config
    from dico_jax.playground.player import Player, checkpoint_names
    from dico_jax.sampling.pretrained import Pretrained
    from dico_jax.sampling.sampler import Sampler

    how: Any = sampler_flags.sampler_arguments(None)
    seed, overrides = how.pop("seed"), how.pop("overrides")
    names = checkpoint_names(_CKPT.value)
    samplers = {}
    for name, source in zip(names, _CKPT.value, strict=True):
        pretrained = Pretrained(source, **how)
        pretrained.config.sampling.update(overrides)
        sampling_from_config(pretrained.config)  # which refuses what is none
        # Read now: a run that goes on deletes its older checkpoints.
        pretrained.params, pretrained.settings  # noqa: B018
        samplers[name] = Sampler(pretrained)
    player = Player(samplers, _MAX_IMAGES.value, seed, **asked)
    from dico_jax.playground.page import serve

    serve(player, f"dico_jax: {', '.join(names)}", _HOST.value, _PORT.value)


if __name__ == "__main__":
    cli.run(main)
