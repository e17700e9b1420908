"""From picture files and arrays to square uint8 pixels."""

import concurrent.futures
import functools
import io
import struct
import subprocess
import sys
import threading
import time
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from dico_jax.data import pictures
from dico_jax.data.pictures import MAX_PIXELS, BadExample, PictureReader, picture_suffixes
from tests import golden
from tests.real_data import IMAGENET, requires_data

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def load(data, size=8, channels=3, exif_rotation=False):
    return PictureReader(size, channels, exif_rotation)(data)


def encode(image, kind, **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def halves(left, right, mode="RGB"):
    """8x8 pixels, the left and the right half each in one colour."""
    image = Image.new(mode, (8, 8), left)
    image.paste(right, (4, 0, 8, 8))
    return image


def noise(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def photo_like(width, height):
    """Smooth with some noise, as JPEG likes it."""
    return noise(width // 8 + 1, height // 8 + 1).resize((width, height), Image.Resampling.BICUBIC)


def chunk(tag, data):
    return struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data))


def png(width, height, depth, color_type, rows, *extra):
    """A PNG file from its parts: Pillow cannot write all there are."""
    header = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    chunks = [chunk(b"IHDR", header), *extra, chunk(b"IDAT", data), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def published_crop(image, size):
    """What the released code's center_crop_arr does."""
    image = image.convert("RGB")
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), resample=Image.BOX)
    scale = size / min(*image.size)
    image = image.resize(tuple(round(side * scale) for side in image.size), resample=Image.BICUBIC)
    pixels = np.array(image)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


@golden.requires_golden
@requires_data
def test_crop_is_the_published_one():
    crops = golden.load("center_crop.npz")
    assert len(crops.files) == 10
    for key in crops.files:
        name, size = key.split("@")
        (file,) = IMAGENET.glob(f"*/{name}")
        np.testing.assert_array_equal(load(file.read_bytes(), int(size)), crops[key], key)


@pytest.mark.parametrize(
    "shape", [(64, 64), (65, 97), (640, 131), (31, 40), (127, 500), (9, 64), (129, 128)]
)
def test_crop_of_any_shape(shape):
    image = noise(*shape)
    data = encode(image, "PNG")
    for size in (32, 64):
        np.testing.assert_array_equal(load(data, size), published_crop(image, size))
        np.testing.assert_array_equal(load(np.asarray(image), size), published_crop(image, size))


def test_grey_is_cropped_as_rgb_would_be():
    image = noise(90, 70).convert("L")
    for channels in (1, 3):
        pixels = load(encode(image, "PNG"), 32, channels)
        assert pixels.shape == (32, 32, channels)
        assert pixels.dtype == np.uint8
        np.testing.assert_array_equal(pixels[..., :1], published_crop(image, 32)[..., :1])
        assert (pixels == pixels[..., :1]).all()
    assert load(encode(halves(RED, WHITE), "PNG"), 8, 1)[0, :, 0].tolist() == [76] * 4 + [255] * 4


def palette(transparent=None):
    image = halves(0, 1, "P")
    image.putpalette([*RED, *BLUE])
    return encode(image, "PNG", **({} if transparent is None else {"transparency": transparent}))


def grey16(values, kind):
    pixels = np.repeat(np.array([values], np.uint16), 8, 0).repeat(4, 1)
    return encode(Image.fromarray(pixels), kind)


def frames(kind, **options):
    later = [halves(GREEN, GREEN), halves(WHITE, WHITE)]
    return encode(halves(RED, BLUE), kind, save_all=True, append_images=later, **options)


ROW16 = struct.pack(">12H", *[65535, 0, 0] * 2, *[0, 0, 65535] * 2)

