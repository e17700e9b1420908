"""Which network a state dict belongs to, from the shapes of its tensors.

What can be seen: family, widths, depths, input channels, classes, whether the variance is learned.
What cannot: the number of attention heads (known for published widths), and whether the last row of
the label tables is a null class: taken to be, as in all released models, unless it is the only row
or there are 1000, the classes of ImageNet. Nor how many tokens a network is told that reads
features of a text.

Every size is read off several tensors and the most frequent answer wins, so that a file with a few
missing or misshapen tensors still gives the right model, and an error that names just these.
"""

import collections
import contextlib
import dataclasses
import difflib
import json
import math
import re
import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from dico_jax.config import SIZES
from dico_jax.errors import UsageError
from dico_jax.pytorch.key_maps import KEY_MAPS, Entry, entries

if TYPE_CHECKING:
    from dico_jax.models.denoiser import Denoiser

Shapes = Mapping[str, tuple[int, ...]]

_STAGES = ("encoder_level_1", "encoder_level_2", "latent", "decoder_level_2", "decoder_level_1")
_STAGE_WIDTHS = (1, 2, 4, 2, 2)  # over hidden_size
_MAX_SIZE = 1 << 20
_MAX_BLOCKS = 1000
_RELEASED_DROPOUT = 0.1

TABLE = "pos_embed"  # of a DiT: fixed, so it is checked and not stored
_TABLE_TOLERANCE = 1e-6
_MAX_TABLE = 64 << 20  # bytes
_HALF_TABLE_TOLERANCE = 1e-2  # of files in half precision

# Where a size can be read: tensor/axis/what the length there is divided by.
_DICO_SIZES = {
    "hidden_size": "x_embedder.proj.weight/0/1 x_embedder.proj.bias/0/1 "
    "t_embedder_1.mlp.0.bias/0/1 t_embedder_2.mlp.0.bias/0/2 t_embedder_3.mlp.0.bias/0/4 "
    "y_embedder.embedding_table_0.weight/1/1 reduce_chan_level1.bias/0/2",
    "rows": " ".join(f"y_embedder.embedding_table_{i}.weight/0/1" for i in range(3)),
    "in_channels": "x_embedder.proj.weight/1/1",
    "outputs": "final_layer.out_proj.weight/0/1 final_layer.out_proj.bias/0/1",
}
_DIT_SIZES = {
    "hidden_size": "x_embedder.proj.weight/0/1 x_embedder.proj.bias/0/1 t_embedder.mlp.0.bias/0/1 "
    "y_embedder.embedding_table.weight/1/1 final_layer.linear.weight/1/1",
    "patch_size": "x_embedder.proj.weight/2/1 x_embedder.proj.weight/3/1",
    "rows": "y_embedder.embedding_table.weight/0/1",
    "in_channels": "x_embedder.proj.weight/1/1",
    "outputs": "final_layer.linear.weight/0/1 final_layer.linear.bias/0/1",
}


def detect_model(
    shapes: Shapes,
    name: str | None = None,
    *,
    num_classes: int | None = None,
    likely_classes: object = None,
    num_heads: int | None = None,
    likely_heads: object = None,
    likely_length: object = None,
) -> dict[str, Any]:
    """The model of a state dict, as the fields of `config.model` (see configs/default.py).

    Args:
      shapes: PyTorch key to shape, see `key_maps.known_names`.
      name: of the model, where it is known; found, if published, or else "DiCo" or "DiT".
      num_classes: where it is known. With as many rows in the label tables there is no null class.
      likely_classes: the same from a source that may be wrong: used where it fits.
      num_heads: of a DiT, which is needed where its width is none of the published ones.
      likely_heads: the same from a source that may be wrong: used where it fits.
      likely_length: tokens of a text, where they do not show.

    Of a network that reads texts itself, "vocab_size" is there besides.
    """
    family = _family(shapes)
    if name is not None and _family_of(name) != family:
        raise UsageError(f"--model={name}: these are the weights of a {family}")
    if num_heads is not None and (family != "DiT" or _sizes_of(name)):
        raise UsageError(f"--num_heads={num_heads} is for --model=DiT; not for {name or family}")
    sizes = _sizes_of(name)
    if not sizes:
        heads = num_heads, likely_heads
        sizes = _dit_sizes(shapes, *heads) if family == "DiT" else _dico_sizes(shapes)
        name = _published_name(family, sizes)
    options = _interface(shapes, family, sizes)
    if family == "TextDiCo":
        if num_classes is not None:
            raise UsageError("--num_classes", num_classes, "is for networks that are told a class")
        options |= _text_options(shapes, likely_length)
    else:
        options |= _classes(shapes, family, num_classes, likely_classes)
    known = {} if _sizes_of(name) else sizes
    fields = dict.fromkeys(("hidden_size", "depth", "mlp_ratio", "num_heads", "patch_size"))
    return {"name": name, **fields, **known, **options, "dtype": "float32"}


