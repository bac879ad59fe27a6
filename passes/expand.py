"""`expand`: the training form of a model: branches beside its convs, with the function unchanged."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import reduce
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from repfx.algebra.activated_norm import norm_of, rest_of
from repfx.algebra.conv_spec import ConvSpec
from repfx.algebra.kernel import Kernel
from repfx.algebra.layers import Layer, is_batch_norm, is_conv
from repfx.algebra.meaning import kernel_of
from repfx.algebra.moments import Moments, set_kernel
from repfx.blocks.architecture import Architecture
from repfx.blocks.block import RepBlock
from repfx.blocks.branch import Branch, fitting, kind_of
from repfx.blocks.cropped_conv import share
from repfx.blocks.origin import origin_kernel, require_affine, write_origin
from repfx.blocks.own_fusing import give_methods_back, put_blocks_first
from repfx.blocks.paths import block_at
from repfx.blocks.presets import SpecLike
from repfx.blocks.selection import Selection
from repfx.blocks.spec import BranchSpec, Normalisation, Spec, Weights
from repfx.blocks.stages import FIRST_WEIGHTS, Norm, TrackedNorm
from repfx.blocks.windows.autocorrelation import windows_of
from repfx.errors import InvalidInput
from repfx.measuring.calibration import PartialSum, calibrate_norms, measure_sums
from repfx.measuring.in_float64 import Inputs
from repfx.measuring.proof import proven
from repfx.records.journal import Action, forget, is_rebuilt, record, require_told
from repfx.records.module_tree import set_submodule
from repfx.records.notes import copy_of
from repfx.records.report import Edit, Report, Skip
from repfx.rewriting.pipeline import verb
from repfx.tracing.sites import Site, find_sites, sites_at


@dataclass(frozen=True)
class Expand(Action):
    """Turn a conv or linear layer into a block. The function stays, unless `preserve` is False.

    Args:
        branches: the branches beside the site's own conv, in order. In the journal, each has the name that it has in the block.
        norm, weights, origin: the fields of `Spec`.
        gamma: first γ of the branches' last BatchNorms, as in `expand`. If `preserve` is False, it is the γ of `Spec`, and 0 means
            the default of `Spec`.
        attach_rate: first λ of the block; None for a block without λ.
        preserve: False if the branches began as in their papers, so that the function changed.
        origin_scale, norm_behind: the fields of `Spec`.
    """

    kind: ClassVar[str] = "expand"
    branches: tuple[BranchSpec, ...]
    norm: Normalisation = "batch_norm"
    weights: Weights = "default"
    gamma: float = 0.0
    attach_rate: float | None = None
    preserve: bool = True
    origin: bool = True
    origin_scale: float | None = None
    norm_behind: bool = False

    @property
    def changes_function(self) -> bool:
        return not self.preserve

    @classmethod
    def by(cls, spec: Spec, site: str, conv: ConvSpec, **options: Any) -> list[Expand]:
        """Return the expansion of a conv by a spec, or an empty list if no branch fits. `options` override fields of the spec."""
        served = spec.takes(conv) and spec.refusal(conv) is None
        branches, _ = fitting(spec.branches_for(conv) if served else (), conv)
        own = {name: getattr(spec, name) for name in ("norm", "weights", "origin_scale", "norm_behind")}
        return [cls(site, branches, **{**own, **options})] if branches else []

    @classmethod
    def apply(cls, model: nn.Module, actions: Sequence[Expand], calibrate: Iterable[Any] | None) -> None:
        for group in _apart(actions):
            first = group[0]
            gamma = first.gamma if first.preserve else 0.0
            beginning = _Beginning(first.preserve, gamma, first.attach_rate, calibrate)
            plans, skips = _plans_of(model, group, beginning)
            _require_all(skips)
            _grow(model, plans, beginning)
            record(model, [action._done(model) for action in group])
            _report(plans, skips).attach(model)

    @classmethod
    def replay(cls, model: nn.Module, actions: Sequence[Expand]) -> None:
        for group in _apart(actions):
            _rebuild(model, group)

    def _done(self, model: nn.Module) -> Expand:
        """Return this action as the journal records it: with the names of its branches in the block, and with the number of γ."""
        names = block_at(model, self.site).branches
        branches = tuple(replace(branch, name=name) for branch, name in zip(self.branches, names))
        return replace(self, branches=branches, gamma=self.gamma if self.preserve else _first_gamma(self))

    def __str__(self) -> str:
        rate = "" if self.attach_rate is None else f", attached by {self.attach_rate:g}"
        return f"expand {self.site}: {', '.join(branch.kind for branch in self.branches)}{rate}"

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "branches": [asdict(branch) for branch in self.branches]}


_ALIKE = ("gamma", "attach_rate", "preserve")


def _apart(actions: Sequence[Expand]) -> Iterator[list[Expand]]:
    """Split actions into groups that can be done at once.

    The actions of a group agree in the fields `_ALIKE`, and none is at or inside a block that another action of the group makes.
    """
    group: list[Expand] = []
    for action in actions:
        alike = not group or all(getattr(action, name) == getattr(group[0], name) for name in _ALIKE)
        if not alike or any(f"{action.site}.".startswith(f"{other.site}.") for other in group):
            yield group
            group = []
        group.append(action)
    if group:
        yield group


def _specs(actions: list[Expand]) -> dict[str, Spec]:
    return {
        action.site: Spec(
            action.branches,
            action.norm,
            _first_gamma(action),
            action.weights,
            action.origin,
            action.origin_scale,
            "both",  # the path says which layer it is
            action.norm_behind,
        )
        for action in actions
    }


def _first_gamma(action: Expand) -> float:
    return action.gamma if action.gamma and not action.preserve else 1.0


@verb
def expand(
    model: nn.Module,
    spec: SpecLike | Architecture,
    *,
    preserve: bool | None = None,
    gamma: float = 0.0,
    attach_rate: float | None = None,
    calibrate: Iterable[Any] | None = None,
    example: Inputs | None = None,
    inplace: bool = False,
    strict: bool = False,
) -> nn.Module:
    """Put trainable branches beside the convs or linear layers of a model, without changing what it computes.

    At each site, the conv and the BatchNorm that only it feeds become one `RepBlock` at the conv's path. The model's class, its
    attributes and all its other modules stay as they are. A site that is already a block is left alone. So are the convs inside a
    block, unless `spec` names them by their exact path. Linear layers are sites only where `Spec.layers` says so; see `repfx.Spec`.

    Args:
        spec: a preset's name, a list of branch kinds, a `Spec`, a dict from patterns of site paths to any of these, or an
            `Architecture` that a search has found, which can be the name of its ``.json`` file.
        preserve: keep the function, in training mode too. The branches' last BatchNorms begin with γ = 0, and the kernel of a branch
            without BatchNorm is subtracted from the site's own. With False, the branches begin as in their papers, and with γ = 0 where
            the site's own BatchNorm does, as the last one of a residual block may. By default the function is kept, unless the spec
            lets a site's own conv rest (`Spec.origin`): then it can't be kept.
        gamma: with `preserve`, another first γ for the branches' last BatchNorms, such as DyRep's 0.01. It is relative to the γ of the
            site's own BatchNorm, channel by channel; a site that has no BatchNorm gets one inside its block. What the branches then
            compute is subtracted from the site's own conv, and its BatchNorm gets the statistics of the rest. So `gamma` needs
            `calibrate`, and reads it two or three times. The function stays; in training mode it does so as far as the
            statistics of `calibrate` equal those of a batch.
        attach_rate: λ, a buffer by which each new block multiplies the sum of its branches, as RepAn does. With 0 the function stays,
            and the branches may begin as in their papers. Any other value needs `preserve=False`.
        calibrate: inputs of the model, or a data loader, on which the statistics of the new BatchNorms are measured.
        example: input of the model, as `check_equivalent` takes it: proves that the model computes what it did, in float64, and in
            training mode, too, unless `gamma` is given or a spec has `norm_behind`, which keep that as far as statistics have settled.
            It can't be given with `preserve=False`.
        inplace: change `model` itself instead of a copy.
        strict: raise if a site or branch that `spec` names is left alone.

    Returns:
        The model. `repfx.sites` shows what became of each site, and `repfx.report` shows what was left alone and why.

    Raises:
        InvalidInput: the model has no layer that the spec is for, the spec can't be used, `gamma` is given without `preserve` and
            `calibrate`, or `attach_rate` doesn't preserve the function; UnknownName: a preset or branch kind is unknown.
        Refused: with `strict`, something was left alone; EquivalenceError: the output on `example` would change. The model is
            unchanged.

    >>> expanded = expand(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)), "repvgg")
    >>> list(expanded[0].branches)
    ['1x1', 'identity']
    """
    selection = Selection.of(spec)
    beginning = _Beginning(selection.keeps_origins if preserve is None else preserve, gamma, attach_rate, calibrate)
    beginning.require_possible(selection)
    _require_layers(model, selection)
    if example is not None and not beginning.preserve:
        raise InvalidInput(
            "example proves that the function stays, which preserve=False doesn't let: leave one of them out."
        )
    target = model if inplace else copy_of(model)
    behind = any(each.norm_behind for _, each in selection.patterns)
    is_base = not any(isinstance(module, RepBlock) for module in target.modules())
    if not is_base:
        require_told(target)
    with proven("expand", target, example, in_training=not (gamma or behind)):
        plans, skips = _plan(find_sites(target), selection)
        if strict:
            _require_all(skips)
        _grow(target, plans, beginning)
        if is_base and is_rebuilt(target):
            forget(target)
        record(target, [plan.action(target, beginning) for plan in plans])
    _report(plans, skips).attach(target)
    return target


def _require_layers(model: nn.Module, selection: Selection) -> None:
    """Raise `InvalidInput` if a model has none of the layers that the specs are for."""
    sorts = {spec.layers for _, spec in selection.patterns}
    if any(is_conv(module) for module in model.modules()) and sorts != {"linear"}:
        return
    if any(isinstance(module, nn.Linear) for module in model.modules()):
        if sorts != {"conv"}:
            return
        hint = '; the preset "lora", or a repfx.Spec with layers="linear", expands its linear layers'
    else:
        hint = ""
    what = "linear layers" if sorts == {"linear"} else "convs"
    raise InvalidInput(f"{type(model).__name__} has no {what}, so there is nothing to expand{hint}.")


@dataclass(frozen=True)
class _Beginning:
    """The beginning of new branches; the fields are arguments of `expand`."""

    preserve: bool
    gamma: float = 0.0
    attach_rate: float | None = None
    calibrate: Iterable[Any] | None = None

    def require_possible(self, selection: Selection) -> None:
        """Raise `InvalidInput` if the branches of a selection can't begin this way."""
        preserve, gamma, attach_rate = self.preserve, self.gamma, self.attach_rate
        if preserve and not selection.keeps_origins:
            raise InvalidInput(
                "the spec lets the own conv of a site rest, so the function can't be kept: give preserve=False."
            )
        if gamma and (self.calibrate is None or not preserve):
            raise InvalidInput(
                f"gamma={gamma} needs preserve and calibrate: the site's own BatchNorm has to be measured anew."
            )
        if gamma and any(spec.weights == "shared" for _, spec in selection.patterns):
            raise InvalidInput(
                "gamma can't be given to branches with shared weights: what they add can't be subtracted from the weights they share."
            )
        if gamma and any(spec.norm == "tracked" for _, spec in selection.patterns):
            raise InvalidInput(
                'gamma can\'t be given to branches with norm="tracked": the first measurement would change what they add.'
            )
        if attach_rate and preserve:
            raise InvalidInput(f"attach_rate={attach_rate} changes the function: begin with 0, or give preserve=False.")
        if gamma and attach_rate is not None:
            raise InvalidInput("gamma and attach_rate each let branches begin gently: give only one of them.")


