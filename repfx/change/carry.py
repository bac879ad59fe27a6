"""Optimizers and averages that follow a model whose structure changes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import Any

import torch
from torch import nn

from repfx.algebra.activated_norm import norm_of
from repfx.algebra.kernel import Kernel
from repfx.algebra.layers import Layer, is_conv
from repfx.algebra.moments import Moments, set_kernel
from repfx.blocks.block import RepBlock
from repfx.blocks.branch import kernel_of_both
from repfx.blocks.cropped_conv import is_shared
from repfx.blocks.gates import gates_in
from repfx.blocks.origin import origin_kernel, write_origin
from repfx.blocks.squeezed_form import forms_in
from repfx.errors import InvalidInput
from repfx.records.journal import Action, journal, replay
from repfx.records.module_tree import module_at, same_class
from repfx.records.provenance import provenance_of
from repfx.tracing.sites import sites_at, sites_known_of


@contextmanager
def carry(model: nn.Module, *followers: torch.optim.Optimizer | nn.Module) -> Iterator[None]:
    """Let optimizers and averages of a model follow the changes of its structure inside the `with` block.

    Parameters that stay keep their state, such as momentum. This includes those of a conv that absorbed a branch, because its gradient
    keeps its direction. Parameters of a branch that was dropped are removed from the optimizer, with their state. Parameters of a
    new branch join the group that trains their site's own conv. Vectors, such as γ and β, join the group of the site's own vectors, if
    there are any. So learning rates by layer and groups without weight decay stay. If no optimizer trains a site's own conv, none trains
    its branches. The parameters of gates join no group, because a driver trains them by itself.

    An averaged copy goes through the same changes with its own numbers, so what it computes stays, too.

    Args:
        followers: optimizers, and modules that hold a copy of the model as it is when the `with` block begins, such as
            `torch.optim.swa_utils.AveragedModel`.

    Raises:
        InvalidInput: a module holds no copy of the model in its present structure, an optimizer can't take up new parameters, or a
            follower is neither.

    >>> import repfx
    >>> model = nn.Sequential(nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8))
    >>> optimizer = torch.optim.SGD([{"params": [model[0].weight]}, {"params": model[1].parameters(), "weight_decay": 0}], 0.1)
    >>> with carry(model, optimizer):
    ...     model = repfx.expand(model, ["1xk", "kx1"], inplace=True)
    >>> [len(group["params"]) for group in optimizer.param_groups]
    [3, 6]
    """
    for follower in followers:
        if not isinstance(follower, (torch.optim.Optimizer, nn.Module)):
            raise InvalidInput(
                f"a {type(follower).__name__} can't follow the model: give optimizers, or modules that hold a copy of it."
            )
    require_open(follower for follower in followers if isinstance(follower, torch.optim.Optimizer))
    before, done = dict(model.named_parameters()), journal(model)
    copies = [copy_in(follower, model) for follower in followers if isinstance(follower, nn.Module)]
    try:
        yield
    finally:
        _follow(model, [each for each in followers if isinstance(each, torch.optim.Optimizer)], before)
        for copied in copies:
            _go_through(copied, model, journal(model)[len(done) :])


def copy_in(follower: nn.Module, model: nn.Module) -> nn.Module:
    """Return the copy of `model` that `follower` holds.

    Raises:
        InvalidInput: it holds no copy in the present structure.
    """
    names = [name for name, _ in model.named_parameters()]
    for inner in follower.modules():
        same = same_class(inner, model) and journal(inner) == journal(model)
        if same and inner is not model and [name for name, _ in inner.named_parameters()] == names:
            return inner
    raise InvalidInput(
        f"{type(follower).__name__} holds no copy of the {type(model).__name__} in the structure that it has now."
    )


@torch.no_grad()
def _go_through(copied: nn.Module, model: nn.Module, actions: tuple[Action, ...]) -> None:
    """Make the model's changes in a copy. New branches begin as the model's do, and what they add is subtracted from the copy's origin."""
    present = set(copied.parameters())
    modes = {module: module.training for module in copied.modules()}
    with sites_known_of(model, copied):
        replay(copied, actions)
        moved = {action.site for action in actions if action.moves_kernels}
        norms = {path: site.norm for path, site in sites_at(copied, _standing(copied, moved)).items() if site.norm}
    changed = {action.site for action in actions if action.changes_function}
    for name, block in copied.named_modules():
        if isinstance(block, RepBlock):
            new = [
                branch for branch, part in block.branches.items() if not any(p in present for p in part.parameters())
            ]
            if new:
                _begin_as(block, model.get_submodule(name), new, preserve=name not in changed)
    _share_moments(copied, model, norms)
    for module, training in modes.items():
        module.training = training
    for module in copied.modules():
        if isinstance(module, RepBlock):
            module.stop_norms()
    for form in forms_in(copied).values():
        form.stop_norms()


