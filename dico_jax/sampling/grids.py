"""Grids of images as one picture."""

import math
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_MIN_CELL, _MIN_CAPTIONED = 64, 160  # smaller pictures, or ones alone above a caption, grow to it
_MAX_SHEET = 5120  # pixels; pictures that would make more side by side are shrunk
_GAP, _LINES = 2, 4  # pixels; of a caption
_ROW = 10  # pictures with one caption that stand side by side, however few there are in all


def image_grid(
    groups: Sequence[np.ndarray], captions: Sequence[str], title: str = ""
) -> np.ndarray:
    """Groups of uint8 images (N, H, W, 1 or 3), each above its caption: uint8 (H, W, 3).

    There are about as many rows as columns: groups stand side by side, or a group is a row or a
    block of several. Long captions are cut. A `title` stands above all.
    """
    each, total = max(map(len, groups)), sum(map(len, groups))
    wide = min(each, max(_ROW, math.ceil(total**0.5)))  # pictures of a group side by side
    places = len(groups) * math.ceil(each / wide) * wide  # with those that smaller groups leave
    beside = min(max(1, round(math.ceil(places**0.5) / wide)), len(groups))  # groups side by side
    least = _MIN_CAPTIONED if each == 1 else _MIN_CELL
    sized = [_pictures(images, least, _MAX_SHEET // (wide * beside)) for images in groups]
    width, height = sized[0][0].size
    size = max(12, min(height // 14, 24))
    font, line = ImageFont.load_default(size=size), round(1.25 * size)
    block = wide * (width + _GAP) + (_GAP if each == 1 or beside == 1 else 4 * _GAP)
    texts = [_wrapped(caption, font, block - 2 * _GAP) for caption in captions]
    both = list(zip(sized, texts, strict=True))
    rows = [both[first : first + beside] for first in range(0, len(both), beside)]
    lines = [math.ceil(max(len(pictures) for pictures, _ in row) / wide) for row in rows]
    room = [max(len(text) for _, text in row) * line + 4 * _GAP for row in rows]
    top = _GAP + 2 * line * bool(title)
    total_height = top + sum(lines) * (height + _GAP) + sum(room)
    sheet = Image.new("RGB", (beside * block, total_height), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((_GAP, line // 2), title, fill="black", font=font)
    for row, high, below in zip(rows, lines, room, strict=True):
        for k, (pictures, text) in enumerate(row):
            left = k * block + _GAP
            for i, picture in enumerate(pictures):
                at = left + i % wide * (width + _GAP), top + i // wide * (height + _GAP)
                sheet.paste(picture, at)
            for i, words in enumerate(text):
                at = left, top + high * (height + _GAP) + i * line
                draw.text(at, words, fill="black", font=font)
        top += high * (height + _GAP) + below
    return np.asarray(sheet)


def _pictures(images: np.ndarray, least: int, most: int) -> list[Image.Image]:
    """In RGB, with a longer side of about `least` pixels at least, each repeated, or of `most`."""
    longer = max(images.shape[1:3])
    zoom = max(1, min(least, most) // longer)
    height, width = (n * zoom if longer <= most else n * most // longer for n in images.shape[1:3])
    rgb = np.ascontiguousarray(np.broadcast_to(images, (*images.shape[:3], 3)))
    how = Image.Resampling.NEAREST if longer <= most else Image.Resampling.LANCZOS
    return [Image.fromarray(image).resize((width, height), how) for image in rgb]


def _wrapped(text: str, font: Any, width: int) -> list[str]:
    """Lines of a text that are at most about `width` pixels wide."""
    letter = font.getlength(text) / max(1, len(text)) or 1
    fits = max(1, int(0.93 * width / letter))
    return textwrap.wrap(text, fits, max_lines=_LINES, placeholder=" ...") or [""]


def save_png(path, image: np.ndarray) -> None:
    """Writes uint8 (H, W, 1 or 3) as a PNG file, or into a stream."""
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(path, "PNG")


def is_png(path) -> bool:
    """Whether a file is there and a whole PNG: a power cut leaves empty or cut ones."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.verify()
            return True
    except Exception:  # of many classes
        return False


def load_png(path) -> np.ndarray:
    """Reads a PNG file of `save_png`: uint8 (H, W, 1 or 3)."""
    image = np.asarray(Image.open(path))
    return image[..., None] if image.ndim == 2 else image
