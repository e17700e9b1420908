"""Networks that are told a text: what of it they read, and an encoder of their own for that."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from dico_jax.errors import UsageError
from dico_jax.files import arrays_digest
from dico_jax.models.denoiser import Condition, Denoiser
from dico_jax.models.layers import Dense, TextEmbedder, normal_002
from dico_jax.ops.attention import attention

END_ID = 1  # of what ends a text, and fills it up, for an encoder that is trained along
_HEAD = 32  # channels of an attention head


class Constants:
    """Arrays by name, as an attribute of a module: equal and hashed by their numbers."""

    def __init__(self, **arrays: np.ndarray):
        self.arrays, self._digest = arrays, arrays_digest(arrays)

    def __eq__(self, other):
        return isinstance(other, Constants) and self._digest == other._digest

    def __hash__(self):
        return hash(self._digest)

    def __repr__(self):
        return f"Constants({', '.join(self.arrays)}: {self._digest[:12]})"


class Texts(Protocol):
    """What makes of texts what a network reads; equal and hashed by its `digest`.

    Attributes:
      digest: sha256 (hex) of all that decides what it makes.
      length: L, the number of tokens.
    """

    digest: str
    length: int

    def tokenize(self, texts: Sequence[str]) -> np.ndarray:
        """Token ids of N texts, int32 (N, L)."""
        ...

    def decode(self, ids: np.ndarray) -> list[str]:
        """N texts of ids (N, L), without what stands for start, end and padding."""
        ...

    def encode(self, ids: Any) -> Condition:
        """What a network is told of ids (N, L), on the devices that these are on."""
        ...

    def null(self) -> Constants:
        """What a network is told of "", without the examples' axis."""
        ...