@dataclasses.dataclass(frozen=True)
class Network:
    """The network that weights belong to, with its name for messages."""

    title: str
    fields: dict[str, Any]  # of `config.model`, as JSON values
    model: "Denoiser"
    wanted: list[Entry]  # its parameters
    tokens: int | None  # rows of a DiT's position table
    vocab_size: int = 0  # of an encoder of texts that belongs to it

    def description(self) -> str:
        """A line: name or sizes, parameters, channels, classes."""
        count = sum(math.prod(entry.shape) for entry in self.wanted)
        return describe(self.fields, count, self.vocab_size)


def describe(fields: Mapping[str, Any], parameters: int, vocab_size: int = 0) -> str:
    """The same of fields of `config.model` and a number of parameters."""
    sizes = ("hidden_size", "depth", "mlp_ratio", "num_heads", "patch_size")
    if "text_fusion" in fields:
        fusion, width = fields["text_fusion"], fields["text_width"]
        words = f"of {vocab_size} words, " if vocab_size else ""
        told = f"told a text {words}by {fusion} (width {width})"
    else:
        null = "and a" if fields["class_dropout_prob"] else "without a"
        told = f"{fields['num_classes']} classes {null} null class"
    own = ", ".join(f"{k}={fields[k]}" for k in sizes if fields[k] is not None)
    return (
        f"{fields['name']}{f' of no published size ({own})' if own else ''}, "
        f"{parameters:,} parameters, {fields['in_channels']} input channels, {told}, "
        f"{'learned' if fields['learn_sigma'] else 'fixed'} variance"
    )


def detect_network(
    tensors: Mapping[str, Any], name: str | None = None, *, num_heads: int | None = None, **known
) -> Network:
    """The network of a state dict of lazy tensors; arguments as of `detect_model`."""
    shapes = {key: tuple(ref.shape) for key, ref in tensors.items()}
    fields = detect_model(shapes, name, num_heads=num_heads, **known)
    title = fields["name"]
    if name is not None:
        with contextlib.suppress(UsageError):  # nothing else is known of it
            found = detect_model(shapes, **known)["name"]
            title += f" (it looks like a {found})" if found != title else ""
    from dico_jax.models import create_model  # late: fields and shapes are had without JAX

    model = create_model(**{k: v for k, v in fields.items() if v is not None})
    fields = json.loads(json.dumps(fields))  # lists for tuples, as the config's file has them
    words, table = fields.pop("vocab_size", 0), check_table(tensors, model.hidden_size)
    return Network(title, fields, model, parameters(model), table, words)


def parameters(model: "Denoiser") -> list[Entry]:
    """The parameters of a network, in the state dict's order."""
    from flax.traverse_util import flatten_dict, unflatten_dict

    from dico_jax.models import abstract_params

    # Blocks of a stage are alike, and many of them take long to trace.
    family, depths = type(model).__name__, np.atleast_1d(model.depth)
    count = dict(zip(model.stages, depths, strict=True))
    small = model.clone(depth=1 if family == "DiT" else (1,) * 5, scan_blocks=False)
    tree: dict[Any, Any] = {}
    for path, leaf in flatten_dict(abstract_params(small)).items():
        at = 1 + (path[0] == "text_fusion")  # where the number of a block is
        blocks = range(count.get(path[at - 1], 1))
        in_block = path[at - 1] in count
        tree |= {(*path[:at], str(i), *path[at + 1 :]) if in_block else path: leaf for i in blocks}
    return entries(unflatten_dict(tree), KEY_MAPS[family])


