"""The state of an optimizer by the names of its parameters: how a checkpoint holds it, and how it is checked and loaded."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from repfx.change.optimizer_groups import fill_groups, lay_out_state, names_by_group
from repfx.errors import InvalidInput

_GREATEST = 2.0**63
_TRIED = torch.Size([2, 3])
_OWN_SHAPES = ("Adafactor", "LBFGS", "SparseAdam")  # their state has other shapes than the parameters


def state_by_name(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Any]:
    """Return the optimizer's state with the names of parameters in place of their numbers."""
    groups = names_by_group(optimizer, model)
    state = optimizer.state_dict()
    flat = [name for group in groups for name in group]
    return {
        "state": {flat[index]: value for index, value in state["state"].items()},
        "param_groups": [{**group, "params": params} for group, params in zip(state["param_groups"], groups)],
    }


def load_by_name(optimizer: torch.optim.Optimizer, model: nn.Module, state: Any) -> None:
    """Load a state that `state_by_name` returned, in place.

    Raises:
        InvalidInput: the state is malformed or of another optimizer; some of it may have been loaded.
    """
    names = _names_in(state, optimizer)
    of_torch = type(optimizer).__module__.startswith("torch.optim") and type(optimizer).__name__ not in _OWN_SHAPES
    if of_torch:
        _require_floats(state["state"])
    fill_groups(optimizer, model, names)
    numbers = {name: number for number, name in enumerate(name for group in names for name in group)}
    groups = [{**group, "params": [numbers[name] for name in group["params"]]} for group in state["param_groups"]]
    options = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(
        {"state": {numbers[name]: value for name, value in state["state"].items()}, "param_groups": groups}
    )
    for group, before in zip(optimizer.param_groups, options):
        _require_options(group, before)
    if of_torch:
        _require_state(optimizer)
    lay_out_state(optimizer)


def _names_in(state: Any, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """Return the names of each group of a saved state, once its form has been checked."""
    groups = state["param_groups"]
    found, needed = len(groups), len(optimizer.param_groups)
    if found != needed:
        raise InvalidInput(
            f"it has {found} groups of parameters and the {type(optimizer).__name__} has {needed}; the two must be equal"
        )
    names: list[list[str]] = [group["params"] for group in groups]
    flat = [name for group in names for name in group]
    if not all(isinstance(name, str) for name in flat) or len(set(flat)) != len(flat):
        raise InvalidInput("its groups must hold the names of parameters, each once")
    unknown = [name for name in state["state"] if name not in flat]
    if unknown:
        raise InvalidInput(f"it has a state for {unknown[0]!r}, which is in none of its groups")
    return names


def _require_floats(states: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise for a tensor of another kind, which torch would turn into floats when it loads it."""
    for name, state in states.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and key != "step" and not value.is_floating_point():
                raise InvalidInput(f"{key!r} of {name!r} is of {value.dtype}")


def is_alike(found: Any, own: Any) -> bool:
    """Whether a saved value may take the place of another one: a number that of a number, text that of text, and so on."""
    if own is None or found is None:
        return own is None or isinstance(own, bool)
    if isinstance(own, bool):
        return isinstance(found, bool)
    if isinstance(own, (int, float)) or (isinstance(own, Tensor) and own.numel() == 1):
        plain = isinstance(found, (int, float)) and not isinstance(found, bool)
        return plain or (isinstance(found, Tensor) and found.numel() == 1)
    if isinstance(own, (list, tuple)):
        same = isinstance(found, (list, tuple)) and len(found) == len(own)
        return same and all(is_alike(*pair) for pair in zip(found, own))
    return isinstance(found, dict) if isinstance(own, dict) else isinstance(found, type(own))


def _require_options(group: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    for key, own in before.items():
        if key not in group:
            raise InvalidInput(f"a group of its parameters lacks {key!r}")
        found = group[key]
        endless = isinstance(found, (int, float)) and not abs(found) < _GREATEST
        if endless or (own is None and isinstance(found, (str, list, dict))) or not is_alike(found, own):
            raise InvalidInput(f"{key!r} of a group is {str(found)[:80]!r}, where {str(own)[:80]!r} was")


def _require_state(optimizer: torch.optim.Optimizer) -> None:
    """Raise unless each parameter has all that a step of this optimizer reads, in its own shape."""
    for group in optimizer.param_groups:
        trained = [parameter for parameter in group["params"] if optimizer.state.get(parameter)]
        needed = _state_after_a_step(optimizer, group, trained[0]) if trained else {}
        for parameter in trained:
            state = optimizer.state[parameter]
            wrong = next((key for key in {**needed, **state} if not _fits(key, state, needed, parameter)), None)
            if wrong is not None:
                found = state.get(wrong, "missing")
                shown = f"{tuple(found.shape)} of {found.dtype}" if isinstance(found, Tensor) else str(found)[:80]
                raise InvalidInput(f"{wrong!r} of a parameter {tuple(parameter.shape)} is {shown}")


def _fits(key: str, state: Mapping[str, Any], needed: Mapping[str, Any], parameter: Tensor) -> bool:
    found = state.get(key)
    if isinstance(found, Tensor):
        whole = isinstance(needed.get(key), Tensor) and needed[key].shape == _TRIED
        shapes = {parameter.shape} if whole else {parameter.shape, torch.Size(), torch.Size([1])}
        return found.shape in shapes and (found.is_floating_point() or not whole)
    if found is None:
        return needed.get(key) is None or key == "momentum_buffer"
    return not isinstance(needed.get(key), Tensor) and is_alike(found, 0.0)


@torch.no_grad()
def _state_after_a_step(optimizer: torch.optim.Optimizer, group: Mapping[str, Any], like: Tensor) -> dict[str, Any]:
    """Return what this optimizer keeps of a parameter after a step with a group's options; nothing if that can't be tried."""
    with suppress(Exception):
        weight = nn.Parameter(like.new_ones(_TRIED))
        weight.grad = torch.ones_like(weight)
        trial = copy.copy(optimizer)
        trial.param_groups, trial.state = [{**group, "params": [weight]}], defaultdict(dict)
        trial.step()
        return dict(trial.state[weight])
    return {}
