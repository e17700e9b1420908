"""Names and layouts of parameters: this project's trees against PyTorch state dicts.

Modules carry the published names (see `dico_jax.models.layers`), so a name is the path joined with
dots, and only the leaf is renamed. What else differs is data: a `KeyMap` per network, read by the
functions below, which know no network. A new network adds a `KeyMap` and no code.

  Flax leaf                        PyTorch tensor
  kernel (in, out)                 weight: linear (out, in), or 1x1 convolution (out, in, 1, 1)
  kernel (kh, kw, in/groups, out)  weight: convolution (out, in/groups, kh, kw)
  embedding (rows, width)          weight, the same
  scale, bias (width,)             weight, bias, the same
  mean, var (width,)               running_mean, running_var (batch norm), the same

Layouts of NumPy dtypes that PyTorch has too are only permuted: both ways are exact to the bit.
"""

import dataclasses
import difflib
import itertools
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from dico_jax.errors import UsageError, several

Path = tuple[str, ...]

_MAX_HINTS = 40  # closest names are slow to find, and of no use where a whole model differs


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a leaf lies in the PyTorch tensor: its axes in that order, then some of length 1."""

    axes: tuple[int, ...] | None = None
    ones: int = 0

    def torch_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The tensor's shape for a leaf of `shape`."""
        permuted = shape if self.axes is None else tuple(shape[a] for a in self.axes)
        return permuted + (1,) * self.ones

    def to_torch(self, value: np.ndarray) -> np.ndarray:
        """The tensor of a leaf, as a view."""
        permuted = value if self.axes is None else value.transpose(self.axes)
        return permuted.reshape(permuted.shape + (1,) * self.ones) if self.ones else permuted

    def to_jax(self, value: np.ndarray) -> np.ndarray:
        """The leaf of a tensor, as a view; axes of length 1 at the tensor's end may be missing."""
        if self.axes is None:
            return value
        value = value.reshape(value.shape[: len(self.axes)])
        return value.transpose(tuple(np.argsort(self.axes)))


SAME = Layout()
LINEAR = Layout((1, 0))
CONV1X1 = Layout((1, 0), ones=2)
CONV = Layout((3, 2, 0, 1))

# Flax leaf and its number of axes to PyTorch's name and layout.
LEAVES: Mapping[tuple[str, int], tuple[str, Layout]] = {
    ("kernel", 2): ("weight", LINEAR),
    ("kernel", 4): ("weight", CONV),
    ("embedding", 2): ("weight", SAME),
    ("class_embedding", 1): ("class_embedding", SAME),
    ("scale", 1): ("weight", SAME),
    ("bias", 1): ("bias", SAME),
    ("mean", 1): ("running_mean", SAME),
    ("var", 1): ("running_var", SAME),
}
_TORCH_NAMES = {leaf: name for (leaf, _), (name, _) in LEAVES.items()}
_LEAF_ORDER = ("weight", "bias", "running_mean", "running_var")


