"""`RepBlock`: the training form of one site, its own conv and the branches beside it, at the path where the conv was."""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping
from functools import reduce
from typing import Any

from torch import Tensor, nn

from repfx.branch import Branch, Chain
from repfx.errors import InvalidInput, UnknownName
from repfx.kernel import Kernel
from repfx.meaning import Layer
from repfx.moments import Moments, set_kernel
from repfx.spec import ConvSpec
from repfx.stages import AttachRate

_CONV_ATTRIBUTES = set(ConvSpec.__dataclass_fields__)


class RepBlock(nn.Module):
    """``origin(x) + Σ branch(x)``, or ``origin(x) + λ · Σ branch(x)``; the branches are children by name.

    Args:
        conv: the site's own conv, the same object.
        norm: the BatchNorm behind it: the site's own, if it moves there, or one made for it; else None.
        branches: by name.
        norm_path: where the site's own BatchNorm stood, relative to the model.
        attach_rate: λ to begin with; None for a block without one.

    The sizes of the conv (``kernel_size``, ``stride``, …) can be read from the block, for code around it that does.
    """

    def __init__(
        self,
        conv: Layer,
        norm: Layer | None,
        branches: Mapping[str, Branch],
        norm_path: str | None = None,
        attach_rate: float | None = None,
    ) -> None:
        super().__init__()
        self.site = ConvSpec.of(conv)
        self.norm_path = norm_path
        stages = {"conv": conv} if norm is None else {"conv": conv, "norm": norm}
        self.origin = Chain(iter(stages.items()), self.site)
        for name, branch in branches.items():
            if hasattr(self, name):
                raise InvalidInput(f"a branch can't be named {name!r}: a block has an attribute of that name.")
            self.add_module(name, branch)
        if attach_rate is not None:
            self.attach = AttachRate(attach_rate, self.site.out_channels, self.site.dimensions, conv.weight)
        self.training = self.origin.training = conv.training

    @property
    def conv(self) -> Layer:
        """The site's own conv."""
        return self.origin[0]

    @property
    def norm(self) -> Layer | None:
        """The BatchNorm behind the site's own conv, if it has one."""
        return self.origin[1] if len(self.origin) > 1 else None

    @property
    def branches(self) -> dict[str, Branch]:
        """The branches beside the origin, by name."""
        return {name: child for name, child in self.named_children() if isinstance(child, Branch)}

    @property
    def attach_rate(self) -> Tensor | None:
        """λ, by which the branches are attached; a buffer without axes, or None."""
        return self.attach.rate if "attach" in self._modules else None

    def forward(self, input: Tensor) -> Tensor:
        """``(batch, in, *axes)`` to ``(batch, out, *axes)``."""
        outputs = [self.origin(input), *(branch(input) for branch in self.branches.values())]
        if "attach" in self._modules and len(outputs) > 1:
            outputs = [outputs[0], self.attach(reduce(operator.add, outputs[1:]))]
        total: Tensor = reduce(operator.add, outputs)
        return total

    def equivalent_kernel(self, like: Tensor) -> Kernel:
        """The one kernel that the block amounts to in eval mode; differentiable. `like` gives dtype and device."""
        branches = [self.kernel_of(name, like) for name in self.branches]
        return reduce(Kernel.add, branches, self.origin.equivalent_kernel(like))

    def kernel_of(self, name: str, like: Tensor) -> Kernel:
        """What a branch adds to the block's kernel: its own kernel, times λ if there is one."""
        kernel = self.branches[name].equivalent_kernel(like)
        return kernel if self.attach_rate is None else kernel.compose(self.attach.kernel(like))

    def require_affine(self, what: str) -> None:
        """Raise `InvalidInput` if the origin can't take over `what`: its BatchNorm has no γ or β to put it into."""
        norm = self.norm
        if norm is not None and (norm.weight is None or norm.bias is None):
            missing = "γ" if norm.weight is None else "β"
            raise InvalidInput(f"the origin can't absorb {what}: its BatchNorm has no {missing} to put it into.")

    def require(self, name: str) -> None:
        """Raise `UnknownName` if there is no branch of that name, `InvalidInput` if the origin can't absorb it."""
        if name not in self.branches:
            raise UnknownName("branch", name, self.branches)
        self.require_affine(repr(name))

    def origin_kernel(self) -> Kernel:
        """What the site's own conv and BatchNorm amount to, in float64 and in tensors of its own."""
        return copy.deepcopy(self.origin).equivalent_kernel(self.conv.weight.detach().double())

    def absorb(self, name: str) -> None:
        """Remove a branch; the origin takes its kernel over, in float64 and rounded once, so that the function stays."""
        self.require(name)
        conv, norm = self.conv, self.norm
        like: Tensor = conv.weight.detach().double()
        kernel = self.origin.equivalent_kernel(like).add(self.kernel_of(name, like))
        set_kernel(conv, norm, kernel, self._moments_with(name))
        delattr(self, name)

    def _moments_with(self, name: str) -> Moments | None:
        """Of the origin's output and a branch's together."""
        norm, other = self.norm, self.branches[name].last_norm
        if norm is None or other is None:
            return None if norm is None else Moments.after(norm)
        added = Moments.after(other)
        if self.attach_rate is not None:
            added = added.affine(self.attach_rate.double().expand_as(added.mean), None)
        return Moments.after(norm).add(added)

    def __getattr__(self, name: str) -> Any:
        if name in _CONV_ATTRIBUTES or name == "bias":  # of which code may ask whether there is one
            return getattr(self.conv, name)
        return super().__getattr__(name)


def block_at(model: nn.Module, site: str) -> RepBlock:
    """The block at a path.

    Raises:
        InvalidInput: the model has no blocks; UnknownName: none at that path.
    """
    blocks = {path: module for path, module in model.named_modules() if isinstance(module, RepBlock)}
    if not blocks:
        raise InvalidInput(f"{type(model).__name__} has no blocks; repfx.expand makes them.")
    if site not in blocks:
        raise UnknownName("block at", site, blocks)
    return blocks[site]
