"""`expand`: the training form of a model, branches beside its convs, the function unchanged."""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import reduce
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from repfx.activated_norm import norm_of, rest_of
from repfx.block import RepBlock
from repfx.branch import Branch, fitting, kind_of
from repfx.calibration import calibrate_norms, set_kernels_measured
from repfx.errors import InvalidInput
from repfx.journaling import Action, record
from repfx.kernel import Kernel
from repfx.meaning import Layer, is_batch_norm, is_conv
from repfx.module_tree import set_submodule
from repfx.moments import set_kernel
from repfx.notes import copy_of
from repfx.pipeline import verb
from repfx.reporting import Edit, Report, Skip
from repfx.selection import Selection
from repfx.site import Site, find_sites
from repfx.spec import BranchSpec, ConvSpec, Spec, SpecLike
from repfx.stages import Norm, reset_fan_out


@dataclass(frozen=True)
class Expand(Action):
    """A conv became a block.

    Args:
        branches: beside the site's own conv, in order.
        norm: how they are normalised, as in `Spec`.
    """

    kind: ClassVar[str] = "expand"
    branches: tuple[BranchSpec, ...]
    norm: Literal["batch_norm", "scale", "none"]

    @classmethod
    def replay(cls, model: nn.Module, actions: Sequence[Expand]) -> None:
        together: dict[str, Spec] = {}
        for action in actions:
            if any(action.site.startswith(f"{site}.") for site in together):  # inside a block that this makes
                expand(model, together, inplace=True)
                together = {}
            together[action.site] = Spec(action.branches, action.norm)
        expand(model, together, inplace=True)

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "branches": [asdict(branch) for branch in self.branches]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Expand:
        return cls(**{**values, "branches": tuple(BranchSpec(**branch) for branch in values["branches"])})


@verb
def expand(
    model: nn.Module,
    spec: SpecLike,
    *,
    preserve: bool = True,
    gamma: float = 0.0,
    calibrate: Iterable[Any] | None = None,
    inplace: bool = False,
    strict: bool = False,
) -> nn.Module:
    """Put trainable branches beside the convs of a model, without changing what it computes.

    The conv of each site and the BatchNorm that only it feeds become one `RepBlock` at the conv's path. Class, attributes and all
    other modules of the model stay as they are. Sites that are blocks already are left alone, and so is what lies inside them,
    unless `spec` names it by its exact path.

    Args:
        spec: a preset's name, a list of branch kinds, a `Spec`, or a dict from patterns of site paths to any of these.
        preserve: keep the function, in training mode too: the branches' last BatchNorms begin with γ = 0, and a branch that has none
            is taken off the site's own weights. Otherwise the branches begin as in their papers.
        gamma: with `preserve`, another γ for the branches' last BatchNorms to begin with, as DyRep's 0.01. What they then compute is taken
            off the site's own conv, whose BatchNorm gets the statistics that this leaves; so `calibrate` is needed, and is gone through
            twice. The function stays, in training mode as far as the statistics of `calibrate` are those of a batch.
        calibrate: inputs of the model, or a data loader; sets the statistics of the new BatchNorms to what they see.
        inplace: change `model` itself instead of a copy.
        strict: raise if a site or branch is left alone.

    Returns:
        The model; `repfx.sites` shows what became of each site, `repfx.report` what was left alone and why.

    Raises:
        InvalidInput: no conv in the model, a spec that can't be used, or `gamma` without `preserve` and `calibrate`; UnknownName for an
            unknown preset or branch kind.
        Refused: with `strict`.

    >>> expanded = expand(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)), "repvgg")
    >>> list(expanded[0].branches)
    ['1x1', 'identity']
    """
    selection = Selection.of(spec)
    if gamma and (calibrate is None or not preserve):
        raise InvalidInput(
            f"gamma={gamma} needs preserve and calibrate: the site's own BatchNorm has to be measured anew."
        )
    if not any(is_conv(module) for module in model.modules()):
        raise InvalidInput(f"{type(model).__name__} has no convs, so there is nothing to expand.")
    target = model if inplace else copy_of(model)
    plans, skips = _plan(find_sites(target), selection)
    report = Report("expand", tuple(Edit("expand", plan.site.path) for plan in plans), tuple(skips))
    if strict:
        report.require_all()
    blocks = [_block(target, plan, preserve=preserve) for plan in plans]  # nothing is changed before all of them exist
    with ExitStack() as undo:
        for plan, block in zip(plans, blocks):
            _install(target, plan, block, undo, preserve=preserve)
        if calibrate is not None:
            calibrate_norms(target, [norm for block in blocks for norm in _new_norms(block)], calibrate)
        if gamma and calibrate is not None:
            _begin_with(gamma, target, blocks, calibrate, undo)
        undo.pop_all()
    record(target, [Expand(plan.site.path, plan.branches, plan.spec.norm) for plan in plans])
    report.attach(target)
    return target


@dataclass(frozen=True)
class _Plan:
    site: Site
    spec: Spec
    branches: tuple[BranchSpec, ...]


