"""Texts to what a network is told of them: CLIP's features, or words that it reads itself."""

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from dico_jax.errors import UsageError
from dico_jax.models.text_conditional import Constants
from dico_jax.parallel.mesh import replicated
from dico_jax.pytorch.tensors import about
from dico_jax.text.clip import TextConfig, TextTower
from dico_jax.text.clip_weights import Tower, load_tower
from dico_jax.text.tokenizers import Tokenizer, load_tokenizer, word_tokenizer

_BATCH_SIZE = 32  # texts at a time
_PROBES = "", "A photo of a dog's tail, 3 cats! 猫 🙂"  # which other tokenizers read differently


class Words:
    """Words of a vocabulary, read by an encoder that is trained along: a `Texts`."""

    def __init__(self, tokenizer: Tokenizer, digest: str):
        self.tokenizer, self.digest, self.length = tokenizer, digest, tokenizer.length

    def __eq__(self, other):
        return type(other) is type(self) and other.digest == self.digest

    def __hash__(self):
        return hash(self.digest)

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    def tokenize(self, texts: Sequence[str]) -> np.ndarray:
        """Token ids of N texts, int32 (N, L); says once that a text was cut."""
        before = self.tokenizer.cut
        ids = self.tokenizer(texts)
        if before == 0 < self.tokenizer.cut:
            print(f"warning: a text is longer than {self.length} tokens, and cut", file=sys.stderr)
        return ids

    def decode(self, ids: np.ndarray) -> list[str]:
        """The texts of ids (N, L)."""
        return self.tokenizer.decode(ids)

    def encode(self, ids):
        """The ids."""
        return {"ids": ids}

    def null(self) -> Constants:
        """What a network is told of ""."""
        told = jax.device_get(self.encode(self.tokenizer([""])))
        return Constants(**{name: array[0] for name, array in told.items()})


class ClipEncoder(Words):
    """CLIP's text tower and its tokenizer: a `Texts`.

    Attributes:
      digest: sha256 (hex) of weights, sizes and what its tokenizer makes of a text; features of
        the same one are of one kind.
      length, width, pooled_width: L, E and P of the features.
    """

    def __init__(self, tower: Tower, tokenizer: Tokenizer):
        config: TextConfig = tower.config
        ends = config.vocab_size - 1 if config.eos_token_id == 2 else config.eos_token_id
        if tokenizer.vocab_size > config.vocab_size or tokenizer.end_id != ends:
            found = f"{tokenizer.vocab_size} tokens, the last of a text {tokenizer.end_id}"
            wanted = f"{config.vocab_size}, the last of a text {ends}"
            fix = "take the files that came with the weights"
            raise UsageError(f"its tokenizer is of another model: {found}, not {wanted}: {fix}")
        decides = tower.digest, dataclasses.asdict(config), tokenizer(_PROBES).tolist()
        digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
        super().__init__(tokenizer, digest)
        self.width = self.pooled_width = config.hidden_size
        self._params, self._model = tower.params, TextTower(config)
        self._placed: dict[Any, Any] = {}  # by the sharding of ids: parameters, and the function

    def __getstate__(self):  # a process that reads data has no need of weights
        return self.__dict__ | {"_params": None, "_placed": {}}

    def encode(self, ids):
        """{"tokens": (N, L, E), "pooled": (N, P)} of ids (N, L), float16 and split as these are."""
        params, apply = self._on(None if isinstance(ids, jax.core.Tracer | np.ndarray) else ids)
        return apply(params, ids)

    def _on(self, ids):
        split = ids.sharding if isinstance(getattr(ids, "sharding", None), NamedSharding) else None
        if split not in self._placed:
            whole = None if split is None else replicated(split.mesh)

            def apply(params, ids):
                found: Any = self._model.apply({"params": params}, ids)
                parts = {"tokens": found.tokens, "pooled": found.pooled}
                return {name: part.astype("float16") for name, part in parts.items()}

            jitted = jax.jit(apply, out_shardings=split)
            self._placed[split] = jax.device_put(self._params, whole), jitted
        return self._placed[split]

    def __call__(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """The features of N texts, on the host."""
        ids, parts = self.tokenize(texts), []
        for first in range(0, len(ids), _BATCH_SIZE):
            part = ids[first : first + _BATCH_SIZE]
            whole = np.pad(part, ((0, _BATCH_SIZE - len(part)), (0, 0)), mode="edge")
            parts.append({k: np.asarray(v)[: len(part)] for k, v in self.encode(whole).items()})
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def load_words(text: str, length: int) -> Words:
    """The words of `config.text.words`, with at most `length` tokens a text."""
    words = list(dict.fromkeys(text.split()))
    digest = hashlib.sha256(json.dumps([words, length]).encode()).hexdigest()
    return Words(word_tokenizer(words, length), digest)


def load_encoder(source: str | os.PathLike, field: str) -> ClipEncoder:
    """The encoder in a folder or file of CLIP, or at an hf:// address, its tokenizer beside it.

    `field` is what messages call the source, such as "config.text.path".
    """
    with about(f"{field}={os.fspath(source)}", os.fspath(source)):
        tower = load_tower(source, TextConfig)
        length = min(77, tower.config.max_position_embeddings)
        return ClipEncoder(tower, load_tokenizer(source, length))
