"""Pictures as files and arrays have them, to square uint8 pixels.

The crop is that of the published code: halved with a box filter while both sides stay at least
twice the size, resized bicubically so that the shorter side fits, and cut out of the middle.
"""

import dataclasses
import functools
import io
import re
import warnings
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

# Pillow refuses larger pictures, as such files are made to fill the memory; 2 * 13,377 squared.
MAX_PIXELS = 178_956_970

# Formats whose files Pillow knows but does not decode itself: write-only ones, and those that need
# another program (Ghostscript) or a handler.
_UNREADABLE = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "PALM", "PDF", "WMF"}

_PILLOW = r"PIL\b"
_IGNORE_PILLOW = ("ignore", None, Warning, re.compile(_PILLOW), 0)


class BadExample(Exception):  # noqa: N818 - what it tells of is the example
    """An example that cannot be read or decoded. Its text is the reason, in one line."""


def one_line(error: Exception) -> str:
    """An error's text without line breaks."""
    return " ".join(str(error).split())


@dataclasses.dataclass(frozen=True)
class PictureReader:
    """Pictures to uint8 (size, size, channels): decoded, cropped, mirrored.

    Attributes:
      size: side of the cropped picture in pixels.
      channels: 1 or 3.
      exif_rotation: whether to turn pictures as their EXIF data say.
    """

    size: int
    channels: int
    exif_rotation: bool = False

    def __call__(self, image: Any, mirrored: bool) -> np.ndarray:
        """The array of an encoded picture or of uint8 pixels (H, W, C).

        Raises:
          BadExample: it cannot be decoded.
        """
        picture = load_picture(image, **dataclasses.asdict(self))
        return picture[:, ::-1] if mirrored else picture


def load_picture(
    image: bytes | np.ndarray, *, size: int, channels: int, exif_rotation: bool
) -> np.ndarray:
    """The square middle of a picture.

    Transparent pictures are laid over white, 16-bit grey is scaled to 8 bits, and of animated ones
    the first frame is taken. From the first call on, Pillow's warnings are ignored: what they tell
    of is either an error here or of no matter for the pixels.

    Args:
      image: an encoded picture, or uint8 pixels (H, W, 1 or 3). Pixels that have the wanted shape
        are returned as they are.
      size: side of the result in pixels.
      channels: 3 for RGB or 1 for grey.
      exif_rotation: whether to turn the picture as its EXIF data say; EXIF data that cannot be read
        say nothing.

    Returns:
      uint8 (size, size, channels), possibly read-only.

    Raises:
      BadExample: it cannot be decoded, is too large or too narrow, or its values have no agreed
        meaning as pixels.
    """
    if isinstance(image, np.ndarray):
        if image.shape == (size, size, channels) and image.dtype == np.uint8:
            return image
        picture = _from_pixels(image)
    else:
        picture = _decode(image, size, exif_rotation)
    if channels == 1 and picture.mode != "L":
        picture = picture.convert("L")
    pixels = np.asarray(center_crop(picture, size))
    if pixels.ndim == 2:  # grey channels stay equal in the crop, so one is enough
        return np.repeat(pixels[:, :, None], channels, axis=2)
    return pixels


def load_whole_picture(data: bytes) -> np.ndarray:
    """All of an encoded picture, see `load_picture`: uint8 (H, W, 1 or 3).

    Raises:
      BadExample: it cannot be decoded, or its values have no agreed meaning as pixels.
    """
    pixels = np.asarray(_decode(data, size=1, exif_rotation=False))
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _decode(data: bytes, size: int, exif_rotation: bool) -> Image.Image:
    """An encoded picture, its first frame, in mode "L" or "RGB"; see `load_picture`."""
    if warnings.filters[:1] != [_IGNORE_PILLOW]:  # catch_warnings is not safe with threads
        warnings.filterwarnings("ignore", module=_PILLOW)
    # Pillow's decoders raise errors of any class for damaged data. They read from memory here, so
    # that none of them tells of a disk or network.
    try:
        picture: Image.Image = Image.open(io.BytesIO(data), formats=_formats())
        _check_size(picture.size, size)
        picture.load()
        if exif_rotation and _is_rotated(picture):
            picture = ImageOps.exif_transpose(picture)
        return _plain(picture)
    except BadExample:
        raise
    except Image.DecompressionBombError as error:
        _check_size(_declared_size(data), size)
        raise BadExample(str(error)) from error
    except UnidentifiedImageError as error:
        start = f"starts with {data[:12]!r}" if data else "is empty"
        raise BadExample(f"no picture in a format that Pillow reads ({start})") from error
    except Exception as error:
        raise BadExample(f"{type(error).__name__}: {one_line(error)}".rstrip(": ")) from error


