"""The names of the parameters in each group of an optimizer. Their order comes from the run, so a new optimizer has another one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from repfx.errors import InvalidInput


def names_by_group(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[list[str]]:
    """Return the names of the parameters of each group, in order.

    Raises:
        InvalidInput: a parameter isn't the model's.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = []
    for index, group in enumerate(optimizer.param_groups):
        strangers = [tuple(parameter.shape) for parameter in group["params"] if id(parameter) not in names]
        if strangers:
            raise InvalidInput(
                f"group {index} of the optimizer has {len(strangers)} parameters that aren't the model's, of shapes "
                f"{', '.join(map(str, strangers[:3]))}: put the modules that hold them into one model."
            )
        groups.append([names[id(parameter)] for parameter in group["params"]])
    return groups


def lay_out_state(optimizer: torch.optim.Optimizer) -> None:
    """Lay momenta out in memory as their parameters are, because fused steps read both in one order."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)


def fill_groups(optimizer: torch.optim.Optimizer, model: nn.Module, groups: Sequence[Sequence[str]]) -> None:
    """Give each group the parameters that `groups` names, in that order.

    Raises:
        InvalidInput: the numbers of groups differ, or the model has no parameter of a name.
    """
    found, needed = len(groups), len(optimizer.param_groups)
    if found != needed:
        raise InvalidInput(
            f"there are {found} groups of parameters and the {type(optimizer).__name__} has {needed}; the two must be equal."
        )
    parameters = dict(model.named_parameters())
    unknown = [name for names in groups for name in names if name not in parameters]
    if unknown:
        raise InvalidInput(f"the {type(model).__name__} has no parameter {unknown[0]!r}, which the optimizer trained.")
    for group, names in zip(optimizer.param_groups, groups):
        group["params"] = [parameters[name] for name in names]