def _require_all(skips: list[Skip]) -> None:
    """Raise `Refused` if a site or branch that the spec names is left alone."""
    Report("expand", (), tuple(skip for skip in skips if skip.reason != _NOT_NAMED)).require_all()


def _report(plans: list[_Plan], skips: list[Skip]) -> Report:
    return Report("expand", tuple(Edit("expand", plan.site.path) for plan in plans), tuple(skips))


def _grow(model: nn.Module, plans: list[_Plan], beginning: _Beginning) -> None:
    """Make the blocks and put them in their places. If anything fails, the model is as it was."""
    preserve, gamma, calibrate = beginning.preserve, beginning.gamma, beginning.calibrate
    quiet = preserve and beginning.attach_rate is None  # γ = 0, or subtracted from the origin
    blocks = [_block(model, plan, beginning.attach_rate, quiet=quiet) for plan in plans]
    with ExitStack() as undo:  # nothing is changed before all blocks exist
        undo.callback(give_methods_back, model)
        for plan, block in zip(plans, blocks):
            _install(model, plan, block, undo, preserve=preserve)
        if calibrate is not None:
            calibrate_norms(
                model, [norm for block in blocks for norm in _new_norms(block, preserve=preserve)], calibrate
            )
        if gamma and calibrate is not None:
            _begin_with(gamma, model, blocks, calibrate, undo)
        undo.pop_all()