def _standing(model: nn.Module, sites: set[str]) -> list[str]:
    """Return the sites that are still there; a site inside a branch leaves with the branch."""
    return [
        path
        for path, module in model.named_modules()
        if path in sites and (is_conv(module) or isinstance(module, RepBlock))
    ]


def _share_moments(copied: nn.Module, model: nn.Module, sites: Mapping[str, str]) -> None:
    """Give the copy's BatchNorms the moments of the model's, because averaging takes over the model's statistics.

    The kernel of each site stays.

    Args:
        sites: the path of each site's BatchNorm, by the site's path.
    """
    for path, norm_path in sites.items():
        nets: list[Any] = [each.get_submodule(path) for each in (copied, model)]
        if isinstance(nets[0], RepBlock):
            _share_in(*nets)
            continue
        norm, other = (norm_of(each.get_submodule(norm_path)) for each in (copied, model))
        if _is_affine(other):
            set_kernel(nets[0], norm, kernel_of_both(nets[0], norm), Moments.after(other))


def _share_in(copied: RepBlock, block: RepBlock) -> None:
    """Do so in a block, and in the block that its own conv may have become."""
    if any(map(is_shared, copied.branches.values())):
        return  # the branches' weights follow the conv's
    if _is_affine(block.norm):
        write_origin(copied, origin_kernel(copied), Moments.after(block.norm))
    if copied.inner is not None and block.inner is not None:
        _share_in(copied.inner, block.inner)


def _is_affine(norm: Layer | None) -> bool:
    return norm is not None and norm.weight is not None and norm.bias is not None


def _begin_as(block: RepBlock, other: Any, branches: list[str], *, preserve: bool) -> None:
    """Give branches of a block the state that they have in another block. With `preserve`, the block's function stays."""
    like = block.conv.weight.double()
    before = block.equivalent_kernel(like)
    for branch in branches:
        block.branches[branch].load_state_dict(other.branches[branch].state_dict())
    if block.attach_rate is not None:
        block.attach_rate.copy_(other.attach_rate)
    if not preserve:
        return
    added = [block.kernel_of(branch, like) for branch in branches]
    if any(bool(kernel.weight.any()) for kernel in added):
        kernel = reduce(Kernel.subtract, (block.kernel_of(branch, like) for branch in block.branches), before)
        scale = None if other.scale is None else other.scale.weight
        write_origin(block, kernel, None if other.norm is None else Moments.after(other.norm), scale)


def require_open(optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Raise `InvalidInput` for an optimizer that fails as soon as some of its parameters have been trained and others haven't."""
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.SGD) and any(
            group["fused"] and group["momentum"] for group in optimizer.param_groups
        ):
            raise InvalidInput(
                "torch's fused SGD with momentum can't take up parameters of branches that are added later: leave out fused=True."
            )


def _follow(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], before: dict[str, nn.Parameter]) -> None:
    """Remove parameters that are gone from the optimizers, and put each new parameter into one group.

    Of the groups of all optimizers, it is the one that trains the parameter's nearest relative, if possible of the same sort: a vector
    or not.
    """
    present, known = set(model.parameters()), set(before.values())
    gone = known - present
    all_groups = [group["params"] for optimizer in optimizers for group in optimizer.param_groups]
    groups = {parameter: params for params in all_groups for parameter in params}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"][:] = [parameter for parameter in group["params"] if parameter not in gone]
        for parameter in gone:
            optimizer.state.pop(parameter, None)
    gates = {parameter for each in gates_in(model).values() for parameter in each.parameters()}
    for name, parameter in model.named_parameters():
        if parameter in known or parameter in groups or parameter in gates:
            continue
        relatives = [relative for relative in _relatives(model, name, before) if relative in groups]
        alike = [relative for relative in relatives if (relative.ndim > 1) == (parameter.ndim > 1)]
        if relatives:
            groups[parameter] = groups[(alike or relatives)[0]]
            groups[parameter].append(parameter)


def _relatives(model: nn.Module, name: str, before: dict[str, nn.Parameter]) -> list[nn.Parameter]:
    """Return the parameters to which the one called `name` belongs, the nearest first.

    First comes the parameter that it replaces. Then come those of its module, those of the conv behind which its BatchNorm was put back,
    and those of the origins of the blocks around it.
    """
    found = [before[name]] if name in before else []
    path = name.rpartition(".")[0]
    module = model.get_submodule(path)
    found += module.parameters(recurse=False)
    provenance = provenance_of(module)
    for source in () if provenance is None else provenance.sources:
        found += model.get_submodule(source).parameters()
    while path:
        path = path.rpartition(".")[0]
        module = model.get_submodule(path)
        if isinstance(module, RepBlock):
            found += module.origin.parameters()
            behind = None if module.norm_behind is None else module_at(model, module.norm_behind)
            found += [] if behind is None else behind.parameters(recurse=False)
    return found
