"""Weights of CLIP's towers, from files as transformers writes them.

What is read: a .safetensors that `convert clip` wrote; a folder with config.json and
model.safetensors or pytorch_model.bin, of both towers or of one; such a file, config.json beside
it; hf://OWNER/REPO/FILE, config.json in its folder.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

from dico_jax.errors import UsageError
from dico_jax.files import arrays_digest, check_new, file_digest, result_path
from dico_jax.pytorch.hub import file_beside, is_remote, local_file
from dico_jax.pytorch.key_maps import KEY_MAPS
from dico_jax.pytorch.lazy_trees import ByteProgress, load_params
from dico_jax.pytorch.tensors import about, json_object, refusing, shown
from dico_jax.pytorch.torch_files import TensorFile, open_tensors, select_weights, write_safetensors
from dico_jax.text.clip import ACTIVATIONS, ImageConfig, TextConfig, TowerConfig, abstract_params
from dico_jax.text.tokenizers import has_tokenizer, load_tokenizer

KEY_MAP = KEY_MAPS["CLIP"]
FORMAT = "dico_jax.CLIP"  # of a file that `convert clip` wrote
_MAX, _MAX_LAYERS = 1 << 24, 200  # of a size in config.json, and of layers
_CONFIG, _WEIGHTS = "config.json", ("model.safetensors", "pytorch_model.bin")

# Of each tower, its section in the config of both, and how its tensors' names start.
_PLACES: dict[type[TowerConfig], tuple[str, str, str]] = {
    TextConfig: ("text_config", "text_model.", "text_projection."),
    ImageConfig: ("vision_config", "vision_model.", "visual_projection."),
}


@dataclasses.dataclass(frozen=True)
class Tower:
    """A tower's sizes and parameters (a tree of float32 NumPy arrays), and their sha256, in hex."""

    config: Any
    params: Any
    digest: str


def load_tower(source: str | os.PathLike, kind: type[TowerConfig]) -> Tower:
    """The tower of `kind`, TextConfig or ImageConfig, in a folder, file or hf:// address.

    UsageError: there is no such tower, or it is not what config.json says; all missing, unexpected
    and misshapen tensors are listed.
    """
    source = os.fspath(source)
    with about(source), open_tensors(_weights_file(source)) as file:
        if file.metadata.get("format", "").startswith(FORMAT):
            return _converted(file, kind)
        options = json_object(_config_file(source))
        section, *prefixes = _PLACES[kind]
        tensors = select_weights(file, root=KEY_MAP.root).tensors
        tower = {k: t for k, t in tensors.items() if k.startswith(tuple(prefixes))}
        if not tower:
            some = ", ".join(shown(key) for key in list(tensors)[:3])
            raise UsageError(f"it has no tensors {prefixes[0]}* of CLIP, but {some} ...")
        projected = any(key.startswith(prefixes[1]) for key in tower)
        config = _config(options, kind, section, projected)
        params = load_params(tower, abstract_params(config), KEY_MAP)
    return Tower(config, params, arrays_digest(flatten_dict(params, sep="/")))


def _weights_file(source: str) -> str:
    path = pathlib.Path(local_file(source))
    if path.is_dir():
        path = next((path / name for name in _WEIGHTS if (path / name).exists()), path)
        if path.is_dir():
            raise UsageError(f"the folder has no {' or '.join(_WEIGHTS)}")
    return str(path)


def _config_file(source: str) -> str:
    if is_remote(source):
        config = file_beside(source, _CONFIG)
    else:
        path = pathlib.Path(source)
        path = (path if path.is_dir() else path.parent) / _CONFIG
        config = str(path) if path.exists() else None
    if config is None:
        raise UsageError(f"beside it is no {_CONFIG}, which has the sizes and the activation")
    return config


