"""Pictures as files and arrays have them, to square uint8 pixels.

The crop is that of the published code: halved with a box filter while both sides stay at least
twice the size, resized bicubically so that the shorter side fits, and cut out of the middle.
"""

import contextlib
import dataclasses
import functools
import io
import math
import threading
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dico_jax.errors import one_line

# Pillow refuses larger pictures, as such files are made to fill the memory; 2 * 13,377 squared.
MAX_PIXELS = 178_956_970
# Large ones take turns, in pieces that malloc gives back: below 32 MB every thread keeps its own.
_ONE_LARGE = threading.Lock()
Image.core.set_block_size(64 << 20)
# Formats whose files Pillow knows but does not decode itself: write-only ones, and those that need
# another program (Ghostscript) or a handler.
_UNREADABLE = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "PALM", "PDF", "WMF"}
# What Pillow warns of is an error here, or of no matter for the pixels.
warnings.filterwarnings("ignore", module=r"PIL\b")


class BadExample(Exception):  # noqa: N818 - what it tells of is the example
    """An example that cannot be read. Its text is the reason, in one line."""


@dataclasses.dataclass(frozen=True)
class PictureReader:
    """Makes the square middle of pictures, `size` pixels, of 3 (RGB) or 1 (grey) `channels`.

    Transparent pictures are laid over white, 16-bit grey is scaled to 8 bits, and of animated ones
    the first frame is taken. EXIF data that are damaged rotate nothing.
    """

    size: int
    channels: int
    exif_rotation: bool = False
    crop: str = "adm"  # a key of `CROPS`

    def __call__(self, image: bytes | np.ndarray, mirrored: bool = False) -> np.ndarray:
        """uint8 (size, size, channels) of an encoded picture or uint8 pixels (H, W, 1 or 3).

        It may be read-only: pixels that have the wanted shape are returned as they are. BadExample
        if it cannot be decoded or its values have no agreed meaning as pixels.
        """
        with contextlib.ExitStack() as turn:
            if not isinstance(image, np.ndarray):
                picture = _decode(image, self.size, self.exif_rotation, turn)
            elif image.shape == (self.size, self.size, self.channels) and image.dtype == np.uint8:
                return image[:, ::-1] if mirrored else image
            else:
                picture = _from_pixels(image)
            if self.channels == 1 and picture.mode != "L":
                picture = picture.convert("L")
            pixels = np.asarray(CROPS[self.crop](picture, self.size))
        if pixels.ndim == 2:  # grey channels stay equal in the crop, so one is enough
            pixels = np.repeat(pixels[:, :, None], self.channels, axis=2)
        return pixels[:, ::-1] if mirrored else pixels


def load_whole_picture(data: bytes) -> np.ndarray:
    """All of an encoded picture, neither cropped nor scaled: uint8 (H, W, 1 or 3)."""
    with contextlib.ExitStack() as turn:
        pixels = np.asarray(_decode(data, size=1, exif_rotation=False, turn=turn))
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def center_crop(picture: Image.Image, size: int) -> Image.Image:
    """The middle of a picture at (size, size), as the published code makes it."""
    _check_size(picture.size, size)
    while min(picture.size) >= 2 * size:
        picture = picture.resize([side // 2 for side in picture.size], Image.Resampling.BOX)
    width, height = (round(side * (size / min(picture.size))) for side in picture.size)
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return picture.crop((left, top, left + size, top + size))


def lanczos_crop(picture: Image.Image, size: int) -> Image.Image:
    """The middle square of a picture, then scaled to (size, size): U-ViT's way with MS-COCO."""
    _check_size(picture.size, size)
    width, height = picture.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    square = picture.crop((left, top, left + side, top + side))
    return square.resize((size, size), Image.Resampling.LANCZOS)


CROPS = {"adm": center_crop, "lanczos": lanczos_crop}


@functools.cache
def picture_suffixes() -> frozenset[str]:
    """The suffixes of the files that can be read, in lower case, with the dot."""
    known = Image.registered_extensions().items()
    return frozenset(suffix for suffix, name in known if name not in _UNREADABLE)


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in Image.ID if name not in _UNREADABLE)


def _decode(data: bytes, size: int, exif_rotation: bool, turn: contextlib.ExitStack) -> Image.Image:
    """An encoded picture, its first frame, in mode "L" or "RGB"; large ones in `turn`."""
    try:  # Pillow's decoders raise errors of any class for damaged data
        picture: Image.Image = Image.open(io.BytesIO(data), formats=_formats())
        heavy = picture.format == "JPEG2000" or picture.has_transparency_data  # times their pixels
        _check_size(picture.size, size, MAX_PIXELS // (8 if heavy else 1))
        if math.prod(picture.size) > MAX_PIXELS // 8:
            turn.enter_context(_ONE_LARGE)
        picture.load()
        if exif_rotation:
            with contextlib.suppress(Exception):  # EXIF data are damaged in many ways, too
                picture = ImageOps.exif_transpose(picture)
        return _plain(picture)
    except BadExample:
        raise
    except UnidentifiedImageError as error:
        start = f"starts with {data[:12]!r}" if data else "is empty"
        raise BadExample(f"no picture in a format that Pillow reads ({start})") from error
    except Exception as error:
        raise BadExample(f"{type(error).__name__}: {one_line(error)}".rstrip(": ")) from error


def _check_size(picture_size: tuple[int, int], size: int, most: int = MAX_PIXELS) -> None:
    """Refuses a picture before it takes the memory: decoded, or with a short side of `size`."""
    short, long = sorted(picture_size)
    if short * long > most or size * size * long > most * short:
        what = f"{picture_size} pixels are too many, or too narrow to cut a square out of"
        raise BadExample(f"{what}: the limit is {most}")


def _plain(picture: Image.Image) -> Image.Image:
    """A loaded picture in mode "L" or "RGB"."""
    mode = picture.mode
    if mode.startswith("I"):
        return _from_wide_grey(picture)
    if mode in ("F", "LAB"):
        raise BadExample(f"pixels of mode {mode} cannot be shown as they are: save it as RGB")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        paper = Image.new("RGB", picture.size, "white")
        paper.paste(picture, mask=picture.getchannel("A"))
        return paper
    return picture if mode in ("L", "RGB") else picture.convert("L" if mode == "1" else "RGB")


def _from_wide_grey(picture: Image.Image) -> Image.Image:
    """Grey of 16 bits, in a mode of 16 or 32, to 8 bits: 257 of its steps are one."""
    values = np.array(picture, np.int32)
    transparent = picture.info.get("transparency")
    if isinstance(transparent, int):
        values[values == transparent] = 65535
    if values.min() < 0 or values.max() > 65535:
        found = f"grey values from {values.min()} to {values.max()}"
        raise BadExample(f"{found} cannot be shown as they are: save it with 8 or 16 bits")
    values += 128
    values //= 257
    return Image.fromarray(values.astype(np.uint8))


def _from_pixels(pixels: np.ndarray) -> Image.Image:
    if pixels.dtype != np.uint8 or pixels.shape[2:] not in ((1,), (3,)) or not pixels.size:
        raise BadExample(f"an array {pixels.dtype} {pixels.shape} is no picture")
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
