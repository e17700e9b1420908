"""What --prompts asks for: texts, a file of them, or captions as protocols draw them."""

import functools

import numpy as np

from dico_jax.data.captions import clean, read_captions
from dico_jax.errors import UsageError

# Of MS-COCO's validation pictures, one caption each: how many the FID of a protocol is of.
PROTOCOLS = {"coco_uvit": 30_000, "coco_repa": 40_192}
_TABLES = (".json", ".jsonl", ".csv", ".tsv")


def number_of_images(prompts: str) -> int | None:
    """The number of images that the FID of a protocol asks for; None without one."""
    return PROTOCOLS.get(prompts.partition(":")[0])


@functools.cache
def read_prompts(prompts: str, seed: int) -> list[str]:
    """The texts that --prompts asks for; UsageError where there are none.

    Args:
      prompts: texts between semicolons; a file of one a line; a file of captions (.json, .jsonl,
        .csv, .tsv, see `CaptionedFiles`), of which one is drawn of every picture, the pictures in
        the order of a draw; or PROTOCOL:FILE, the first of these, as many as `PROTOCOLS` says.
      seed: of these draws.
    """
    count, file = number_of_images(prompts), prompts
    if count is not None:
        file = prompts.partition(":")[2]
    if count is None and not file.lower().endswith(_TABLES):
        return _lines(file)
    captions = read_captions(file, "val", "--prompts")
    of_each = [texts for _, texts in sorted(captions.items()) if texts]
    random = np.random.default_rng(seed)
    drawn = [texts[random.integers(len(texts))] for texts in of_each]
    if len(drawn) < (count or 1):
        fix = f"has captions of {len(drawn)} pictures, and {count or 1:,} are asked for"
        raise UsageError("--prompts", prompts, fix)
    return [drawn[i] for i in random.permutation(len(drawn))[:count]]


def _lines(text: str) -> list[str]:
    """The texts between semicolons, or in the lines of a file."""
    name = "--prompts"
    try:
        with open(text, encoding="utf-8-sig") as file:
            parts = file.read().split("\n")
    except (OSError, ValueError) as error:
        if not isinstance(error, OSError) or isinstance(error, IsADirectoryError):
            raise UsageError(name, text, "is no file of texts in UTF-8") from error
        if text.endswith(".txt") or ("/" in text and " " not in text):
            raise UsageError(name, text, ": no such file") from error
        parts = text.split(";")
    if not (found := clean(parts)):
        raise UsageError(name, text, "has no prompt: write some between semicolons, or a file")
    return found
