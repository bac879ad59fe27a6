"""`Chain`: linear modules one after another. `Branch`: the contract of a branch kind, with the registry of kinds.

A branch kind is one file in `repfx/branches/`: a subclass of `Branch` that names its `kind`, says which sites it refuses, and
yields its stages. Everything else (forward, equivalent kernel, the command line, the docs' table, the contract tests) follows.
"""

from __future__ import annotations

import copy
import itertools
from collections import OrderedDict
from collections.abc import Iterable
from functools import reduce
from typing import Any, ClassVar

from torch import Tensor, nn

from repfx.algebra.conv_spec import ConvSpec
from repfx.algebra.kernel import Kernel
from repfx.algebra.layers import Layer, is_conv_or_linear
from repfx.algebra.meaning import kernel_of
from repfx.blocks.spec import BranchSpec
from repfx.blocks.stages import Norm, Pad, Stages, Subsample, TrackedNorm, batch_norm_in
from repfx.errors import InvalidInput, UnknownName
from repfx.records.registry import Registry

KINDS: Registry[type[Branch]] = Registry("repfx.branches")


class Chain(nn.Sequential):
    """Linear modules one after another; their kernels compose to one."""

    def __init__(self, stages: Stages, site: ConvSpec) -> None:
        super().__init__(OrderedDict(stages))
        self.site = site
        for stage in self:
            if isinstance(stage, TrackedNorm):
                stage.follow(self)

    def equivalent_kernel(self, like: Tensor) -> Kernel:
        """Return the one kernel that the chain amounts to in eval mode; differentiable.

        A stage that acts on each channel alone is merged into the conv before it. So it scales the weights of one conv, and not the larger
        weights of a product of convs.

        Args:
            like: tensor whose dtype and device the arithmetic uses.
        """
        kernels = self.kernels(like)
        return reduce(Kernel.compose, kernels or [self._kernel_of(nn.Identity(), like, self.site.in_channels)])

    def kernels(self, like: Tensor, before: nn.Module | None = None) -> list[Kernel]:
        """Return kernels that compose to that of the chain, or of the stages before one of its own; differentiable."""
        parts: list[Kernel] = []
        channels = self.site.in_channels
        for stage in itertools.takewhile(lambda stage: stage is not before, self):
            if isinstance(stage, TrackedNorm):
                parts = stage.applied(parts)
                continue
            kernel = self._kernel_of(stage, like, channels)
            channels = kernel.out_channels
            parts[-1:] = [parts[-1].compose(kernel)] if parts and kernel.is_channelwise else [*parts[-1:], kernel]
        return parts

    @property
    def hands_on(self) -> bool:
        """Whether the output may be the input itself, or a view of it."""
        return all(isinstance(stage, (nn.Identity, Pad, Subsample)) for stage in self)

    def _kernel_of(self, stage: Layer, like: Tensor, channels: int) -> Kernel:
        if hasattr(stage, "equivalent_kernel"):
            kernel: Kernel = stage.equivalent_kernel(like)
            return kernel
        return kernel_of(stage, like, channels, self.site.dimensions)

    @property
    def last_norm(self) -> Layer | None:
        """The BatchNorm at the end of the chain, or None. If a block ends the chain, it is the one at the end of the block's origin."""
        return batch_norm_in(self._end)

    @property
    def last_gamma(self) -> Tensor | None:
        """The γ of the BatchNorm or `TrackedNorm` at the end of the chain, or None."""
        end = self._end
        norm = end if isinstance(end, TrackedNorm) else batch_norm_in(end)
        return None if norm is None else norm.weight

    @property
    def _end(self) -> Layer | None:
        stages: list[Layer] = [stage for stage in self if not isinstance(stage, nn.Identity)]
        if stages and hasattr(stages[-1], "origin"):
            return stages[-1].origin._end
        return stages[-1] if stages else None


def kernel_of_both(conv: Layer, norm: Layer) -> Kernel:
    """Return the kernel of a conv and the BatchNorm behind it, in float64 and in tensors of its own."""
    stages = copy.deepcopy(nn.ModuleDict({"conv": conv, "norm": norm}))
    return Chain(iter(stages.items()), ConvSpec.of(conv)).equivalent_kernel(conv.weight.detach().double())