def _plans_of(model: nn.Module, actions: list[Expand], beginning: _Beginning) -> tuple[list[_Plan], list[Skip]]:
    """Return the plans and the skips for the sites of `actions`. Sites that are already known are not searched again."""
    selection = Selection.of(_specs(actions))
    beginning.require_possible(selection)
    return _plan(list(sites_at(model, [action.site for action in actions]).values()), selection)


_NOT_NAMED = "no pattern of the spec names it"


@dataclass(frozen=True)
class _Plan:
    site: Site
    spec: Spec
    branches: tuple[BranchSpec, ...]

    def action(self, model: nn.Module, beginning: _Beginning) -> Expand:
        """Return the action that was done; the block must be in its place."""
        spec, gamma = self.spec, beginning.gamma if beginning.preserve else self.spec.gamma
        how = (
            spec.norm,
            spec.weights,
            gamma,
            beginning.attach_rate,
            beginning.preserve,
            spec.origin,
            spec.origin_scale,
            spec.norm_behind,
        )
        return Expand(self.site.path, self.branches, *how)._done(model)


def _plan(sites: list[Site], selection: Selection) -> tuple[list[_Plan], list[Skip]]:
    open_sites = [site for site in sites if site.block is None or selection.names(site.path)]
    others = {site.path for site in open_sites if not selection.takes(site.path, linear=site.linear)}
    open_sites = [site for site in open_sites if site.path not in others]
    selection.require_used({site.path: str(site.conv or "?") for site in open_sites}, others)
    plans, skips = [], []
    for site in open_sites:
        spec = selection.spec_for(site.path)
        refusal = "it is a block already" if site.branches else site.refusal
        if spec is None:
            refusal = _NOT_NAMED
        elif site.own and refusal is None and not spec.norm_behind:
            refusal = "it is the own conv of a block: give a repfx.Spec with norm_behind=True"
        elif refusal is None and site.conv is not None:
            refusal = spec.refusal(site.conv)
        if spec is None or refusal is not None or site.conv is None:
            skips.append(Skip(site.path, refusal or "its sizes can't be read", "expand"))
            continue
        wanted = spec.branches_for(site.conv)
        branches, refusals = fitting(wanted, site.conv)
        if refusals and selection.architecture is not None:
            raise InvalidInput(f"the architecture doesn't fit {site.path!r}: {refusals}.")
        if refusals or not wanted:
            skips.append(Skip(site.path, refusals or "the spec has no branches for this window", "expand"))
        if branches:
            plans.append(_Plan(site, spec, branches))
    return plans, skips


