"""How images come out of noise: what the network predicts at every step."""

from typing import Any

import numpy as np
from PIL import Image

from dico_jax.files import new_file
from dico_jax.sampling.grids import image_grid, save_png

FRAMES = 21  # of the film, at most
_COLUMNS = 10  # of the sheet
_MILLISECONDS, _LAST = 120, 2000  # per frame


def save_trajectory(
    folder: Any, predicted: np.ndarray, steps: np.ndarray, names: list[str]
) -> None:
    """Writes trajectory.gif and trajectory.png, a row of pictures for every image.

    Args:
      folder: where to.
      predicted: uint8 (T, N, H, W, C), the images as they are predicted after some of the steps.
      steps: the numbers (T,) of these steps, from 1 on.
      names: of the N images.
    """
    some = np.unique(np.linspace(0, len(steps) - 1, _COLUMNS).round().astype(int))
    title = f"predicted after step {', '.join(str(step) for step in steps[some])}"
    with new_file(folder / "trajectory.png") as stream:
        save_png(stream, image_grid(list(predicted[some].swapaxes(0, 1)), names, title))
    frames = [Image.fromarray(image_grid(list(images[:, None]), names)) for images in predicted]
    times = [_MILLISECONDS] * (len(frames) - 1) + [_LAST]
    with new_file(folder / "trajectory.gif") as stream:
        frames[0].save(
            stream, "GIF", save_all=True, append_images=frames[1:], duration=times, loop=0
        )