class Branch(Chain):
    """Base of all branch kinds: one linear path beside a site's own conv.

    A subclass sets `kind` (registered at once), answers `refusal`, and yields its `stages`. The composition of the stages must fit into
    the site's window: it has the same stride and output size, and no tap outside.
    """

    kind: ClassVar[str]
    serves_transposed: ClassVar[bool] = False  # whether the branch is a transposed conv if the site's own is one
    serves_linear: ClassVar[bool] = False  # whether the branch can stand beside a linear layer, which has no window

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        kind = getattr(cls, "kind", None)
        if not isinstance(kind, str) or not kind or "." in kind:
            raise InvalidInput(f"branch class {cls.__name__} needs a name without dots in `kind`, not {kind!r}.")
        if kind in KINDS.known and _full_name(KINDS[kind]) != _full_name(cls):
            raise InvalidInput(
                f"branch class {cls.__name__} needs another `kind`: {kind!r} is taken by {_full_name(KINDS[kind])}."
            )
        KINDS[kind] = cls

    def __init__(self, site: ConvSpec, norm: Norm, like: Tensor, **options: Any) -> None:
        super().__init__(self.stages(site, norm, like, **options), site)
        self.normalisation = norm.kind
        self.options = options
        self.first_scale = 1.0

    @property
    def spec(self) -> BranchSpec:
        """The spec that asks for a branch like this one."""
        return BranchSpec(self.kind, self.options, scale=self.first_scale)

    @property
    def free_convs(self) -> list[Layer]:
        """The convs whose first weights `Spec.weights` may choose: all that are trained. A kind whose convs have to begin as it says
        leaves them out."""
        return [module for module in self.modules() if is_conv_or_linear(module) and module.weight.requires_grad]

    @classmethod
    def refusal(cls, site: ConvSpec, *_: Any, **options: Any) -> str | None:
        """Why this kind can't serve a site, or None."""
        return None

    @classmethod
    def stages(cls, site: ConvSpec, norm: Norm, like: Tensor, *_: Any, **options: Any) -> Stages:
        """Yield the modules of the branch in order, each with its name; `like` gives dtype and device."""
        raise NotImplementedError


def kind_of(branch: BranchSpec) -> type[Branch]:
    """Return the class of a branch kind.

    Raises:
        UnknownName: there is no such kind.
    """
    if branch.kind not in KINDS:
        raise UnknownName("branch kind", branch.kind, KINDS)
    return KINDS[branch.kind]


def refusal_of_branch(branch: BranchSpec, site: ConvSpec) -> str | None:
    """Why a branch can't serve a site, or None."""
    kind = kind_of(branch)
    if site.transposed and not kind.serves_transposed:
        return "to a transposed conv only one of equal sizes can be added"
    if site.is_linear and not kind.serves_linear:
        return "a linear layer has no window"
    try:
        return kind.refusal(site, **branch.options)
    except TypeError as error:
        raise InvalidInput(
            f"branch kind {branch.kind!r} doesn't take the options {dict(branch.options)}: {error}."
        ) from error


def fitting(branches: Iterable[BranchSpec], site: ConvSpec) -> tuple[tuple[BranchSpec, ...], str]:
    """Return the branches that can serve a site, and a text that says why the others can't, one reason for all kinds that share it.

    >>> site = ConvSpec(8, 8, (1, 1), (1, 1), ((0, 0), (0, 0)), (1, 1))
    >>> fitting([BranchSpec("1x1"), BranchSpec("1xk"), BranchSpec("identity")], site)
    ((BranchSpec(kind='identity', options={}),), 'not 1x1, 1xk: the window is 1×1 already')
    """
    served: list[BranchSpec] = []
    refused: dict[str, list[str]] = {}
    for branch in branches:
        reason = refusal_of_branch(branch, site)
        if reason is None:
            served.append(branch)
        else:
            refused.setdefault(reason, []).append(branch.kind)
    return tuple(served), "; ".join(f"not {', '.join(kinds)}: {reason}" for reason, kinds in refused.items())


def require_positive(kind: str, **options: object) -> None:
    """Raise `InvalidInput` unless each option of a branch kind is a whole number from 1 on."""
    for name, value in options.items():
        if not isinstance(value, int) or value < 1:
            raise InvalidInput(f"branch kind {kind!r} takes a whole number from 1 on as {name}, not {value!r}.")


def _full_name(cls: type[Branch]) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
