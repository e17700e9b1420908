"""Texts to token ids, by the `tokenizers` library from the files that come with a text encoder."""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dico_jax.errors import UsageError
from dico_jax.pytorch.hub import file_beside, is_remote, local_file
from dico_jax.pytorch.tensors import json_object
from dico_jax.pytorch.torch_files import open_tensors

START, END = "<|startoftext|>", "<|endoftext|>"
_NAMES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json")
# How CLIP cuts a text into words before it merges their bytes.
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class Tokenizer:
    """Texts to ids (N, length): a start, the text's tokens, an end, then padding.

    `cut` counts the texts that were longer; their last tokens are left out.
    """

    def __init__(self, tokenizer: Any, length: int, pad: str = END):
        """Takes a `tokenizers.Tokenizer`; `pad` is the token that fills a text up."""
        self.length, self.cut, self._tokenizer = length, 0, tokenizer
        self.start_id, self.end_id, pad_id = map(self._id, (START, END, pad))
        tokenizer.no_truncation()  # so that what is cut can be counted
        tokenizer.no_padding()
        self._pad, self._pad_id = pad, pad_id

    def _id(self, token: str) -> int:
        if (number := self._tokenizer.token_to_id(token)) is None:
            raise UsageError(f"it has no token {token}: it is the tokenizer of another model")
        return number

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def saved(self) -> dict[str, str]:
        """What `load_tokenizer` makes it of, among the metadata of a converted file."""
        return {"tokenizer": self._tokenizer.to_str(), "pad_token": self._pad}

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Token ids, int32 (N, length)."""
        ids = np.full((len(texts), self.length), self._pad_id, np.int32)
        found = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        for row, encoding in zip(ids, found, strict=True):
            most = self.length - 2
            self.cut += len(encoding.ids) > most
            tokens = [self.start_id, *encoding.ids[:most], self.end_id]
            row[: len(tokens)] = tokens
        return ids

    def decode(self, ids: np.ndarray) -> list[str]:
        """Texts of ids (N, length), without start, end and padding."""
        return self._tokenizer.decode_batch(ids.tolist(), skip_special_tokens=True)


def word_tokenizer(words: Sequence[str], length: int) -> Tokenizer:
    """Lower-case words and marks as tokens, all that are not among `words` as one that is unknown.

    Its vocabulary is the start, the end (`END_ID`), the unknown one, then the words.
    """
    tokenizers, unknown = _library(), "<|unknown|>"
    numbers = {word: k for k, word in enumerate([START, END, unknown, *words])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(numbers, unk_token=unknown))
    tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([START, END])
    return Tokenizer(tokenizer, length)


def _library() -> Any:
    try:
        import tokenizers  # late: only texts need it
    except ImportError as error:
        raise UsageError("texts need tokenizers: pip install 'dico_jax[text]'") from error
    return tokenizers


def load_tokenizer(source: str | os.PathLike, length: int = 77) -> Tokenizer:
    """CLIP's tokenizer in the folder of a text encoder: tokenizer.json, or vocab.json, merges.txt.

    `source` is the folder, a file in it, or the hf:// address of one; a file of `convert clip` has
    the tokenizer inside. UsageError: the files are
    missing, damaged, or of another kind of tokenizer.
    """
    tokenizers = _library()
    source = os.fspath(source)
    inside = _inside(source)
    whole, vocab, merges, options = (None if inside else _find(source, name) for name in _NAMES)
    try:
        if inside:
            tokenizer = tokenizers.Tokenizer.from_str(inside["tokenizer"])
        elif whole:
            tokenizer = tokenizers.Tokenizer.from_file(whole)
        elif vocab and merges:
            tokenizer = _from_merges(tokenizers, vocab, merges)
        else:
            raise UsageError(f"{source} has no tokenizer: put tokenizer.json, or vocab.json and "
                             "merges.txt, beside the weights")  # fmt: skip
    except UsageError:
        raise
    except Exception as error:  # the library raises nothing more special
        said = " ".join(str(error).split())[:200]
        file = f"{whole or vocab}, with {merges}," if whole or vocab else f"what is in {source}"
        raise UsageError(f"{file} is no tokenizer: {said}") from error
    pad: Any = json_object(options).get("pad_token", END) if options else END
    pad = inside.get("pad_token", pad)
    pad = pad.get("content") if isinstance(pad, dict) else pad
    return Tokenizer(tokenizer, length, str(pad))


def has_tokenizer(source: str) -> bool:
    """Whether files of one, or of a part of one, lie where `load_tokenizer` looks for them."""
    return any(_find(source, name) for name in _NAMES[:3])


def _inside(source: str) -> Mapping[str, str]:
    """The metadata of a converted file that has a tokenizer."""
    path = local_file(source)
    if not path.endswith(".safetensors") or not os.path.isfile(path):
        return {}
    with open_tensors(path) as file:
        return file.metadata if "tokenizer" in file.metadata else {}


def _find(source: str, name: str) -> str | None:
    """The file called `name` of the folder of the source, or None."""
    if is_remote(source):
        return file_beside(source, name)
    path = pathlib.Path(source)
    path = (path if path.is_dir() else path.parent) / name
    return str(path) if path.is_file() else None


def _from_merges(tokenizers: Any, vocab: str, merges: str) -> Any:
    """What tokenizer.json of CLIP says, as transformers makes it of the two files."""
    words, pairs = tokenizers.models.BPE.read_file(vocab, merges)
    model = tokenizers.models.BPE(words, pairs, unk_token=END, end_of_word_suffix="</w>")
    tokenizer = tokenizers.Tokenizer(model)
    n, regex = tokenizers.normalizers, tokenizers.Regex
    tokenizer.normalizer = n.Sequence([n.NFC(), n.Replace(regex(r"\s+"), " "), n.Lowercase()])
    p = tokenizers.pre_tokenizers
    cut = p.Split(regex(_WORDS), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = p.Sequence([cut, p.ByteLevel(add_prefix_space=False)])
    tokenizer.add_special_tokens([START, END])
    return tokenizer
