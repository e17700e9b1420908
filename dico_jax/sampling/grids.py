"""Grids of images as one picture."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_MIN_CELL = 64  # smaller images are enlarged, pixel by pixel, to at least this side
_GAP = 2


def image_grid(rows: Sequence[np.ndarray], labels: Sequence[str]) -> np.ndarray:
    """Rows of uint8 images (N, H, W, 1 or 3), each with a label at its left: uint8 (H, W, 3)."""
    height, width = rows[0].shape[1:3]
    zoom = max(1, _MIN_CELL // max(height, width))
    height, width, columns = height * zoom, width * zoom, max(map(len, rows))
    font = ImageFont.load_default(size=max(12, min(height // 4, 32)))
    margin = round(max(font.getlength(text) for text in labels)) + 12
    size = margin + columns * (width + _GAP) + _GAP, len(rows) * (height + _GAP) + _GAP
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for r, (images, label) in enumerate(zip(rows, labels, strict=True)):
        top = _GAP + r * (height + _GAP)
        draw.text((margin - 6, top + height // 2), label, fill="black", font=font, anchor="rm")
        for c, image in enumerate(images):
            rgb = np.ascontiguousarray(np.broadcast_to(image, (*image.shape[:2], 3)))
            cell = Image.fromarray(rgb).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(cell, (margin + _GAP + c * (width + _GAP), top))
    return np.asarray(sheet)


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
