"""Optimizers and averages that follow a model whose structure changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from repfx.block import RepBlock
from repfx.errors import InvalidInput
from repfx.journaling import Action, journal, replay


@contextmanager
def carry(model: nn.Module, *followers: torch.optim.Optimizer | nn.Module) -> Iterator[None]:
    """Let optimizers of a model's parameters, and averages of the model, follow what happens to its structure inside the block.

    Parameters that stay keep their state, momentum say: also those of a conv that absorbed a branch, whose gradient goes on along
    the same direction. Those of a branch that left leave the optimizer with their state. Those of a new branch join the group that
    trains their site's own conv; vectors, as γ and β, that of its own vectors, if there are any. So rates by layer and groups without
    weight decay stay. Where a site's own conv isn't trained by an optimizer, neither are its branches.

    An averaged copy goes through the same changes with its own numbers, so that what it computes stays, too.

    Args:
        followers: optimizers, and modules that hold a copy of the model as it is when the block begins, as
            `torch.optim.swa_utils.AveragedModel` does.

    Raises:
        InvalidInput: a module holds no copy of the model in the structure that it has now.

    >>> import repfx
    >>> model = nn.Sequential(nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8))
    >>> optimizer = torch.optim.SGD([{"params": [model[0].weight]}, {"params": model[1].parameters(), "weight_decay": 0}], 0.1)
    >>> with carry(model, optimizer):
    ...     model = repfx.expand(model, ["1xk", "kx1"], inplace=True)
    >>> [len(group["params"]) for group in optimizer.param_groups]
    [3, 6]
    """
    before, done = set(model.parameters()), journal(model)
    copies = [_copy_in(follower, model) for follower in followers if isinstance(follower, nn.Module)]
    try:
        yield
    finally:
        for follower in followers:
            if isinstance(follower, torch.optim.Optimizer):
                _follow(model, follower, before)
        for copied in copies:
            _go_through(copied, model, journal(model)[len(done) :])


def _copy_in(follower: nn.Module, model: nn.Module) -> nn.Module:
    """The copy of a model that a module holds."""
    names = [name for name, _ in model.named_parameters()]
    for inner in follower.modules():
        same = type(inner) is type(model) and journal(inner) == journal(model)
        if same and inner is not model and [name for name, _ in inner.named_parameters()] == names:
            return inner
    raise InvalidInput(
        f"{type(follower).__name__} holds no copy of the {type(model).__name__} in the structure that it has now."
    )


@torch.no_grad()
def _go_through(copied: nn.Module, model: nn.Module, actions: tuple[Action, ...]) -> None:
    """Make the same changes; branches begin as the model's do, where they add nothing yet."""
    present = set(copied.parameters())
    modes = {module: module.training for module in copied.modules()}
    replay(copied, actions)
    for name, block in copied.named_modules():
        if isinstance(block, RepBlock):
            for branch, part in block.branches.items():
                new = not any(parameter in present for parameter in part.parameters())
                if new and part.last_norm is not None and not bool(part.last_norm.weight.any()):
                    part.load_state_dict(model.get_submodule(f"{name}.{branch}").state_dict())
    for module, training in modes.items():
        module.training = training


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
