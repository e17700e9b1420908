"""AdamW's state: PyTorch's, keyed by number, against Optax's, a tree like the parameters.

PyTorch (`optimizer.state_dict()`): "state" has, per parameter, "step" (a float tensor; a number in
old files), "exp_avg" and "exp_avg_sq", under the parameter's number in the order of declaration;
"param_groups" has the options. A parameter that is never trained (DiT's position table) has a
number and no state. Optax: one `count`, and the trees `mu` and `nu` of the same two averages. Both
compute the same step from the same numbers.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from dico_jax.errors import UsageError, several
from dico_jax.files import is_tensor
from dico_jax.pytorch.key_maps import Entry
from dico_jax.pytorch.tensors import shown

_MAX_STEP = 2**31 - 1  # Optax counts in int32


class AdamWState(NamedTuple):
    """The state of a run's optimizer: steps taken, averages by parameter name, its options."""

    step: int
    exp_avg: dict[str, Any]
    exp_avg_sq: dict[str, Any]
    options: dict[str, Any]  # as in `config.optimizer`


def read_adamw(state_dict: object, declared: Iterable[str], wanted: list[Entry]) -> AdamWState:
    """AdamW's state from PyTorch's `state_dict`, tensors unread but for the step counters.

    `declared` are the names of all tensors of the model, in order, `wanted` the trained parameters.
    UsageError: it is no state of AdamW over one group of these that Optax's AdamW could have; all
    missing and misshapen averages are listed.
    """
    parts = state_dict if isinstance(state_dict, Mapping) else {}
    state, groups = parts.get("state"), parts.get("param_groups")
    if not isinstance(state, Mapping) or not isinstance(groups, list | tuple):
        raise UsageError("the optimizer's state has no state and param_groups, as AdamW's has")
    if len(groups) != 1 or not isinstance(group := groups[0], Mapping):
        what = f"{len(groups)} groups of parameters; one, as in the released code,"
        raise UsageError(f"the optimizer has {what} can be converted")
    names, given = list(declared), group.get("params")
    sequence = given if isinstance(given, list | tuple) else []
    numbers = [number for number in sequence if isinstance(number, int)]
    if len(numbers) != len(names):
        what = f"{len(numbers)} parameters and the model {len(names)}"
        raise UsageError(f"the optimizer has {what}: they are not of one run")
    own_of = dict(zip(names, map(state.get, numbers), strict=True))
    problems: list[str] = []
    steps: dict[str, int] = {}
    averages: dict[str, dict[str, Any]] = {"exp_avg": {}, "exp_avg_sq": {}}
    for entry in wanted:
        own = own_of.get(entry.key)
        if not isinstance(own, Mapping):
            problems.append(f"no state of {entry.key}")
            continue
        steps[entry.key] = _step(own.get("step"), entry.key)
        for name, found in averages.items():
            tensor: Any = own.get(name)
            if not is_tensor(tensor):
                problems.append(f"no {name} of {entry.key}")
            elif (shape := tuple(tensor.shape)) != entry.torch_shape:
                problems.append(f"{name} of {entry.key} is {shape}, not {entry.torch_shape}")
            else:
                found[entry.key] = tensor
    if problems:
        raise UsageError(f"the optimizer's state does not fit the model: {several(problems)}")
    first, *others = sorted(steps.items(), key=lambda item: item[1]) or [("", 0)]
    if others and others[-1][1] != first[1]:  # Optax has one counter for all
        what = f"{first[1]} steps for {first[0]} and {others[-1][1]} for others"
        raise UsageError(f"the optimizer took {what}: one number for all can be converted")
    return AdamWState(first[1], **averages, options=_options(group))


def _step(value: object, key: str) -> int:
    """A step counter, which is a whole number in a float."""
    step = _number(value)
    if not 0 <= step <= _MAX_STEP or step != int(step):
        what = shown(value, 40) if math.isnan(step) else step
        raise UsageError(f"the optimizer's step of {key} is {what}, not a number of steps")
    return int(step)