class EncoderLayer(nn.Module):
    """Attention to tokens that are `told` (N, L), then feed-forward, each added to x (N, L, E)."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, told):
        n, length, width = x.shape
        dense = functools.partial(Dense, dtype=self.dtype)
        norm = functools.partial(nn.LayerNorm, dtype=self.dtype)
        heads = max(1, width // _HEAD)
        qkv = dense(3 * width, name="qkv")(norm(name="norm1")(x))
        q, k, v = jnp.moveaxis(qkv.reshape(n, length, 3, heads, width // heads), 2, 0)
        how = {"mask": told[:, None, None], "implementation": "xla"}  # cuDNN takes no such mask
        found = attention(q, k, v, **how).reshape(x.shape)
        x = x + dense(width, name="proj")(found)
        h = dense(4 * width, activation="gelu", name="fc1")(norm(name="norm2")(x))
        return x + dense(width, name="fc2")(h)


class TextEncoder(nn.Module):
    """A small transformer, trained along: ids (N, L) to {"tokens": (N, L, E), "pooled": (N, E)}.

    Tokens attend to those up to the first end, whose id is `END_ID`; pooled is the mean of these.
    """

    vocab_size: int
    width: int
    depth: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, ids):
        embed = functools.partial(nn.Embed, dtype=self.dtype, embedding_init=normal_002)
        x = embed(self.vocab_size, self.width, name="token_embedding")(ids)
        x = x + embed(ids.shape[1], self.width, name="position_embedding")(np.arange(ids.shape[1]))
        ends = ids == END_ID
        told = jnp.cumsum(ends, axis=1) - ends == 0
        for k in range(self.depth):
            x = EncoderLayer(self.dtype, name=str(k))(x, told)
        x = nn.LayerNorm(dtype=self.dtype, name="norm")(x)
        return {"tokens": x, "pooled": x.mean(axis=1, where=told[..., None])}


class TextConditional(Denoiser):
    """Base of networks that are told a text.

    The condition is features {"tokens": (N, L, E), "pooled": (N, P)}, float16, or, of a network
    with an encoder of its own, {"ids": int32 (N, L)}.

    Attributes:
      text_length, text_width: L and E, of CLIP ViT-L/14 by default.
      pooled_width: P; 0 for a network that is told the tokens alone.
      text_dropout_prob: with which training takes the features of no text; 0 for none.
      vocab_size: of an encoder of its own, with text_layers layers; 0 for none.
      texts: what reads texts for it; None for one that is given features alone.
      null_text: what it is told of no text, without the examples' axis.
    """

    text_length: int = 77
    text_width: int = 768
    pooled_width: int = 768
    text_dropout_prob: float = 0.1
    vocab_size: int = 0
    text_layers: int = 2
    texts: Texts | None = None
    null_text: Constants | None = None

    may_be_zero = ("pooled_width", "vocab_size")
    asked_by = "prompts"

    def checks(self):
        yield from super().checks()
        fix = "must be in [0, 1): the published way is 0.1"
        yield "text_dropout_prob", 0 <= self.text_dropout_prob < 1, fix
        own = not self.vocab_size or self.pooled_width in (0, self.text_width)
        fix = f"must be 0 or model.text_width={self.text_width}, that of the encoder trained along"
        yield "pooled_width", own, fix

    @property
    def condition_dropout(self) -> float:  # type: ignore[override]
        return self.text_dropout_prob

    def zero_condition(self, n):
        if self.vocab_size:
            return {"ids": np.zeros((n, self.text_length), np.int32)}
        condition = {"tokens": np.zeros((n, self.text_length, self.text_width), np.float16)}
        pooled = {"pooled": np.zeros((n, self.pooled_width), np.float16)}
        return condition | (pooled if self.pooled_width else {})

    def null_condition(self, n):
        if self.null_text is None or not self.text_dropout_prob:
            return None
        arrays = self.null_text.arrays
        return {k: np.broadcast_to(arrays[k], z.shape) for k, z in self.zero_condition(n).items()}

    def from_read(self, conditions):
        if self.vocab_size or "ids" not in conditions:
            return conditions
        features = self._reader().encode(conditions["ids"])
        return {name: features[name] for name in self.zero_condition(1)}

    def as_condition(self, condition):
        """See `Denoiser`: a text or a list of some become ids."""
        if isinstance(condition, Mapping):
            return condition
        texts = [condition] if isinstance(condition, str) else list(condition)
        return {"ids": self._reader().tokenize(texts)}

    def _reader(self) -> Texts:
        if self.texts is None:
            raise UsageError(f"{type(self).__name__} was made without what reads texts: give texts")
        return self.texts

    def read_condition(self, example):
        """See `Denoiser`: features, where the example has them, or ids of its first caption."""
        if "tokens" in example and not self.vocab_size:
            return super().read_condition({**example, **_first(example)})
        captions = example.get("captions")
        captions = [captions] if isinstance(captions, str) else captions
        if not captions:
            told = f"{type(self).__name__} is told a text of every example"
            raise UsageError(f"{told}: these have {', '.join(example)}, and no captions")
        return {"ids": self._reader().tokenize(captions[:1])[0]}

    def grid_conditions(self, rows, source):
        indices = np.linspace(0, len(source) - 1, min(rows, len(source))).round().astype(int)
        captions = [source[int(i)]["captions"][0] for i in indices]
        return self.default_conditions(indices, source), captions

    def describe_conditions(self, conditions, class_names):
        if "ids" not in conditions:
            return super().describe_conditions(conditions, class_names)
        return self._reader().decode(np.asarray(conditions["ids"]))

    def parse_conditions(self, asked, num_images, seed, class_names=()):
        """Ids of the texts that are asked for, in turn."""
        ids = self._reader().tokenize(asked)
        return {"ids": ids[np.arange(len(ids) if num_images is None else num_images) % len(ids)]}

    def text_features(self, condition: Condition) -> Condition:
        """Tokens and pooled features of a condition, inside `forward`."""
        if "ids" not in condition:
            return condition
        return self._text_encoder(name="text_encoder")(condition["ids"])

    def encode_ids(self, params: Any, condition: Condition) -> Condition:
        """The same outside of it."""
        if "ids" not in condition:
            return condition
        encoder = self._text_encoder(parent=None)
        return encoder.apply({"params": params["text_encoder"]}, condition["ids"])

    def _text_encoder(self, **named):
        sizes = self.vocab_size, self.text_width, self.text_layers
        return TextEncoder(*sizes, self.dtype, **named)

    def embed_pooled(self, condition: Condition, widths: tuple[int, ...]):
        """A vector (N, width) for every width, of the pooled features; zero until it is trained."""
        embed = TextEmbedder(widths, self.wide_dtype, name="text_embedder")
        return embed(condition["pooled"].astype(self.wide_dtype))


def _first(example: Mapping[str, Any]) -> dict[str, Any]:
    """The features of the first of an example's captions."""
    return {name: example[name][0] for name in ("tokens", "pooled") if name in example}
