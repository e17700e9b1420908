"""Pictures of the page as HTML: previews while they are made, then PNG files that say how."""

import base64
import html
import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dico_jax import __version__

KEY = "dico_jax"  # of the text in a PNG file that says how it was made
_SMALL = 96  # pixels; what is smaller is shown larger, each pixel as a square
_TO_PNG = "this.href=this.closest('figure').querySelector('img').src"
_SCRUB = (
    "const w=this.closest('.made'),f=w.querySelectorAll('.pictures img');"
    "w.querySelector('.large').src=f[this.value].src"
)


def png(image: np.ndarray, about: dict[str, Any]) -> bytes:
    """A PNG file of uint8 (H, W, 1 or 3), with how it was made as JSON."""
    info, stream = PngInfo(), io.BytesIO()
    info.add_text("Software", f"dico_jax {__version__}")
    info.add_itxt(KEY, json.dumps(about, ensure_ascii=False))
    _pillow(image).save(stream, "PNG", pnginfo=info)
    return stream.getvalue()


def _preview(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    _pillow(image).save(stream, "WEBP", quality=80, method=0, lossless=max(image.shape) <= _SMALL)
    return stream.getvalue()


def _pillow(image: np.ndarray) -> Image.Image:
    return Image.fromarray(np.asarray(image[..., 0] if image.shape[-1] == 1 else image))


def _url(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def column(
    title: str,
    done: int,
    count: int,
    images: np.ndarray | None,
    captions: Sequence[str],
    about: Sequence[dict[str, Any]] | None,
) -> str:
    """Pictures with captions, and how many steps are done; files to keep where `about` is given."""
    heading = f"<h3>{html.escape(title)}</h3>" if title else ""
    bar = f'<progress max="{count}" value="{done}" aria-label="steps"></progress>'
    state = f"<p>{bar} step {done} of {count}</p>" if done < count else ""
    if images is None:
        return f'<div class="column">{heading}{state}</div>'
    small = " small" if max(images.shape[1:3]) <= _SMALL else ""
    figures = []
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        url = _url("png", png(image, about[i])) if about else _url("webp", _preview(image))
        name, link = html.escape(caption), ""
        if about:
            file = f"{about[i]['checkpoint']}_{i:03d}.png"
            file = html.escape(file)
            link = f'<a href="#" download="{file}" onclick="{_TO_PNG}" title="{file}">PNG</a>'
        alt = name or f"picture {i}"
        said = f"<figcaption><span>{name}</span> {link}</figcaption>"
        figures.append(f'<figure><img src="{url}" alt="{alt}">{said}</figure>')
    shown = f'<div class="pictures">{"".join(figures)}</div>'
    return f'<div class="column{small}">{heading}{state}{shown}</div>'


def slider(images: np.ndarray) -> str:
    """A slider along the pictures below it, which shows one of them large."""
    middle, small = len(images) // 2, " small" * (max(images.shape[1:3]) <= _SMALL)
    span = f'min="0" max="{len(images) - 1}" value="{middle}"'
    url = _url("png", png(images[middle], {}))
    return (
        f'<div class="scrub{small}"><img class="large" src="{url}" alt="on the way">'
        f'<label>Along the way <input type="range" {span} oninput="{_SCRUB}"></label></div>'
    )


def page(columns: Sequence[str], said: str, link: str = "", above: str = "") -> str:
    """Columns side by side, below what is said and what else stands `above` them."""
    again = (
        f' <a class="again" href="{html.escape(link)}">Link to these pictures</a>' if link else ""
    )
    state = f'<p role="status">{html.escape(said)}{again}</p>' if said else ""
    return f'<div class="made">{state}{above}<div class="columns">{"".join(columns)}</div></div>'


def wrong(text: str) -> str:
    """What is said of values that are not to be."""
    return f'<div class="made"><p class="wrong" role="alert">{html.escape(text)}</p></div>'