def _plan(sites: list[Site], selection: Selection) -> tuple[list[_Plan], list[Skip]]:
    open_sites = [site for site in sites if site.block is None or selection.names(site.path)]
    selection.require_used([site.path for site in open_sites])
    plans, skips = [], []
    for site in open_sites:
        spec = selection.spec_for(site.path)
        refusal = "no pattern of the spec names it" if spec is None else site.refusal
        if site.branches:
            refusal = "it is a block already"
        if spec is None or refusal is not None or site.conv is None:
            skips.append(Skip(site.path, refusal or "its sizes can't be read", "expand"))
            continue
        wanted = spec.branches_for(site.conv)
        branches, refusals = fitting(wanted, site.conv)
        if refusals or not wanted:
            skips.append(Skip(site.path, refusals or "the spec has no branches for this window", "expand"))
        if branches:
            plans.append(_Plan(site, spec, branches))
    return plans, skips


def _block(model: nn.Module, plan: _Plan, *, preserve: bool) -> RepBlock:
    """The block of a site; the model isn't changed, the conv's weights are not yet either."""
    conv: Layer = model.get_submodule(plan.site.path)
    own_norm: Layer | None = None if plan.site.norm is None else norm_of(model.get_submodule(plan.site.norm))
    norm = Norm.like(plan.spec.norm, own_norm)
    branches: dict[str, Branch] = {}
    for branch in plan.branches:
        built = kind_of(branch)(ConvSpec.of(conv), norm, conv.weight, **branch.options)
        _initialise(built, plan.spec, preserve=preserve)
        branches[_free_name(branch.kind, branches)] = built.train(conv.training)
    moved = own_norm if plan.spec.norm == "batch_norm" else None
    return RepBlock(conv, moved, branches, plan.site.norm if moved is not None else None)


def _free_name(kind: str, taken: Container[str]) -> str:
    names = itertools.chain([kind], (f"{kind}-{number}" for number in itertools.count(2)))
    return next(name for name in names if name not in taken)


def _initialise(branch: Branch, spec: Spec, *, preserve: bool) -> None:
    if spec.weights == "fan_out":
        convs: list[Layer] = [module for module in branch.modules() if is_conv(module)]
        for conv in convs:
            if conv.weight.requires_grad:
                reset_fan_out(conv)
    if branch.last_norm is not None:
        nn.init.constant_(branch.last_norm.weight, 0.0 if preserve else spec.gamma)


def _install(model: nn.Module, plan: _Plan, block: RepBlock, undo: ExitStack, *, preserve: bool) -> None:
    """Put a block in the place of its conv; `undo` takes it back if something fails later."""
    conv = block.conv
    if preserve and plan.spec.norm != "batch_norm":
        weight = conv.weight.detach().clone()
        undo.callback(lambda: conv.weight.detach().copy_(weight))
        _take_off(block)
    undo.callback(set_submodule, model, plan.site.path, conv)
    set_submodule(model, plan.site.path, block)
    if block.norm_path is not None:
        own = model.get_submodule(block.norm_path)
        undo.callback(set_submodule, model, block.norm_path, own)
        set_submodule(model, block.norm_path, rest_of(own))


def _take_off(block: RepBlock) -> None:
    """Subtract what the branches compute from the conv's own weights, so that the sum stays."""
    weight = block.conv.weight.detach()
    like = weight.double()
    kernels = [branch.equivalent_kernel(like) for branch in block.branches.values()]
    weight.copy_(reduce(Kernel.subtract, kernels, block.origin.equivalent_kernel(like)).weight)


@torch.no_grad()
def _begin_with(
    gamma: float, model: nn.Module, blocks: list[RepBlock], batches: Iterable[Any], undo: ExitStack
) -> None:
    """Let branches add something at once, and take it off the origins.

    DyRep's own code resets the origins' statistics instead of measuring them, so that the output drifts.
    """
    origins = [block for block in blocks if any(branch.last_norm is not None for branch in block.branches.values())]
    kernels = []
    for block in origins:
        block.require_affine("the branches")
        like = block.conv.weight.double()
        own, added = block.origin.equivalent_kernel(like), []
        without_bias = block.norm is None and block.conv.bias is None
        undo.callback(
            block.origin.load_state_dict, {name: value.clone() for name, value in block.origin.state_dict().items()}
        )
        for branch in block.branches.values():
            if branch.last_norm is not None:
                branch.last_norm.weight.fill_(gamma)
                if without_bias:
                    _take_bias_away(branch, like)
                kernel = branch.equivalent_kernel(like)
                added.append(replace(kernel, bias=None) if without_bias else kernel)
        kernels.append(reduce(Kernel.subtract, added, own))
        set_kernel(block.conv, block.norm, kernels[-1], None)
    places = [(block.conv, block.norm, kernel) for block, kernel in zip(origins, kernels) if block.norm is not None]
    if places:
        set_kernels_measured(model, places, batches)


def _take_bias_away(branch: Branch, like: Tensor) -> None:
    """By β, where the origin has nothing that could take the branch's bias off."""
    bias = branch.equivalent_kernel(like).bias
    if bias is not None and branch.last_norm is not None:
        branch.last_norm.bias.sub_(bias)


def _new_norms(block: RepBlock) -> list[nn.Module]:
    return [module for branch in block.branches.values() for module in branch.modules() if is_batch_norm(module)]
