r"""What a trained network does inside: the paper's evidence, measured on any checkpoint.

python -m dico_jax.analyze channels --ckpt=DIR [--ckpt=DIR2 ...] --out=DIR
    How redundant channels are, block by block, and the spectrum of the predicted noise.
python -m dico_jax.analyze attention --ckpt=DIT --out=DIR
    How far a DiT's attention looks, and what is left of the output in a window.
python -m dico_jax.analyze cost --out=DIR [--models=DiCo-S,DiT-S/2 --image_sizes=256,512,1024]
    Parameters, multiply-adds and activation bytes by stage.

Writes JSON, PNG and PDF into a new folder; docs/analysis.md explains the measures. Needs
pip install 'dico_jax[plot]'.
"""

import importlib.util
import sys
from typing import Any

from absl import flags

from dico_jax import cli
from dico_jax.errors import UsageError
from dico_jax.sampling import flags as sampler_flags

_OUT = flags.DEFINE_string("out", None, "New or empty folder for the result and its figures.")
_CKPTS = flags.DEFINE_multi_string(
    "ckpt", [],
    "Workdir of a run, a converted checkpoint, or a file of PyTorch weights; also hf://OWNER/REPO.",
)  # fmt: skip
_IMAGES = flags.DEFINE_string(
    "images", "samples",
    "What is noised: 'samples' of the checkpoint, 'data' of its config, or a folder of pictures "
    "with a subfolder for each of its classes.",
)  # fmt: skip
_NUM_IMAGES = flags.DEFINE_integer("num_images", 32, "Number of images.", 1, 100_000)
_NUM_TIMES = flags.DEFINE_integer("num_times", 8, "Times, from clean data to noise.", 1, 1000)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Images at a time.", lower_bound=1)
_LAYERS = flags.DEFINE_list("layers", [], "Blocks to look at, such as latent/0,latent/3 [all].")
_MODELS = flags.DEFINE_list("models", "DiCo-S,DiT-S/2,DiCo-XL,DiT-XL/2", "cost: published sizes.")
_IMAGE_SIZES = flags.DEFINE_list("image_sizes", "256,512,1024", "cost: pixels of a side.")
for _module in (cli, sampler_flags):
    flags.adopt_module_key_flags(_module)  # so that --help shows them

_LOOK = f"images num_images num_times batch_size layers {' '.join(sampler_flags.NAMES)}"
_ACTIONS = {"channels": ("ckpt out", _LOOK), "attention": ("ckpt out", _LOOK)}
_ACTIONS |= {"cost": ("out", "models image_sizes")}
_OF_NETWORKS = {"step", "weights", "ema_width", "vae", "text_encoder", "seed"}


def main(action: str) -> None:
    """Parses flags, measures, prints and writes."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError(f"{action} draws with matplotlib: pip install 'dico_jax[plot]'")
    for name in sorted({*sampler_flags.NAMES} - _OF_NETWORKS) if _IMAGES.value != "samples" else ():
        if flags.FLAGS[name].present:
            raise UsageError(f"--{name} is for --images=samples, not for --images={_IMAGES.value}")
    if flags.FLAGS["layers"].present and not _LAYERS.value:
        raise UsageError("--layers", "", "is empty: name blocks, or leave it out for all")
    # Late imports: --help answers before JAX is imported.
    from dico_jax.files import check_new, library_versions, new_folder, write_json

    check_new(str(_OUT.value), 0)
    if action == "cost":
        from dico_jax.analysis import cost

        rows = cost.measure(_MODELS.value, cost.check(_MODELS.value, _IMAGE_SIZES.value))
        print(cost.table(rows))
        result, figures = {"models": rows}, cost.figures(rows)
    else:
        result, figures = _look(action)
    from dico_jax.reporting.figures import save_figures

    about = {"argv": ["dico_jax.analyze", action, *sys.argv[1:]], "versions": library_versions()}
    with new_folder(str(_OUT.value)) as folder:  # there whole, or not at all
        names = save_figures(figures, folder)
        write_json(folder / f"{action}.json", {"action": action, **about, **result})
    print(f"{action}.json and {', '.join(names)} (.png, .pdf) are in {_OUT.value}")


def _look(action: str) -> Any:
    ckpts, images, asked = _CKPTS.value, _IMAGES.value, sampler_flags.asked()
    sampler_flags.use_all_cores(*ckpts)
    from dico_jax.analysis import attention, channels
    from dico_jax.analysis.subjects import give_images, open_subjects

    how = sampler_flags.sampler_arguments(_BATCH_SIZE.value)
    subjects = open_subjects(ckpts, images, _NUM_TIMES.value, _LAYERS.value, how)
    if action == "attention":
        attention.check(subjects)
    for subject in subjects:
        give_images(subject, images, _NUM_IMAGES.value, asked)
    names = [ckpt.rstrip("/").rpartition("/")[2] for ckpt in ckpts]
    by_name = dict(zip(names if len({*names}) == len(names) else ckpts, subjects, strict=True))
    looking: Any = attention if action == "attention" else channels
    measured = {name: looking.measure(subject) for name, subject in by_name.items()}
    drawn = looking.figures({name: dict(found) for name, found in measured.items()})
    for name, found in measured.items():
        found.pop("maps", None)  # are pictures alone
        measured[name] = {"network": by_name[name].about(images), **found}
    return {"networks": measured}, drawn


if __name__ == "__main__":
    cli.run(main, _ACTIONS)