def _block(model: nn.Module, plan: _Plan, attach_rate: float | None, *, quiet: bool) -> RepBlock:
    """Make the block of a site. Neither the model nor the conv's weights are changed yet."""
    conv: Layer = model.get_submodule(plan.site.path)
    own_norm: Layer | None = None if plan.site.norm is None else norm_of(model.get_submodule(plan.site.norm))
    norm, site = Norm.like(plan.spec.norm, own_norm), ConvSpec.of(conv)
    tracked: TrackedNorm | None = None
    if norm.kind == "tracked":
        norm = replace(norm, windows=windows_of(site, conv.weight, norm.eps))
        tracked = norm.tracked(site.out_channels, site.dimensions, conv.weight, last=True)
    inside = own_norm is not None and plan.spec.norm == "batch_norm" and not plan.spec.norm_behind
    at_zero = inside and _begins_at_zero(own_norm)
    branches: dict[str, Branch] = {}
    for branch in plan.branches:
        built = kind_of(branch)(site, norm, conv.weight, **branch.options)
        if plan.spec.weights == "shared":
            share(built, conv)
        built.first_scale = branch.scale
        _initialise(built, plan.spec, quiet=quiet or at_zero)
        branches[branch.name or _free_name(branch.kind, branches)] = built.train(conv.training)
    if own_norm is None or plan.spec.norm != "batch_norm":
        return RepBlock(conv, None, branches, None, attach_rate, plan.spec.origin_scale, tracked=tracked)
    if not plan.spec.norm_behind:
        return RepBlock(conv, own_norm, branches, plan.site.norm, attach_rate)
    return RepBlock(conv, _norm_like(norm, conv), branches, None, attach_rate, norm_behind=plan.site.norm)


