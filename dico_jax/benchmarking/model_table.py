"""All published networks: parameters and multiply-adds, beside what their papers say."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax

from dico_jax.errors import UsageError
from dico_jax.models import MODELS, abstract_params, create_model, forward_macs
from dico_jax.models.denoiser import Denoiser

# Of Stable Diffusion's autoencoder, whose latents the published networks see.
_DOWNSAMPLING, _CHANNELS = 8, 4


class Published(NamedTuple):
    """What a paper says of a network, as it is written there; "" for nothing.

    Attributes:
      source: a key of `SOURCES`.
      parameters: such as "33.1M".
      macs: multiply-adds by the side of the images, such as {256: "4.25G"}. The papers call them
        FLOPs.
    """

    source: str
    parameters: str
    macs: Mapping[int, str]


SOURCES = {
    "DiCo": "DiCo, arXiv 2505.11196, and the README of its release",
    "DiT": "DiT, arXiv 2212.09748, table 1 (patches of 4), and the README of its release (XL/2)",
}
PUBLISHED = {
    "DiCo-S": Published("DiCo", "33.1M", {256: "4.25G"}),
    "DiCo-B": Published("DiCo", "130.0M", {256: "16.88G"}),
    "DiCo-L": Published("DiCo", "463.9M", {256: "60.24G"}),
    "DiCo-XL": Published("DiCo", "701.2M", {256: "87.30G"}),
    "DiCo-H": Published("DiCo", "1B", {}),
    "DiT-S/4": Published("DiT", "", {256: "1.4G"}),
    "DiT-B/4": Published("DiT", "", {256: "5.6G"}),
    "DiT-L/4": Published("DiT", "", {256: "19.7G"}),
    "DiT-XL/4": Published("DiT", "", {256: "29.1G"}),
    "DiT-XL/2": Published("DiT", "", {256: "119G", 512: "525G"}),
}
_COLUMNS = ("model", "parameters", "published", "multiply-adds", "published")


def model_table(image_size: int) -> list[dict[str, Any]]:
    """A row per published network, from sizes alone: nothing is computed.

    Args:
      image_size: side of the images in pixels.

    Returns:
      Dicts with "model", "parameters" (trainable), "multiply_adds_per_image" (see `forward_macs`),
      "published_parameters" and "published_multiply_adds_per_image" (text, or None), "source"
      (text, or None).

    Raises:
      UsageError: not every network can have images of this size.
    """
    models = {name: create_model(name) for name, (_, sizes) in MODELS.items() if sizes}
    step = _DOWNSAMPLING * max(model.size_divisor for model in models.values())
    if image_size < step or image_size % step:
        below = image_size // step * step
        choices = [str(size) for size in (below, below + step) if size > 0]
        raise UsageError(
            f"--image_size={image_size} must be a multiple of {step}, which the latents of all "
            f"models divide by: use {' or '.join(choices)}"
        )
    side, rows = image_size // _DOWNSAMPLING, []
    for name, model in models.items():
        published = PUBLISHED.get(name)
        rows.append(
            {
                "model": name,
                "parameters": _count_parameters(model),
                "multiply_adds_per_image": forward_macs(model, (side, side, _CHANNELS)),
                "published_parameters": (published and published.parameters) or None,
                "published_multiply_adds_per_image": published and published.macs.get(image_size),
                "source": published and SOURCES[published.source],
            }
        )
    return rows


def _count_parameters(model: Denoiser) -> int:
    """As `count_parameters`, of a network with one block per stage: equal blocks are not traced."""
    depth: Any = model.depth
    depths = (depth,) if isinstance(depth, int) else depth
    params = abstract_params(model.clone(depth=1 if isinstance(depth, int) else (1,) * len(depth)))

    def size(tree):
        return sum(leaf.size for leaf in jax.tree.leaves(tree))

    return size(params) + sum(
        (blocks - 1) * size(params[stage])
        for stage, blocks in zip(model.stages, depths, strict=True)
    )


def table_text(rows: Iterable[Mapping[str, Any]]) -> str:
    """The rows of `model_table` as a table of Markdown, columns under each other."""
    cells = [
        (
            row["model"],
            f"{row['parameters']:,}",
            row["published_parameters"] or "",
            f"{row['multiply_adds_per_image'] / 1e9:.2f}G",
            row["published_multiply_adds_per_image"] or "",
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(_COLUMNS, *cells, strict=True)]
    rule = [
        "-" * (width if index == 0 else width - 1) + ":" * (index > 0)
        for index, width in enumerate(widths)
    ]

    def line(row):
        padded = [row[0].ljust(widths[0])]
        padded += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return f"| {' | '.join(padded)} |"

    return "\n".join(map(line, (_COLUMNS, rule, *cells)))
