"""From an example of a source to the array that goes into a batch."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from dico_jax.data.pictures import load_picture


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
        picture = load_picture(
            image, size=self.size, channels=self.channels, exif_rotation=self.exif_rotation
        )
        return picture[:, ::-1] if mirrored else picture


def read_label(example: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The class of an example as a condition: {"label": int32 ()}."""
    return {"label": np.asarray(example["label"], np.int32)}


def read_orientation(image: np.ndarray, mirrored: bool) -> np.ndarray:
    """Latents or moments (h, w, C), or (1 or 2, h, w, C) orientations: the one that is asked for.

    Latents of one picture alone are mirrored themselves, which is right for pixels only.
    """
    if image.ndim == 3:
        return image[:, ::-1] if mirrored else image
    return image[int(mirrored)]
