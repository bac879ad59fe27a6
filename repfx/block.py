"""`RepBlock`: the training form of one site, its own conv and the branches beside it, at the path where the conv was."""

from __future__ import annotations

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

_CONV_ATTRIBUTES = set(ConvSpec.__dataclass_fields__)


class RepBlock(nn.Module):
    """``origin(x) + Σ branch(x)``; the branches are children by name.

    Args:
        conv: the site's own conv, the same object.
        norm: the site's own BatchNorm if it moves behind the conv, else None.
        branches: by name.
        norm_path: where the BatchNorm stood, relative to the model.

    The sizes of the conv (``kernel_size``, ``stride``, …) can be read from the block, for code around it that does.
    """

    def __init__(
        self, conv: Layer, norm: Layer | None, branches: Mapping[str, Branch], norm_path: str | None = None
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

    def forward(self, input: Tensor) -> Tensor:
        """``(batch, in, *axes)`` to ``(batch, out, *axes)``."""
        total: Tensor = reduce(operator.add, (branch(input) for branch in self.children()))
        return total

    def equivalent_kernel(self, like: Tensor) -> Kernel:
        """The one kernel that the block amounts to in eval mode; differentiable. `like` gives dtype and device."""
        return reduce(Kernel.add, (branch.equivalent_kernel(like) for branch in (self.origin, *self.branches.values())))

    def require_affine(self, what: str) -> None:
        """Raise `InvalidInput` if the origin can't take over `what`: its BatchNorm has no γ or β to put it into."""
        norm = self.norm
        if norm is not None and (norm.weight is None or norm.bias is None):
            missing = "γ" if norm.weight is None else "β"
            raise InvalidInput(f"the origin can't absorb {what}: its BatchNorm has no {missing} to put it into.")

    def absorb(self, name: str) -> None:
        """Remove a branch; the origin takes its kernel over, in float64 and rounded once, so that the function stays."""
        if name not in self.branches:
            raise UnknownName("branch", name, self.branches)
        self.require_affine(repr(name))
        conv, norm = self.conv, self.norm
        branch = self.branches[name]
        like: Tensor = conv.weight.detach().double()
        kernel = self.origin.equivalent_kernel(like).add(branch.equivalent_kernel(like))
        set_kernel(conv, norm, kernel, _moments_of_sum(norm, branch.last_norm))
        delattr(self, name)

    def __getattr__(self, name: str) -> Any:
        if name in _CONV_ATTRIBUTES or name == "bias":  # of which code may ask whether there is one
            return getattr(self.conv, name)
        return super().__getattr__(name)


def _moments_of_sum(norm: Layer | None, other: Layer | None) -> Moments | None:
    if norm is None:
        return None
    own = Moments.after(norm)
    return own if other is None else own.add(Moments.after(other))