def check_table(tensors: Mapping[str, Any], width: int) -> int | None:
    """The rows of a DiT's position table, if there is one; UsageError if it is another one."""
    ref = tensors.get(TABLE)
    if ref is None:
        return None
    side = math.isqrt(ref.shape[1]) if len(ref.shape) == 3 else 0
    if ref.shape != (1, side * side, width) or not side or ref.nbytes > _MAX_TABLE:
        raise UsageError(f"{TABLE} is {ref.shape} instead of (1, n * n, {width})")
    from dico_jax.models.dit import position_embedding

    table = ref.read().astype(np.float64)[0]
    tolerance = _TABLE_TOLERANCE if ref.dtype.itemsize >= 4 else _HALF_TABLE_TOLERANCE
    distance = np.abs(table - position_embedding(side, side, width)).max()
    if not distance <= tolerance:
        what = f"is not the fixed sine-cosine table (off by up to {distance:.2g})"
        raise UsageError(f"{TABLE} {what}: models with one of their own cannot be converted")
    return side * side


def _family(shapes: Shapes) -> str:
    if any(".pwconv1." in key for key in shapes):
        raise UsageError("these are the weights of an FCDM, whose names are not known here")
    dico = sum(key.startswith(_STAGES) for key in shapes)
    dit = sum(key.startswith("blocks.") for key in shapes)
    if not dico and not dit:
        some = ", ".join(list(shapes)[:5])
        what = f"{len(shapes)} tensors such as {some}"
        raise UsageError(f"these are not the weights of a DiCo or DiT: {what}")
    family = "TextDiCo" if any(key.startswith("text_fusion.") for key in shapes) else "DiCo"
    return family if dico >= dit else "DiT"


def _family_of(name: str) -> str:
    return next((family for family, rows in SIZES.items() if name in rows), name)


def _sizes_of(name: str | None) -> dict[str, Any]:
    """What a published name stands for; {} of a family."""
    return dict(next((rows[name] for rows in SIZES.values() if name in rows), {}))


def _published_name(family: str, sizes: Mapping[str, Any]) -> str:
    ratio = 4.0 if family == "DiT" else 2.0
    for name, published in SIZES[family].items():
        if {"mlp_ratio": ratio, **published} == sizes:
            return name
    return family


def _dico_sizes(shapes: Shapes) -> dict[str, Any]:
    width = _size(shapes, _DICO_SIZES, "hidden_size")
    hidden = [
        (shape[0], factor * width)
        for stage, factor in zip(_STAGES, _STAGE_WIDTHS, strict=True)
        for shape in _of_blocks(shapes, stage, "conv4.weight")
    ]
    depth = tuple(_depth(shapes, stage) for stage in _STAGES)
    return {"hidden_size": width, "depth": depth, "mlp_ratio": _mlp_ratio(hidden)}


def _dit_sizes(shapes: Shapes, num_heads: int | None, likely_heads: object) -> dict[str, Any]:
    width = _size(shapes, _DIT_SIZES, "hidden_size")
    published = {s["hidden_size"]: s["num_heads"] for s in SIZES["DiT"].values()}
    if num_heads is None and type(likely_heads) is int and 0 < likely_heads <= width:
        num_heads = likely_heads if width % likely_heads == 0 else None
    num_heads = num_heads or published.get(width)
    if num_heads is None:
        what = "is none of the published ones, and attention heads do not show in weights"
        raise UsageError(f"a DiT of width {width} {what}: give --num_heads")
    hidden = [(shape[0], width) for shape in _of_blocks(shapes, "blocks", "mlp.fc1.weight")]
    return {
        "hidden_size": width,
        "depth": _depth(shapes, "blocks"),
        "num_heads": num_heads,
        "patch_size": _size(shapes, _DIT_SIZES, "patch_size"),
        "mlp_ratio": _mlp_ratio(hidden),
    }


def _interface(shapes: Shapes, family: str, sizes: Mapping) -> dict[str, Any]:
    places = _DIT_SIZES if family == "DiT" else _DICO_SIZES
    channels = _size(shapes, places, "in_channels")
    outputs = vote(shapes, places["outputs"])
    learned = outputs != channels * sizes.get("patch_size", 1) ** 2
    return {"in_channels": channels, "learn_sigma": learned}