@dataclasses.dataclass(frozen=True)
class KeyMap:
    """How a network's state dict differs from the plain rules above. All patterns are regexes.

    Attributes:
      root: matches where a parameter's own name begins; what is before names its container.
      declaration: names of modules in the order in which the published code declares them, which
        is that of its state dict. Names of different levels may mix; numbers need no mention.
      conv1x1: matches modules whose (in, out) kernel PyTorch keeps as a convolution.
      constants: matches tensors that follow from the architecture and may be absent.
      renames: (pattern, replacement), applied in order to the name that a path gives.
      aliases: (pattern, replacement), applied in order to the names in a file, for its other names.
      loose_ones: whether a file's tensor may have more axes of length 1 at its end.
    """

    root: str = ""
    declaration: str = ""
    conv1x1: re.Pattern = re.compile(r"(?!)")
    constants: re.Pattern = re.compile(r"(?!)")
    renames: tuple[tuple[str, str], ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()
    loose_ones: bool = False


_KEY_MAPS = {
    "DiCo": KeyMap(
        root=r"(x|y|t)_embedder\w*\.|(en|de)coder_level_\d\.|latent\.\d|up\d_|down\d_|final_layer\.|"
        r"reduce_chan",
        declaration="x_embedder t_embedder_1 y_embedder t_embedder_2 t_embedder_3 encoder_level_1 "
        "down1_2 encoder_level_2 down2_3 latent up3_2 reduce_chan_level2 decoder_level_2 up2_1 "
        "reduce_chan_level1 decoder_level_1 final_layer "
        "embedding_table_0 embedding_table_1 embedding_table_2 "  # of y_embedder
        "conv1 conv2 conv3 ca conv4 conv5 "  # of a block
        "out_proj adaLN_modulation",
        conv1x1=re.compile(r"(^|\.)(conv[1345]|ca\.1|reduce_chan_level[12])$"),
    ),
    "DiT": KeyMap(
        root=r"(x|y|t)_embedder\w*\.|pos_embed$|blocks\.\d|final_layer\.",
        declaration="pos_embed x_embedder t_embedder y_embedder blocks final_layer "
        "attn qkv proj mlp fc1 fc2 linear adaLN_modulation",
        constants=re.compile(r"^pos_embed$"),
    ),
    "AutoencoderKL": KeyMap(
        root=r"(en|de)coder\.(conv_|norm_out|(down|up|mid)[._])|(post_)?quant_conv\.",
        declaration="encoder decoder quant_conv post_quant_conv "
        "conv_in down_blocks up_blocks mid_block attentions resnets downsamplers upsamplers "
        "norm1 conv1 norm2 conv2 conv_shortcut "  # of a residual block
        "group_norm to_q to_k to_v to_out "  # of an attention
        "conv_norm_out conv_out",
        conv1x1=re.compile(r"(^|\.)((post_)?quant_conv|conv_shortcut)$"),
        constants=re.compile(r"^loss\."),
        # Names of the original code, in which decoder.up_blocks has been counted backwards, and of
        # before 2023; the projections were 1x1 convolutions in some files.
        aliases=(
            (r"^encoder\.down\.", "encoder.down_blocks."),
            (r"(_blocks\.\d+)\.block\.", r"\1.resnets."),
            (r"\.(down|up)sample\.", r".\1samplers.0."),
            (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
            (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
            (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
            (r"(\.attentions\.\d+\.)norm\.", r"\1group_norm."),
            (r"(\.attentions\.\d+\.)(q|k|v)(uery|ey|alue)?\.", r"\1to_\2."),
            (r"(\.attentions\.\d+\.)proj_(attn|out)\.", r"\1to_out.0."),
            (r"coder\.norm_out\.", "coder.conv_norm_out."),
            (r"\.nin_shortcut\.", ".conv_shortcut."),
        ),
        loose_ones=True,
    ),
    "CLIP": KeyMap(
        root=r"(text|vision)_model\.|(text|visual)_projection\.|logit_scale$",
        constants=re.compile(r"\.position_ids$|^logit_scale$"),
    ),
    "Inception": KeyMap(constants=re.compile(r"\.num_batches_tracked$")),
}
# DiCo's, and what nobody has published: parts that read a text, and the fusions of blocks.
_TEXT = dataclasses.replace(
    _KEY_MAPS["DiCo"],
    root=rf"text_(embedder|encoder|fusion)\.|{_KEY_MAPS['DiCo'].root}",
    declaration=f"text_encoder text_embedder text_fusion {_KEY_MAPS['DiCo'].declaration} text kv q "
    "token_embedding position_embedding norm1 qkv proj norm2 fc1 fc2 norm",
)
KEY_MAPS = {**_KEY_MAPS, "TextDiCo": _TEXT}


@dataclasses.dataclass(frozen=True)
class Entry:
    """A parameter on both sides: its name in the state dict, its path and shape in the tree."""

    key: str
    path: Path
    shape: tuple[int, ...]
    layout: Layout

    @property
    def torch_shape(self) -> tuple[int, ...]:
        """The shape of the tensor in the state dict."""
        return self.layout.torch_shape(self.shape)

    def to_jax(self, tensor: np.ndarray) -> np.ndarray:
        """The leaf of a tensor of the state dict, as a view where possible."""
        return self.layout.to_jax(tensor).reshape(self.shape)

    def to_torch(self, leaf: np.ndarray) -> np.ndarray:
        """The tensor of a leaf, contiguous."""
        return np.ascontiguousarray(self.layout.to_torch(leaf))


def entries(abstract_params: Any, key_map: KeyMap) -> list[Entry]:
    """The parameters of a tree of arrays or ShapeDtypeStructs, in the state dict's order."""
    import flax  # late: names in files are read without JAX

    found = []
    for path, leaf in flax.traverse_util.flatten_dict(abstract_params).items():
        _, layout = LEAVES[path[-1], len(leaf.shape)]
        if layout == LINEAR and key_map.conv1x1.search(".".join(path[:-1])):
            layout = CONV1X1
        found.append(Entry(torch_key(path, key_map), path, tuple(leaf.shape), layout))
    return sorted(found, key=lambda entry: declaration_order(entry.key, key_map))


def declaration_order(key: str, key_map: KeyMap) -> tuple[int, ...]:
    """Sorts keys as the published code declares them; names that are not listed come last."""
    names = [*key_map.declaration.split(), *_LEAF_ORDER]
    return tuple(
        int(part) if part.isdecimal() else names.index(part) if part in names else len(names)
        for part in key.split(".")
    )


def torch_key(path: Path, key_map: KeyMap = KeyMap()) -> str:
    """The state dict key of a parameter path: ("latent", "0", "conv1", "kernel") and so on."""
    return _substituted(".".join([*path[:-1], _TORCH_NAMES[path[-1]]]), key_map.renames)


def _substituted(key: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


def known_names(tensors: Mapping[str, Any], key_map: KeyMap) -> dict[str, Any]:
    """The tensors of a file under the names of `entries`, each once, without constants."""
    found: dict[str, Any] = {}
    for key, value in tensors.items():
        name = _substituted(key, key_map.aliases)
        if name in found:
            raise UsageError(f"the file has {name} twice, once of them as {key}")
        found[name] = value
    return {key: value for key, value in found.items() if not key_map.constants.search(key)}


def check_tensors(tensors: Mapping[str, Any], wanted: list[Entry], key_map: KeyMap) -> None:
    """Raises UsageError with all tensors missing, left over or of another shape than `wanted`."""
    expected = {entry.key: entry.torch_shape for entry in wanted}
    missing = [key for key in expected if key not in tensors]
    extra = [key for key in tensors if key not in expected]
    problems = [f"missing {key}{hint}" for key, hint in _closest(missing, extra or list(tensors))]
    for key, shape in expected.items():
        if key in tensors and not _fits(tuple(tensors[key].shape), shape, key_map):
            problems.append(f"{key} is {tuple(tensors[key].shape)} instead of {shape}")
    problems += [f"unexpected {key}{hint}" for key, hint in _closest(extra, missing or [*expected])]
    if problems:
        raise UsageError(f"the weights do not fit the model: {several(problems)}")


def _fits(shape: tuple[int, ...], wanted: tuple[int, ...], key_map: KeyMap) -> bool:
    loose = key_map.loose_ones and shape[: len(wanted)] == wanted
    return shape == wanted or (loose and set(shape[len(wanted) :]) == {1})


def _closest(keys: list[str], others: list[str]) -> list[tuple[str, str]]:
    """Each key with a hint: the name among `others` that is most like it."""
    close = [difflib.get_close_matches(key, others[:1000], n=1) for key in keys[:_MAX_HINTS]]
    hints = [f" (closest: {found[0]})" if found else "" for found in close]
    return list(itertools.zip_longest(keys, hints, fillvalue=""))
