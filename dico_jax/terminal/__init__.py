"""What a command says while it works: the one bar of progress, and pictures as characters.

On a terminal the bar is tqdm's; elsewhere, as in a log, it is a line now and then.
"""

import os
import sys
import time
from typing import Any

import numpy as np
import tqdm

INTERVAL = 30.0  # seconds between two lines in what is no terminal, such as a log
_LINE = "{desc}{percentage:.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
_WIDTH, _HEIGHT = 72, 48  # pixels at most; a character shows two, one above the other


class _Done(float):
    """How much is done: text has whole numbers, the bar itself what is begun as well."""

    def __str__(self) -> str:
        return str(int(self))


class Bar(tqdm.tqdm):
    """tqdm on stderr, as wide as the terminal; a log gets a line every `INTERVAL` seconds.

    The arguments are tqdm's, `delay` among them (seconds before anything is said), and `compiles`,
    where what comes first takes the time of a compilation: rate and time left leave it out, and a
    text is said before. The last line is said when the bar ends, unless `leave` is False. Parts of
    what is counted, such as steps of an image, move the bar too.
    """

    leave: Any
    initial: Any
    last_print_n: Any
    start_t: float
    delay: float

    def __init__(
        self,
        iterable: Any = None,
        desc: str | None = None,
        compiles: str | bool = False,
        **how: Any,
    ):
        self.by_lines, self._compiles = not sys.stderr.isatty(), compiles
        self._said_at, self._said = time.time(), how.get("initial", 0)
        if self.by_lines:  # the delay: nothing is said of the start
            how |= {"mininterval": 0.5, "miniters": 0, "bar_format": _LINE}
            desc = desc and f"{desc}: "
            how["delay"] = max(how.get("delay", 0), 1e-9)
        else:
            how = {"dynamic_ncols": True, **how}
        super().__init__(iterable, desc, file=sys.stderr, **how)
        if isinstance(compiles, str) and not self.disable and self.n != self.total:
            self.write(f"{compiles} ...", file=sys.stderr)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Writes the bar; or a line, if the last one is long enough ago."""
        if not self.by_lines:
            return super().display(msg, pos)
        if self.n != self._said and msg is None and self._time() - self._said_at >= INTERVAL:
            self._say()
        return False

    @property
    def format_dict(self) -> dict[str, Any]:
        """What is shown."""
        found = super().format_dict
        return found | {"n": _Done(round(found["n"], 6))}

    def _say(self) -> None:
        self._said_at, self._said = self._time(), self.n
        print(self, file=sys.stderr, flush=True)

    def update(self, n: float | None = 1) -> bool | None:
        """Counts what is done."""
        if self._compiles:
            self._compiles = False
            self.skip(n or 0, show=True)
            return True
        return super().update(n)

    def skip(self, count: float = 0, show: bool = False) -> None:
        """Counts something, and leaves it and the time since the last look out of the rate."""
        if self.disable:
            return
        self.n += count
        self.unpause()
        self.initial, self.last_print_n = self.initial + self.n - self.last_print_n, self.n
        if show:
            self._said_at *= self.leave is False  # what does not stay is said when it lasts
            self.refresh()

    def clear(self, nolock: bool = False) -> None:
        """Takes the bar away while something else is printed; lines stay."""
        if not self.by_lines:
            super().clear(nolock=nolock)

    def close(self) -> None:
        """Ends the bar."""
        if self.by_lines and not self.disable:
            shown = self._time() >= self.start_t + self.delay
            if shown and self.leave is not False and self.n != self._said:
                self._say()
            self.leave = False
        super().close()


def colours() -> int:
    """How many colours stdout has, 2 ** 24 or 256; 0 where it is no such terminal."""
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return 0
    if os.environ.get("COLORTERM") in ("truecolor", "24bit"):
        return 1 << 24
    return 256 if "256color" in os.environ.get("TERM", "") else 0


def half_blocks(image: np.ndarray, number: int) -> str:
    """A picture, uint8 (H, W, 3), as lines of upper half blocks in so many colours."""
    height, width = image.shape[:2]
    scale = min(1.0, _WIDTH / width, _HEIGHT / height)
    size = max(1, round(width * scale)), max(2, round(height * scale / 2) * 2)
    from PIL import Image  # late: bars need none

    pixels = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX)).astype(int)

    def code(ground: int, pixel: np.ndarray) -> str:
        r, g, b = pixel.tolist()
        if number > 256:
            return f"{ground};2;{r};{g};{b}"
        r, g, b = ((5 * c + 127) // 255 for c in (r, g, b))  # a cube of 6 x 6 x 6
        return f"{ground};5;{16 + 36 * r + 6 * g + b}"

    rows = zip(pixels[::2], pixels[1::2], strict=True)
    lines = (
        "".join(f"\x1b[{code(38, a)};{code(48, b)}m\u2580" for a, b in zip(*row, strict=True))
        for row in rows
    )
    return "".join(f"{line}\x1b[0m\n" for line in lines)