def _classes(
    shapes: Shapes, family: str, num_classes: int | None, likely_classes: object
) -> dict[str, Any]:
    rows = _size(shapes, _DIT_SIZES if family == "DiT" else _DICO_SIZES, "rows")
    if num_classes is None and type(likely_classes) is int and 0 <= rows - likely_classes <= 1:
        num_classes = max(likely_classes, 1)
    elif num_classes is None:
        num_classes = rows if rows in (1, 1000) else rows - 1
    if rows not in (num_classes, num_classes + 1):
        fix = f"use {rows - 1} (and a null class) or {rows}"
        what = f"does not fit: the label tables have {rows} rows: {fix}"
        raise UsageError("--num_classes", num_classes, what)
    dropout = _RELEASED_DROPOUT if rows > num_classes else 0.0
    return {"num_classes": num_classes, "class_dropout_prob": dropout}


def _text_options(shapes: Shapes, likely_length: object) -> dict[str, Any]:
    attends = any(k.startswith("text_fusion.") and k.endswith(".kv.weight") for k in shapes)
    first = "kv" if attends else "0"
    places = " ".join(f"text_fusion.{stage}.0.{first}.weight/1/1" for stage in _STAGES)
    length = likely_length if type(likely_length) is int and 0 < likely_length < _MAX_SIZE else 77
    words = vote(shapes, "text_encoder.token_embedding.weight/0/1") or 0
    return {
        "text_fusion": "cross_attention" if attends else "dwc",
        "text_length": vote(shapes, "text_encoder.position_embedding.weight/0/1") or length,
        "text_width": _size(shapes, {"text_width": places}, "text_width"),
        "pooled_width": vote(shapes, " ".join(f"text_embedder.{i}.weight/1/1" for i in range(3)))
        or 0,
        "text_dropout_prob": _RELEASED_DROPOUT,
        **({"vocab_size": words, "text_layers": _depth(shapes, "text_encoder")} if words else {}),
    }


def _size(shapes: Shapes, places: Mapping[str, Any], what: str) -> int:
    found = vote(shapes, places[what])
    if found is None:
        keys = list(dict.fromkeys(place.split("/")[0] for place in places[what].split()))
        close = difflib.get_close_matches(keys[0], shapes, n=1)
        hint = f" (closest: {close[0]})" if close else ""
        raise UsageError(f"cannot tell {what} from the file: it has no {' or '.join(keys)}{hint}")
    if not 1 <= found <= _MAX_SIZE:
        raise UsageError(f"{what}={found}, as the shapes have it, makes no sense")
    return found


def vote(shapes: Shapes, places: str) -> int | None:
    """The most frequent of the sizes read at `places`; the first one of equally frequent ones."""
    votes = []
    for key, axis, divisor in (place.split("/") for place in places.split()):
        lengths = shapes.get(key, ())[int(axis) :]
        if lengths and lengths[0] % int(divisor) == 0:
            votes.append(lengths[0] // int(divisor))
    return statistics.mode(votes) if votes else None


def _depth(shapes: Shapes, stage: str) -> int:
    pattern = re.compile(re.escape(stage) + r"\.(\d{1,6})\.")
    depth = max((int(m[1]) + 1 for m in map(pattern.match, shapes) if m), default=1)
    if depth > _MAX_BLOCKS:
        raise UsageError(f"{stage} would have {depth} blocks, as the names have it: refused")
    return depth


def _of_blocks(shapes: Shapes, stage: str, tensor: str) -> list[tuple[int, ...]]:
    pattern = re.compile(re.escape(stage) + r"\.\d+\." + re.escape(tensor))
    return [shape for key, shape in shapes.items() if pattern.fullmatch(key) and shape]


def _mlp_ratio(pairs: list[tuple[int, int]]) -> float:
    """The ratio with the fewest digits that, cut, gives the hidden one of (hidden, width) pairs."""
    votes = collections.Counter(pairs)
    # For each width the most frequent hidden one.
    hidden = {width: h for (h, width), _ in reversed(votes.most_common())}
    if not hidden:
        raise UsageError("cannot tell mlp_ratio from the file: no block has its feed-forward layer")
    low = max(h / width for width, h in hidden.items())
    for digits in range(16):
        ratio = math.ceil(low * 10**digits - 1e-9) / 10**digits
        if all(int(ratio * width) == h for width, h in hidden.items()):
            return ratio
    # No ratio gives all of them: the first width's, so that the check of shapes lists the others.
    width, h = next(iter(hidden.items()))
    return h / width