# What is in the file, and the colours of its halves that a person expects to see.
MODES = {
    "grey": (encode(halves(7, 200, "L"), "PNG"), (7, 7, 7), (200, 200, 200)),
    "one bit": (encode(halves(0, 1, "1"), "PNG"), (0, 0, 0), WHITE),
    "two bits": (png(8, 8, 2, 0, [b"\x55\xaa"] * 8), (85, 85, 85), (170, 170, 170)),
    "palette": (palette(), RED, BLUE),
    "palette, one colour transparent": (palette(0), WHITE, BLUE),
    "palette, half transparent": (palette(bytes([128, 255])), (255, 127, 127), BLUE),
    "grey with alpha": (encode(halves((0, 255), (0, 0), "LA"), "PNG"), (0, 0, 0), WHITE),
    "alpha": (encode(halves((255, 0, 0, 255), (0, 0, 0, 0), "RGBA"), "PNG"), RED, WHITE),
    "half alpha": (encode(halves((0, 0, 0, 51), (*BLUE, 255), "RGBA"), "PNG"), (204,) * 3, BLUE),
    "all opaque": (encode(halves((*RED, 255), (*BLUE, 255), "RGBA"), "PNG"), RED, BLUE),
    "one colour transparent": (encode(halves(RED, BLUE), "PNG", transparency=RED), WHITE, BLUE),
    "one grey transparent": (encode(halves(9, 8, "L"), "PNG", transparency=9), WHITE, (8, 8, 8)),
    "CMYK": (
        encode(halves((0, 255, 255, 0), (0, 0, 0, 255), "CMYK"), "TIFF"),
        RED,
        (0, 0, 0),
    ),
    "CMYK, inverted by Adobe": (
        encode(halves((0, 255, 255, 0), (0, 0, 0, 255), "CMYK"), "JPEG", quality=100),
        RED,
        (0, 0, 0),
    ),
    "JPEG": (encode(halves(RED, BLUE), "JPEG", quality=100, subsampling=0), RED, BLUE),
    "TIFF of JPEG": (encode(halves(RED, BLUE), "TIFF", compression="jpeg"), RED, BLUE),
    "16-bit grey PNG": (grey16([257 * 3, 65535], "PNG"), (3, 3, 3), WHITE),
    "16-bit grey TIFF": (grey16([257 * 3 + 128, 0], "TIFF"), (3, 3, 3), (0, 0, 0)),
    "16-bit grey PPM": (grey16([257 * 3 + 129, 65535], "PPM"), (4, 4, 4), WHITE),
    "16-bit grey, one transparent": (
        png(
            8, 8, 16, 0, [struct.pack(">8H", *[1000] * 4, *[0] * 4)] * 8, chunk(b"tRNS", b"\3\xe8")
        ),
        WHITE,
        (0, 0, 0),
    ),
    "16-bit RGB": (png(4, 4, 16, 2, [ROW16] * 4), RED, BLUE),
    "animated GIF": (frames("GIF"), RED, BLUE),
    "animated PNG": (frames("PNG"), RED, BLUE),
    "animated WebP": (frames("WEBP", lossless=True), RED, BLUE),
    "several pages": (frames("TIFF"), RED, BLUE),
    "transparent GIF": (
        encode(halves((*RED, 255), (0, 0, 0, 0), "RGBA"), "GIF"),
        RED,
        WHITE,
    ),
    "BMP": (encode(halves(RED, BLUE), "BMP"), RED, BLUE),
    "JPEG 2000": (encode(halves(RED, BLUE), "JPEG2000"), RED, BLUE),
    "TGA": (encode(halves(RED, BLUE), "TGA"), RED, BLUE),
}


@pytest.mark.parametrize("name", MODES)
def test_pictures_look_as_a_person_expects(name):
    data, left, right = MODES[name]
    pixels = load(data, size=4).astype(int)
    # Lossy colours are off by a little, and the halving leaves pure columns.
    assert np.abs(pixels[:, 0] - left).max() <= 2
    assert np.abs(pixels[:, 3] - right).max() <= 2


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (Image.new("F", (8, 8)), "pixels of mode F cannot be shown"),
        (Image.new("LAB", (8, 8)), "pixels of mode LAB cannot be shown"),
        (Image.new("I", (8, 8), 70000), "grey values from 70000 to 70000 cannot be shown"),
        (Image.new("I", (8, 8), -1), "grey values from -1 to -1 cannot be shown"),
    ],
)
def test_values_without_agreed_meaning_are_refused(image, reason):
    with pytest.raises(BadExample, match=reason):
        load(encode(image, "TIFF"))


