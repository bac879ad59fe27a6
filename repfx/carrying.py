"""Optimizers that follow a model whose structure changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from repfx.block import RepBlock


@contextmanager
def carry(model: nn.Module, *optimizers: torch.optim.Optimizer) -> Iterator[None]:
    """Let optimizers of a model's parameters follow what happens to its structure inside the block.

    Parameters that stay keep their state, momentum say: also those of a conv that absorbed a branch, whose gradient goes on along
    the same direction. Those of a branch that left leave the optimizer with their state. Those of a new branch join the group that
    trains their site's own conv; vectors, as γ and β, that of its own vectors, if there are any. So rates by layer and groups without
    weight decay stay. Where a site's own conv isn't trained by an optimizer, neither are its branches.

    >>> import repfx
    >>> model = nn.Sequential(nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8))
    >>> optimizer = torch.optim.SGD([{"params": [model[0].weight]}, {"params": model[1].parameters(), "weight_decay": 0}], 0.1)
    >>> with carry(model, optimizer):
    ...     model = repfx.expand(model, ["1xk", "kx1"], inplace=True)
    >>> [len(group["params"]) for group in optimizer.param_groups]
    [3, 6]
    """
    before = set(model.parameters())
    try:
        yield
    finally:
        for optimizer in optimizers:
            _follow(model, optimizer, before)


def _follow(model: nn.Module, optimizer: torch.optim.Optimizer, before: set[nn.Parameter]) -> None:
    present = dict.fromkeys(model.parameters())
    gone = {parameter for parameter in before if parameter not in present}
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if parameter not in gone]
    for parameter in gone:
        optimizer.state.pop(parameter, None)
    groups = {parameter: group["params"] for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter in before or parameter in groups:
            continue
        relatives = [relative for relative in _relatives(model, name) if relative in groups]
        alike = [relative for relative in relatives if (relative.ndim > 1) == (parameter.ndim > 1)]
        if relatives:
            groups[parameter] = groups[(alike or relatives)[0]]
            groups[parameter].append(parameter)


def _relatives(model: nn.Module, name: str) -> list[nn.Parameter]:
    """The parameters of what the one of that name belongs to, the nearest first: its module, then the origins of the blocks around it."""
    path = name.rpartition(".")[0]
    found = list(model.get_submodule(path).parameters(recurse=False))
    while path:
        path = path.rpartition(".")[0]
        module = model.get_submodule(path)
        if isinstance(module, RepBlock):
            found += module.origin.parameters()
    return found