def _begins_at_zero(norm: Layer | None) -> bool:
    """Whether all γ of a BatchNorm are 0, by which residual nets let a block begin as the identity."""
    gamma: Tensor | None = None if norm is None else norm.weight
    return gamma is not None and not gamma.is_meta and not bool(gamma.any())


def _norm_like(norm: Norm, conv: Layer) -> nn.Module:
    """Make a BatchNorm for a site's own conv."""
    site = ConvSpec.of(conv)
    made = norm.batch_norm(site.out_channels, site.dimensions, conv.weight)
    return made.requires_grad_(conv.weight.requires_grad).train(conv.training)


def _free_name(kind: str, taken: Container[str]) -> str:
    names = itertools.chain([kind], (f"{kind}-{number}" for number in itertools.count(2)))
    return next(name for name in names if name not in taken)


def _initialise(branch: Branch, spec: Spec, *, quiet: bool) -> None:
    for conv in branch.free_convs:
        FIRST_WEIGHTS[spec.weights](conv)
    if branch.last_gamma is not None:
        nn.init.constant_(branch.last_gamma, 0.0 if quiet else spec.gamma)
    scale: Layer | None = branch._modules.get("scale")
    if scale is not None:
        nn.init.constant_(scale.weight, branch.first_scale)


def _install(model: nn.Module, plan: _Plan, block: RepBlock, undo: ExitStack, *, preserve: bool) -> None:
    """Put a block in the place of its conv; `undo` takes it back if something fails later."""
    conv = block.conv
    if not plan.spec.origin:
        undo.callback(block.wake)
        block.rest()
    if preserve and plan.spec.norm in ("scale", "none"):  # all others begin with γ = 0
        undo.callback(conv.load_state_dict, copy.deepcopy(conv.state_dict()))
        _take_off(block)
    if preserve and block.norm_behind is not None:
        undo.callback(conv.load_state_dict, copy.deepcopy(conv.state_dict()))
        own: Layer = norm_of(model.get_submodule(block.norm_behind))
        like = conv.weight.detach().double()
        kernel = kernel_of(conv, like, block.site.in_channels, block.site.dimensions)
        set_kernel(conv, block.norm, kernel, Moments.before(own))
    undo.callback(set_submodule, model, plan.site.path, conv)
    set_submodule(model, plan.site.path, block)
    put_blocks_first(model, plan.site.path)
    if block.norm_path is not None:
        whole = model.get_submodule(block.norm_path)
        undo.callback(set_submodule, model, block.norm_path, whole)
        set_submodule(model, block.norm_path, rest_of(whole))