def with_orientation(image, value, kind="PNG"):
    exif = Image.Exif()
    exif[0x0112] = value
    return encode(image, kind, exif=exif)


@pytest.mark.parametrize("value", range(1, 9))
def test_exif_rotation_is_followed_when_asked(value):
    image = noise(20, 12)
    data = with_orientation(image, value)
    np.testing.assert_array_equal(load(data), published_crop(image, 8))
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert (upright.size == (12, 20)) == (value > 4)
    np.testing.assert_array_equal(load(data, exif_rotation=True), published_crop(upright, 8))


@pytest.mark.parametrize("value", [0, 9, 60000])
def test_unknown_orientations_are_upright(value):
    image = noise(20, 12)
    pixels = load(with_orientation(image, value), exif_rotation=True)
    np.testing.assert_array_equal(pixels, published_crop(image, 8))


def test_damaged_exif_data_are_none():
    image = photo_like(20, 12)
    data = encode(image, "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff rubbish")
    np.testing.assert_array_equal(load(data, exif_rotation=True), load(data))


JPEG = encode(photo_like(60, 40), "JPEG")

BAD = {
    "empty": (b"", "no picture in a format that Pillow reads .is empty"),
    "text": (b"<!DOCTYPE html><html>", "no picture in a format .* .starts with b'<!DOCTYPE ht"),
    "half a JPEG": (JPEG[:-200], "image file is truncated"),
    "JPEG header": (JPEG[:20], "."),
    "half a PNG": (encode(noise(60, 40), "PNG")[:3000], "truncated"),
    "half a GIF": (encode(noise(60, 40).convert("P"), "GIF")[:1500], "."),
    "half a WebP": (encode(photo_like(60, 40), "WEBP")[:200], "."),
    "PostScript": (encode(halves(RED, BLUE), "EPS"), "no picture in a format"),
    "PDF": (encode(halves(RED, BLUE), "PDF"), "no picture in a format"),
    "bomb": (
        png(20000, 20000, 8, 2, [b""]),
        rf"Image size \(400000000 pixels\) exceeds limit of {MAX_PIXELS} pixels",
    ),
    "wide bomb": (png(2**31 - 1, 1, 8, 0, [b""]), "2147483647 pixels.* exceeds limit"),
    "text bomb": (
        png(1, 1, 8, 0, [b"\0"], chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(1 << 26)))),
        "Decompressed data too large|too large",
    ),
    "too narrow": (
        encode(Image.new("L", (1, 60000)), "PNG"),
        r"\(1, 60000\) pixels are .* too narrow",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_pictures_tell_why(name):
    data, reason = BAD[name]
    with pytest.raises(BadExample, match=reason) as caught:
        load(data, size=64)
    assert "\n" not in str(caught.value)
    assert "0x7" not in str(caught.value)  # an address would differ at every visit


def test_no_warnings_reach_the_user(tmp_path):
    """Pillow would warn of the first's size, and of the others' data."""
    large = png(10000, 10000, 8, 0, [b""])
    odd_exif = encode(photo_like(60, 40), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0")
    code = (
        "from dico_jax.data.pictures import BadExample, PictureReader\n"
        "import contextlib, pathlib, sys\n"
        "for file in sys.argv[1:]:\n"
        "    with contextlib.suppress(BadExample):\n"
        "        PictureReader(8, 3, True)(pathlib.Path(file).read_bytes())\n"
    )
    files = []
    for i, data in enumerate((large, odd_exif, palette(bytes([128, 255])))):
        files.append(tmp_path / str(i))
        files[i].write_bytes(data)
    command = [sys.executable, "-W", "default", "-c", code, *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_pixels_are_taken_as_they_are():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    assert load(pixels) is pixels
    grey = load(pixels, channels=1)
    np.testing.assert_array_equal(load(grey), np.repeat(grey, 3, axis=2))
    assert load(grey, channels=1) is grey
    assert load(np.zeros((30, 20, 1), np.uint8), channels=3).shape == (8, 8, 3)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((8, 8, 3), np.float32),
        np.zeros((8, 8), np.uint8),
        np.zeros((8, 8, 4), np.uint8),
        np.zeros((0, 8, 3), np.uint8),
    ],
)
def test_other_arrays_are_refused(array):
    with pytest.raises(BadExample, match="is no picture|has no pixels"):
        load(array)


def test_suffixes():
    assert {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".mpo"} <= picture_suffixes()
    assert not {".txt", ".json", ".npy", ".pdf", ".eps", ".h5", ".mpg", ""} & picture_suffixes()


def test_threads_agree():
    data = [encode(noise(90, 70, seed), "PNG") for seed in range(4)] * 8
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        parallel = list(pool.map(lambda d: load(d, 32), data))
    for pixels, d in zip(parallel, data, strict=True):
        np.testing.assert_array_equal(pixels, load(d, 32))


FILES = {
    "jpeg": JPEG,
    "progressive jpeg": encode(photo_like(60, 40), "JPEG", progressive=True),
    "rotated jpeg": with_orientation(photo_like(60, 40), 6, "JPEG"),
    "cmyk jpeg": encode(photo_like(60, 40).convert("CMYK"), "JPEG"),
    "png": encode(photo_like(60, 40), "PNG"),
    "alpha png": encode(photo_like(60, 40).convert("RGBA"), "PNG"),
    "gif": frames("GIF"),
    "webp": encode(photo_like(60, 40), "WEBP"),
    "tiff": encode(photo_like(60, 40), "TIFF", compression="tiff_lzw"),
    "bmp": encode(photo_like(60, 40).quantize(16), "BMP"),
}


def damage(data, rng):
    """Some bytes of a file changed, in the header as a rule, or its end cut off, or both."""
    out = bytearray(data)
    reach = len(out) if rng.random() < 0.3 else min(len(out), 200)
    for place in rng.integers(0, reach, rng.integers(0, 8)):
        out[place] = rng.integers(256)
    if rng.random() < 0.3:
        del out[rng.integers(len(out)) :]
    return bytes(out)


@pytest.mark.parametrize("name", FILES)
def test_damaged_files_decode_or_are_bad(name):
    rng = np.random.default_rng(0)
    reasons = []
    for _ in range(150):
        try:
            pixels = load(damage(FILES[name], rng), size=16, exif_rotation=True)
        except BadExample as error:  # any other error fails the test
            reasons.append(str(error))
        else:
            assert pixels.shape == (16, 16, 3)
            assert pixels.dtype == np.uint8
    assert 0 < len(reasons) < 150
    assert all(reason and "\n" not in reason for reason in reasons)


def test_pictures_that_take_more_memory_may_have_fewer_pixels():
    large = functools.partial(Image.new, size=(5_000, 5_000))
    for mode, kind, options in (("L", "jpeg2000", {"irreversible": True}), ("LA", "png", {})):
        stream = io.BytesIO()
        large(mode).save(stream, kind, **options)
        with pytest.raises(BadExample, match=r"\(5000, 5000\) pixels are too many.* 22369621"):
            PictureReader(8, 3)(stream.getvalue())
    stream = io.BytesIO()
    large("L").save(stream, "png")
    assert PictureReader(8, 3)(stream.getvalue()).shape == (8, 8, 3)


def test_large_pictures_are_decoded_one_at_a_time(monkeypatch):
    at_once, most, plain = [], [], pictures._plain

    def slow(picture):
        at_once.append(threading.get_ident())
        most.append(len(at_once))
        time.sleep(0.05)
        at_once.pop()
        return plain(picture)

    monkeypatch.setattr(pictures, "_plain", slow)
    data = [encode(Image.new("RGB", (20, 20)), "png")] * 4
    for limit, expected in ((8 * 399, {1}), (8 * 400, {1, 2, 3, 4})):
        monkeypatch.setattr(pictures, "MAX_PIXELS", limit)
        most.clear()
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            assert {x.shape for x in pool.map(PictureReader(8, 3), data)} == {(8, 8, 3)}
        assert set(most) <= expected
        assert max(most) == 1 or limit == 8 * 400