def _number(value: Any) -> float:
    """A number, also in an array or tensor of one; NaN where it is something else."""
    array = np.asarray(value.read() if hasattr(value, "read") else value)
    return float(array.reshape(())) if array.dtype.kind in "iufV" and array.size == 1 else math.nan


def _options(group: Mapping) -> dict[str, float]:
    for name in ("amsgrad", "maximize"):  # which change what a step computes
        if group.get(name):
            has = f"{name}={shown(group[name])}"
            raise UsageError(f"the optimizer has {has}, which Optax's AdamW lacks")
    if group.get("decoupled_weight_decay", True) is False and group.get("weight_decay"):
        raise UsageError("the optimizer is Adam with weight decay in the gradient, not AdamW")
    try:
        b1, b2 = group["betas"]
        numbers = [*map(_number, (group["lr"], b1, b2, group["eps"], group["weight_decay"]))]
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"the optimizer's options are not AdamW's ({error})") from error
    options = dict(zip(("learning_rate", "b1", "b2", "eps", "weight_decay"), numbers, strict=True))
    for name, value in options.items():
        below = 1 if name in ("b1", "b2") else math.inf
        if not 0 <= value < below:
            fix = "must be in [0, 1)" if below == 1 else "must be at least 0"
            raise UsageError(f"config.optimizer.{name}", value, fix)
    return options


def check_adamw(options: dict[str, Any]) -> dict[str, Any]:
    """`config.optimizer`, with which PyTorch's AdamW can go on; UsageError where it cannot."""
    fix = ": convert its weights alone, without --training"
    if (name := options["name"]) != "adamw":
        raise UsageError("config.optimizer.name", name, f"is not AdamW{fix}")
    if options["weight_decay"] and (mask := options["weight_decay_mask"]) != "all":
        what = "does not fit the one group of parameters that can be converted"
        raise UsageError("config.optimizer.weight_decay_mask", mask, what + fix)
    return options


def write_adamw(state: AdamWState, declared: Iterable[str]) -> dict[str, Any]:
    """PyTorch's `state_dict` of AdamW; `declared` names all tensors of the model, in order."""
    declared = list(declared)
    step = np.asarray(state.step, np.float32)  # as PyTorch has it
    moments = {
        number: {"step": step, "exp_avg": state.exp_avg[key], "exp_avg_sq": state.exp_avg_sq[key]}
        for number, key in enumerate(declared)
        if key in state.exp_avg
    }
    options, numbers = state.options, list(range(len(declared)))
    group = {"lr": options["learning_rate"], "betas": (options["b1"], options["b2"])}
    group |= {name: options[name] for name in ("eps", "weight_decay")}
    # What the conversion does not touch, as PyTorch's constructor sets it.
    group |= {"amsgrad": False, "maximize": False, "foreach": None, "capturable": False}
    group |= {"differentiable": False, "fused": None, "decoupled_weight_decay": True}
    return {"state": moments, "param_groups": [group | {"params": numbers}]}


def to_optax(abstract_state: Any, step: Any, exp_avg: Any, exp_avg_sq: Any) -> Any:
    """Optax's state of AdamW, of any leaves, in place of those of `abstract_state`."""
    return optax.tree_utils.tree_set(abstract_state, count=step, mu=exp_avg, nu=exp_avg_sq)


def published_state(params: Any) -> Any:
    """The abstract state of `optax.adamw` with plain numbers, as the published recipe has it."""
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    return jax.eval_shape(optax.adamw(0.0).init, shapes)


def from_optax(leaves: Mapping[tuple[str, ...], Any]) -> tuple[Any, dict, dict]:
    """The counter's leaf and both averages by parameter path, of a saved state's leaves by path."""
    prefix = next((path[: path.index("nu")] for path in leaves if "nu" in path), ())
    start = len(prefix)
    mu, nu = (
        {p[start + 1 :]: v for p, v in leaves.items() if p[: start + 1] == (*prefix, name)}
        for name in ("mu", "nu")
    )
    if not nu or mu.keys() != nu.keys() or (*prefix, "count") not in leaves:
        raise UsageError("the optimizer's state is not AdamW's: it has no mu, nu and count")
    return leaves[*prefix, "count"], mu, nu
