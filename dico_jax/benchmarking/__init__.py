"""How fast the networks are, and what they need; what `python -m dico_jax.benchmark` runs."""

import dataclasses
from typing import Any


def _option(default: Any, meaning: str, **flag: Any) -> Any:
    return dataclasses.field(default=default, metadata={"help": meaning, **flag})


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured, and how; each is a flag of the command, which its help explains."""

    action: str
    model: str = _option("DiCo-S", "Name of the model, such as DiCo-XL or DiT-XL/2.")
    compare: tuple[str, ...] = _option((), "Further models, measured in turn with the first.")
    image_size: int = _option(256, "Side of the images in pixels.")
    batch_size: int = _option(8, "Images per run, over all devices.")
    dtype: str = _option("float32", "Of activations: float32 or bfloat16.")
    num_classes: int = _option(1000, "Classes of the model.")
    scan_blocks: bool = _option(False, "Run equal blocks as one loop.")
    remat: str = _option("none", "train: what is computed again: none, blocks, dots.")
    steps: int = _option(250, "sample: sampling steps.")
    cfg_scale: float = _option(1.4, "sample: guidance scale, 1 for none.")
    warmup: int = _option(2, "Runs that do not count.")
    repeats: int = _option(10, "Runs that count, at least.")
    seconds: float = _option(5.0, "Runs go on for so long.")
    devices: int = _option(0, "Use the first so many devices; 0 for all.")
    matmul_precision: str = _option(
        "default", "Of float32 products.", values=("default", "high", "highest")
    )
    ceiling: bool = _option(True, "Measure matrix products, for the utilisation.")
    ceiling_sizes: tuple[int, ...] = _option((), "Sides of their matrices [by the platform].")
