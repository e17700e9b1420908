r"""What a trained network does inside: the paper's evidence, measured on any checkpoint.

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

_OUT = flags.DEFINE_string("out", None, "New or empty folder for the result and its figures.")
_MODELS = flags.DEFINE_list(
    "models", ["DiCo-S", "DiT-S/2", "DiCo-XL", "DiT-XL/2"], "cost: published sizes."
)
_IMAGE_SIZES = flags.DEFINE_list(
    "image_sizes", ["256", "512", "1024"], "cost: sides of the images in pixels."
)
flags.adopt_module_key_flags(cli)  # so that --help shows it

_ACTIONS = {"cost": ("out", "models image_sizes")}


def main(action: str) -> None:
    """Parses flags, measures, prints and writes."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError(f"{action} draws with matplotlib: pip install 'dico_jax[plot]'")
    # Late imports: --help answers before JAX is imported.
    from dico_jax.files import check_new

    check_new(str(_OUT.value), 0)
    result, figures = _cost()
    _write(action, result, figures)


def _cost() -> Any:
    from dico_jax.analysis import cost

    names = cost.check_models(_MODELS.value)
    rows = cost.measure(names, cost.check_sizes(_IMAGE_SIZES.value, names))
    print(cost.table(rows))
    return {"models": rows}, cost.figures(rows)


def _write(action: str, result: dict[str, Any], figures: Any) -> None:
    """Writes what was measured, how it was made, and the figures: whole, or not at all."""
    from dico_jax.benchmarking.report import about
    from dico_jax.files import new_folder, write_json
    from dico_jax.reporting.figures import save_figures

    how = {"argv": ["dico_jax.analyze", action, *sys.argv[1:]], **about()}
    with new_folder(str(_OUT.value)) as folder:
        names = save_figures(figures, folder)
        write_json(folder / f"{action}.json", {"action": action, **result, **how})
    print(f"{action}.json and {', '.join(names)} (.png, .pdf) are in {_OUT.value}")


if __name__ == "__main__":
    cli.run(main, _ACTIONS)
