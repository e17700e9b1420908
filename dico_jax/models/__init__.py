"""The networks: the DiCo family and, as its baseline, the DiT family, by name, and their sizes."""

import dataclasses
import difflib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from dico_jax.config import SIZES
from dico_jax.errors import UsageError
from dico_jax.models.denoiser import Denoiser
from dico_jax.models.dico import DiCo
from dico_jax.models.dit import DiT
from dico_jax.models.fcdm import FCDM
from dico_jax.models.iso_dico import IsoDiCo
from dico_jax.models.text_dico import TextDiCo
from dico_jax.ops.plain import check_float64

# A network is a class and a row: name, class, and the options that the name stands for.
MODELS: dict[str, tuple[type[Denoiser], Mapping[str, Any]]] = {
    **{
        name: (cls, sizes)
        for cls in (DiCo, DiT, TextDiCo, FCDM)
        for name, sizes in SIZES[cls.__name__].items()
    },
    "DiCo": (DiCo, {}),
    "TextDiCo": (TextDiCo, {}),
    "DiT": (DiT, {}),
    "IsoDiCo": (IsoDiCo, {}),
    "FCDM": (FCDM, {}),
}
# A class of another layout than that a name's own, by both.
LAYOUTS: dict[tuple[type[Denoiser], str], type[Denoiser]] = {
    (DiCo, "isotropic"): IsoDiCo,
    (DiCo, "isotropic_skip"): IsoDiCo,
}

_DTYPES = ("float32", "bfloat16", "float64")


def find_model(name: str, layout: str | None = None) -> tuple[type[Denoiser], Mapping[str, Any]]:
    """The class of model `name` in a layout, and the sizes of the name; or UsageError."""
    if name not in MODELS:
        close = difflib.get_close_matches(name, MODELS, n=3, cutoff=0.4) or list(MODELS)
        raise UsageError("model.name", name, f"is unknown: use {' or '.join(map(repr, close))}")
    cls, sizes = MODELS[name]
    if sizes and (cls, layout) in LAYOUTS:
        fix = f"is not that of model.name={name!r}: use model.name={cls.__name__!r}"
        raise UsageError("model.layout", layout, f"{fix} with sizes of your own")
    return LAYOUTS.get((cls, layout or ""), cls), sizes


def model_options(name: str, layout: str | None = None) -> dict[str, Any]:
    """The options of model `name` with their defaults: sizes, in_channels, dtype, ..."""
    cls, sizes = find_model(name, layout)
    fields: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(cls)}
    return {name: fields[name] for name in fields if name not in ("parent", "name")} | dict(sizes)


def create_model(name: str, **options) -> Denoiser:
    """A `Denoiser` by name: "DiCo-S" to "DiCo-H", "DiT-S/2" to "DiT-XL/8", "DiCo" or "DiT".

    Args:
      name: a key of `MODELS`.
      **options: attributes of `DiCo` (of `IsoDiCo`, with another `layout`), `DiT`, ... The sizes of
        a published model are fixed: give hidden_size, depth, mlp_ratio (DiT: num_heads, patch_size)
        with the names "DiCo" and "DiT".
        `dtype` is "float32" (default), "bfloat16" or "float64" (which needs jax_enable_x64).
    """
    layout = options.get("layout")
    known, (cls, sizes) = model_options(name, layout), find_model(name, layout)
    for option, value in options.items():
        if option not in known:
            close = difflib.get_close_matches(option, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(known)}"
            of = f" of layout {layout!r}" * (layout is not None)
            fix = f": model {name!r}{of} has no such option; {hint}"
            raise UsageError(f"model.{option}", value, fix)
        if value != sizes.get(option, value):
            fix = f"contradicts model.name={name!r}, which has {sizes[option]!r}: use "
            own = f"model.name={cls.__name__!r} for sizes of your own"
            raise UsageError(f"model.{option}", value, fix + own)
    merged = {name: tuple(v) if isinstance(v, list) else v for name, v in options.items()}
    dtype = options.get("dtype", "float32")
    if (dtype := getattr(dtype, "__name__", getattr(dtype, "name", dtype))) not in _DTYPES:
        raise UsageError("model.dtype", dtype, f"is unknown: use one of {', '.join(_DTYPES)}")
    check_float64("model.dtype", dtype)
    return cls(**{**sizes, **merged, "dtype": jnp.dtype(dtype)})


def count_parameters(model: Denoiser, inside: Collection[str] = ()) -> int:
    """The number of trainable parameters; DiT's fixed position table, a constant, is not one.

    With names of modules, those inside of them alone.
    """
    params = flatten_dict(abstract_params(model))
    return sum(leaf.size for path, leaf in params.items() if not inside or set(path) & set(inside))


def abstract_params(model: Denoiser) -> Any:
    """The parameter tree of `model` as `jax.ShapeDtypeStruct`s, without computing anything."""
    depths = np.ravel(model.depth).tolist() if model.stages else []
    depths = dict(zip(model.stages, depths, strict=True))
    # Equal blocks are traced once: a depth may be a number, or one of every stage.
    one = model.clone(depth=jax.tree.map(lambda _: 1, model.depth)) if depths else model
    inputs = one.example_inputs()  # a key made inside starts no device
    params = jax.eval_shape(lambda: one.init(jax.random.key(0), *inputs))["params"]
    found = {}
    for path, leaf in flatten_dict(params).items():
        at = next((k for k, part in enumerate(path) if part in depths), None)
        copies = 1 if at is None else depths[path[at]]  # of what is in STAGE/0
        for i in range(copies):
            found[path if at is None else (*path[: at + 1], str(i), *path[at + 2 :])] = leaf
    return unflatten_dict(found)


def forward_macs(model: Denoiser, latent_shape: Sequence[int]) -> int | None:
    """Multiply-adds of one forward pass of one example (H, W, C); None where there is no formula.

    Those of convolutions (depthwise ones as well), linear layers and the two products of attention:
    what the papers' figures consist of, up to normalisation and pooling.
    """
    model.check_input(latent_shape)
    return model.macs(latent_shape[0] * latent_shape[1])


def forward_flops(model: Denoiser, latent_shape: Sequence[int]) -> int:
    """Operations of a forward pass of one example: two per multiply-add, or XLA's whole count."""
    macs = forward_macs(model, latent_shape)
    return _xla_count(model, latent_shape) if macs is None else 2 * macs


def training_flops(model: Denoiser, latent_shape: Sequence[int]) -> int:
    """Of a training step: three forward passes, whatever is computed again; no optimizer."""
    macs = forward_macs(model, latent_shape)
    return _xla_count(model, latent_shape, backward=True) if macs is None else 3 * 2 * macs


def _xla_count(model, latent_shape, backward=False):
    # Blocks in a loop would count once, and ways around arithmetic not at all.
    model = model.clone(scan_blocks=False, remat="none", plain_ops=True)
    n = 64  # few rows have products of zeros besides, see ops/cpu.py
    _, t, condition = model.example_inputs(n)

    def total(params, x):
        return model.apply({"params": params}, x, t, condition).sum()

    program = jax.jit(jax.value_and_grad(total) if backward else total)
    lowered = program.lower(abstract_params(model), np.zeros((n, *latent_shape), np.float32))
    costs: Any = lowered.cost_analysis() or lowered.compile().cost_analysis()  # None on GPU, TPU
    return int(costs["flops"]) // n