def _take_off(block: RepBlock) -> None:
    """Subtract the branches' kernels from the conv's, so that the block computes what the conv computed alone."""
    like = block.conv.weight.detach().double()
    own = kernel_of(block.conv, like, block.site.in_channels, block.site.dimensions)
    kernel = reduce(Kernel.subtract, [block.kernel_of(name, like) for name in block.branches], own)
    write_origin(block, kernel, None, None if block.scale is None else block.scale.weight)


@torch.no_grad()
def _begin_with(
    gamma: float, model: nn.Module, blocks: list[RepBlock], batches: Iterable[Any], undo: ExitStack
) -> None:
    """Set the first γ of the branches' last BatchNorms, and subtract from the origins what the branches then add.

    DyRep's own code resets the statistics of the BatchNorm inside instead of measuring them.
    """
    origins = [block for block in blocks if _norms_of_branches(block)]
    for block in origins:
        require_affine(block, "the branches")
        undo.callback(_put_back, block, block.norm, copy.deepcopy(block.origin.state_dict()))
    kernels = {block: origin_kernel(block) for block in origins}
    bare = [block for block in origins if block.norm is None]
    for block, moments in zip(bare, measure_sums(model, [_alone(block) for block in bare], batches) if bare else ()):
        _give_norm(block, kernels[block], moments)
    for block in origins:
        for norm in _norms_of_branches(block):
            norm.weight.copy_(gamma * block.norm.weight.abs())  # type: ignore[union-attr]
    without = [PartialSum(block, _signs(block), instead=block.origin) for block in origins]
    for block, moments in zip(origins, measure_sums(model, without, batches)):
        own = kernels[block]
        kernel = reduce(Kernel.subtract, (block.kernel_of(name, own.weight) for name in block.branches), own)
        write_origin(block, kernel, moments)


def _alone(block: RepBlock) -> PartialSum:
    return PartialSum(block, {block.origin: 1.0})


def _signs(block: RepBlock) -> dict[nn.Module, float]:
    """Return the factors of the sum that the origin must output so that the block's output stays: 1 for itself, -1 for each branch."""
    return {block.origin: 1.0, **dict.fromkeys(block.branches.values(), -1.0)}


def _norms_of_branches(block: RepBlock) -> list[Layer]:
    """Return the last BatchNorm of each branch that has one."""
    return [branch.last_norm for branch in block.branches.values() if branch.last_norm is not None]


def _give_norm(block: RepBlock, kernel: Kernel, moments: Moments | None) -> None:
    """Put a BatchNorm behind an origin that has none. In eval mode, conv and BatchNorm together compute `kernel`."""
    conv = block.conv
    block.origin.add_module("norm", _norm_like(Norm(), conv))
    set_kernel(conv, block.norm, kernel, moments)


def _put_back(block: RepBlock, norm: Layer | None, state: dict[str, Tensor]) -> None:
    if norm is None and block.norm is not None:
        del block.origin.norm
    block.origin.load_state_dict(state)


def _rebuild(model: nn.Module, actions: list[Expand]) -> None:
    """Make the blocks of `actions` without data; their branches add nothing yet."""
    beginning = _Beginning(actions[0].preserve, attach_rate=None if actions[0].attach_rate is None else 0.0)
    plans, skips = _plans_of(model, actions, beginning)
    _require_all(skips)
    _grow(model, plans, beginning)
    for action in actions:
        block = model.get_submodule(action.site)
        if (
            action.gamma
            and action.preserve
            and isinstance(block, RepBlock)
            and block.norm is None
            and _norms_of_branches(block)
        ):
            _give_norm(block, origin_kernel(block), None)


def _new_norms(block: RepBlock, *, preserve: bool) -> list[nn.Module]:
    """Return the new BatchNorms whose statistics aren't known yet."""
    norms = [module for branch in block.branches.values() for module in branch.modules() if is_batch_norm(module)]
    own = [] if preserve or block.norm is None or block.norm_behind is None else [block.norm]
    return [*own, *norms]