def _converted(file: TensorFile, kind: Any) -> Tower:
    """A tower of a file that `convert_clip` wrote."""
    section, about_it = _PLACES[kind][0], file.metadata
    with refusing("its metadata 'config'", "is not a JSON object"):
        options = json.loads(about_it.get("config", ""))
        known = options.get(section)
        width = known["projection_dim"] if known else 0
    if known is None:
        raise UsageError(f"it has no {section}: it was converted from a file of the other tower")
    config = _config({section: known, "projection_dim": width or 1}, kind, section, bool(width))
    wanted = {"/".join(p): x.shape for p, x in flatten_dict(abstract_params(config)).items()}
    if all(name in file.tensors and file.tensors[name].shape == wanted[name] for name in wanted):
        flat = {name: file.tensors[name].read() for name in wanted}
        if about_it["format"] == FORMAT and arrays_digest(flat) == about_it.get(
            f"{section}_sha256"
        ):
            return Tower(config, unflatten_dict(flat, sep="/"), about_it[f"{section}_sha256"])
    raise UsageError("it is damaged, was changed, or is of another version: convert it again")


def convert_clip(source: str | os.PathLike, out: str | os.PathLike) -> str:
    """Writes CLIP's towers, or the one that is there, with its tokenizer as one .safetensors.

    Tensors are float32 and named by their paths in the trees ("text_model/embeddings/..."). The
    metadata have "format", "config" (JSON), the sha256 of each tower, "tokenizer" and "pad_token",
    and "source_name" and "source_sha256" of the file. Returns what was found, in two lines.
    """
    source, out = os.fspath(source), os.fspath(out)
    result_path(out, ".safetensors")  # before a download
    flat: dict[str, Any] = {}
    configs, found, metadata = {}, [], {"format": FORMAT}
    with about(f"--input={source}", source):
        file_name = _weights_file(source)
        with open_tensors(file_name) as file:
            if file.metadata.get("format", "").startswith(FORMAT):
                raise UsageError("it is converted already")
            tensors = select_weights(file, root=KEY_MAP.root).tensors
        kinds = [k for k, place in _PLACES.items() if any(t.startswith(place[1]) for t in tensors)]
        for kind in kinds or _PLACES:
            section, tower = _PLACES[kind][0], load_tower(source, kind)
            own = flatten_dict(tower.params, sep="/")
            flat |= own
            configs[section] = dataclasses.asdict(tower.config)
            metadata[f"{section}_sha256"] = tower.digest
            width, depth = tower.config.hidden_size, tower.config.num_hidden_layers
            count = sum(leaf.size for leaf in own.values())
            which = "a text" if kind is TextConfig else "an image"
            found.append(f"{which} tower of {depth} layers of {width}, {count:,} parameters")
        if TextConfig in kinds and has_tokenizer(source):
            metadata |= load_tokenizer(source).saved()
            found.append("its tokenizer")
        metadata |= {"config": json.dumps(configs), "source_sha256": file_digest(file_name)}
    metadata["source_name"] = pathlib.PurePath(source).name
    nbytes, bar = sum(leaf.nbytes for leaf in flat.values()), ByteProgress()
    check_new(out, int(1.02 * nbytes))
    with bar.running(nbytes, "writing"):
        write_safetensors(out, flat, metadata, on_bytes=bar.advance)
    return f"CLIP: {', '.join(found)}\n{out} is written"


def _config(options: Mapping[str, Any], kind: Any, section: str, projected: bool) -> Any:
    """The sizes of a tower in transformers' config, that of both towers or of this one alone."""
    if not str(options.get("model_type", "clip")).startswith("clip"):
        raise UsageError(f"{_CONFIG} says that it is a {shown(options['model_type'])}, not CLIP")
    parts: list[Any] = [options.get(name) or {} for name in (section, f"{section}_dict")]  # of old
    if not all(isinstance(part, dict) for part in parts):
        raise UsageError(f"{_CONFIG}: {section} is {shown(parts)}, not an object")
    known: Mapping[str, Any] = {**parts[0], **parts[1]} if any(parts) else options
    fields: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(kind)}
    given = {name: known[name] for name in fields if name in known}
    given["projection_dim"] = options.get("projection_dim", 512)
    for name, value in given.items():
        good = type(value) is type(fields[name]) and (
            value in ACTIVATIONS if isinstance(value, str) else 0 < value < _MAX
        )
        if not good or (name == "num_hidden_layers" and value > _MAX_LAYERS):
            raise UsageError(f"{_CONFIG}: {name}={shown(value)} cannot be")
    return kind(**given | ({} if projected else {"projection_dim": 0}))