def center_crop(picture: Image.Image, size: int) -> Image.Image:
    """The middle of a picture at (size, size), as the published code makes it.

    Raises:
      BadExample: the picture is too large, or so narrow that it would become so.
    """
    _check_size(picture.size, size)
    while min(picture.size) >= 2 * size:
        picture = picture.resize([side // 2 for side in picture.size], Image.Resampling.BOX)
    scale = size / min(picture.size)
    width, height = (round(side * scale) for side in picture.size)
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    if width == height:
        return picture
    left, top = (width - size) // 2, (height - size) // 2
    return picture.crop((left, top, left + size, top + size))


@functools.cache
def picture_suffixes() -> frozenset[str]:
    """The suffixes of the files that can be read, in lower case, with the dot."""
    known = Image.registered_extensions().items()
    return frozenset(suffix for suffix, name in known if name not in _UNREADABLE)


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in Image.ID if name not in _UNREADABLE)


def _check_size(picture_size: tuple[int, int], size: int) -> None:
    """Refuses a picture before it takes the memory: decoded, or with a short side of `size`."""
    width, height = picture_size
    if width * height > MAX_PIXELS:
        raise BadExample(f"{width}x{height} pixels are too many: the limit is {MAX_PIXELS}")
    if size * size * max(width, height) > MAX_PIXELS * min(width, height):
        raise BadExample(f"{width}x{height} pixels are too narrow to cut a square out of")


def _declared_size(data: bytes) -> tuple[int, int]:
    """The size in a picture's header, where `Image.open` refuses to tell it; (1, 1) if unknown."""
    for name in _formats():
        factory, accept = Image.OPEN[name]
        if accept is not None and accept(data[:16]) is True:
            try:
                return factory(io.BytesIO(data), "").size
            except Exception:  # WebP's refuses it too
                break
    return (1, 1)


def _is_rotated(picture: Image.Image) -> bool:
    try:
        return picture.getexif().get(ExifTags.Base.Orientation) in range(2, 9)
    except Exception:  # EXIF data are damaged in as many ways as pictures are
        return False


def _plain(picture: Image.Image) -> Image.Image:
    """A loaded picture in mode "L" or "RGB"."""
    mode = picture.mode
    if mode.startswith("I"):
        return _from_wide_grey(picture)
    if mode == "F" or mode == "LAB":
        raise BadExample(f"pixels of mode {mode} cannot be shown as they are: save it as RGB")
    if picture.has_transparency_data:
        return _over_white(picture.convert("RGBA"))
    if mode == "1":
        return picture.convert("L")
    return picture if mode in ("L", "RGB") else picture.convert("RGB")


def _over_white(picture: Image.Image) -> Image.Image:
    alpha = picture.getchannel("A")
    if alpha.getextrema() == (255, 255):
        return picture.convert("RGB")
    paper = Image.new("RGB", picture.size, "white")
    paper.paste(picture, mask=alpha)
    return paper


def _from_wide_grey(picture: Image.Image) -> Image.Image:
    """Grey of 16 bits, in a mode of 16 or 32, to 8 bits: 257 of its steps are one."""
    values = np.asarray(picture).astype(np.int32)
    transparent = picture.info.get("transparency")
    if isinstance(transparent, int):
        values[values == transparent] = 65535
    if values.min() < 0 or values.max() > 65535:
        raise BadExample(
            f"grey values from {values.min()} to {values.max()} cannot be shown as they are: "
            "save it with 8 or 16 bits"
        )
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def _from_pixels(pixels: np.ndarray) -> Image.Image:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in (1, 3):
        raise BadExample(
            f"an array {pixels.dtype} {pixels.shape} is no picture: uint8 (H, W, 1 or 3) is"
        )
    if not pixels.size:
        raise BadExample(f"an array of shape {pixels.shape} has no pixels")
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
