"""Grids of images as one picture."""

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_MIN_CELL = 64  # smaller images are enlarged, pixel by pixel, to at least this side
_GAP = 2
_MIN_CAPTION, _CAPTION_LINES = 160, 4  # pixels of a picture above its caption; lines
SIDE = 10  # most pictures side by side


def image_grid(rows: Sequence[np.ndarray], labels: Sequence[str]) -> np.ndarray:
    """Rows of uint8 images (N, H, W, 1 or 3), each with a label at its left: uint8 (H, W, 3)."""
    rows = [_enlarged(images, _MIN_CELL) for images in rows]
    height, width = rows[0].shape[1:3]
    font = ImageFont.load_default(size=max(12, min(height // 4, 32)))
    margin = round(max(font.getlength(text) for text in labels)) + 12
    columns = max(map(len, rows))
    size = margin + columns * (width + _GAP) + _GAP, len(rows) * (height + _GAP) + _GAP
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for r, (images, label) in enumerate(zip(rows, labels, strict=True)):
        top = _GAP + r * (height + _GAP)
        draw.text((margin - 6, top + height // 2), label, fill="black", font=font, anchor="rm")
        _paste(sheet, images, margin + _GAP, top)
    return np.asarray(sheet)


def captioned_grid(groups: Sequence[np.ndarray], captions: Sequence[str]) -> np.ndarray:
    """Groups of uint8 images (N, H, W, 1 or 3), each above its caption: uint8 (H, W, 3).

    Groups stand side by side where ten pictures have room; captions of many lines are cut.
    """
    each = max(map(len, groups))
    groups = [_enlarged(images, _MIN_CAPTION if each == 1 else _MIN_CELL) for images in groups]
    height, width = groups[0].shape[1:3]
    size = max(12, min(height // 14, 24))
    font, line = ImageFont.load_default(size=size), round(1.25 * size)
    block = each * (width + _GAP) + _GAP
    texts = [_wrapped(caption, font, block - 2 * _GAP) for caption in captions]
    beside = min(max(1, SIDE // each), round(len(groups) ** 0.5 + 0.4))
    both = list(zip(groups, texts, strict=True))
    lines = [both[first : first + beside] for first in range(0, len(both), beside)]
    room = [height + 3 * _GAP + line * max(len(text) for _, text in row) for row in lines]
    sheet = Image.new("RGB", (beside * block, sum(room) + _GAP), "white")
    draw, top = ImageDraw.Draw(sheet), _GAP
    for row, high in zip(lines, room, strict=True):
        for k, (images, text) in enumerate(row):
            _paste(sheet, images, k * block + _GAP, top)
            for i, words in enumerate(text):
                at = k * block + _GAP, top + height + _GAP + i * line
                draw.text(at, words, fill="black", font=font)
        top += high
    return np.asarray(sheet)


def _enlarged(images: np.ndarray, least: int) -> np.ndarray:
    """Images whose longer side has at least about `least` pixels, each pixel repeated."""
    zoom = max(1, least // max(images.shape[1:3]))
    return images.repeat(zoom, axis=1).repeat(zoom, axis=2)


def _paste(sheet: Image.Image, images: np.ndarray, left: int, top: int) -> None:
    for image in images:
        rgb = np.ascontiguousarray(np.broadcast_to(image, (*image.shape[:2], 3)))
        sheet.paste(Image.fromarray(rgb), (left, top))
        left += image.shape[1] + _GAP


def _wrapped(text: str, font: Any, width: int) -> list[str]:
    """Lines of a text that are at most about `width` pixels wide."""
    letter = font.getlength(text) / max(1, len(text)) or 1
    fits = max(1, int(0.93 * width / letter))
    return textwrap.wrap(text, fits, max_lines=_CAPTION_LINES, placeholder=" ...") or [""]


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
