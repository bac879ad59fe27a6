"""`LinearRegion`: a linear part of a graph as one kernel, assembled anew from the live modules each time it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor, fx, nn

from repfx.algebra.assembly import assembled
from repfx.algebra.kernel import Kernel
from repfx.algebra.layers import Layer, is_batch_norm, template_of
from repfx.algebra.meaning import Meaning, affine_of, kernel_of
from repfx.blocks.block import RepBlock
from repfx.graphs.operations import Op
from repfx.rewriting.match import Match


@dataclass(frozen=True)
class Step:
    """One map on the way through a region.

    Args:
        source: the path of a module, a map without tensors, or a region that was found before.
    """

    source: str | Meaning | LinearRegion

    @classmethod
    def of(cls, op: Op, known: Mapping[fx.Node, LinearRegion]) -> Step:
        """Return the step that an op takes. `known` has the region of each node that calls one."""
        if op.node in known:
            return cls(known[op.node])
        return cls(str(op.node.target) if op.node.op == "call_module" else op.meaning)

    def kernel(self, root: nn.Module, like: Tensor, channels: int, dimensions: int) -> Kernel:
        """Return the map's kernel for so many channels and axes, in the dtype and on the device of `like`; differentiable."""
        if isinstance(self.source, LinearRegion):
            return self.source.kernel(root, like)
        if isinstance(self.source, Meaning):
            return self.source.build(like, channels, dimensions)
        module: Layer = root.get_submodule(self.source)
        if isinstance(module, RepBlock):
            return module.kernel_in(module.training, like)
        if is_batch_norm(module):  # a norm that also activates is only its affine part here
            return Kernel.diagonal(*affine_of(module, like), dimensions)
        return kernel_of(module, like, channels, dimensions)

    @property
    def modules(self) -> tuple[str, ...]:
        """The paths of the modules that the step consists of."""
        if isinstance(self.source, LinearRegion):
            return self.source.modules
        return (self.source,) if isinstance(self.source, str) else ()


@dataclass(frozen=True)
class LinearRegion:
    """``Σ factor · path(x)``, where each path is some maps one after another.

    Args:
        paths: factors, each with the steps from the input on; no steps mean the input itself.
        channels, dimensions: numbers of channels and of spatial axes of the input.
        template: path of the module whose weight gives dtype and device.
    """

    paths: tuple[tuple[float, tuple[Step, ...]], ...]
    channels: int
    dimensions: int
    template: str

    @classmethod
    def of(cls, match: Match, template: str, known: Mapping[fx.Node, LinearRegion]) -> LinearRegion:
        """Return the region that a rule has found. `known` has the region, found before, of each node that calls one."""
        paths = ((term.factor, tuple(Step.of(op, known) for op in term.ops)) for term in match.terms)
        return cls(tuple(paths), *match.sizes(), template)

    @property
    def modules(self) -> tuple[str, ...]:
        """The paths of all modules that the region consists of."""
        return tuple(dict.fromkeys(path for _, steps in self.paths for step in steps for path in step.modules))

    def kernel(self, root: nn.Module, like: Tensor) -> Kernel:
        """Return the one kernel of the region; differentiable."""
        return Kernel.sum([self._kernel_of(steps, root, like).scaled(factor) for factor, steps in self.paths])

    def _kernel_of(self, steps: tuple[Step, ...], root: nn.Module, like: Tensor) -> Kernel:
        if not steps:
            return Kernel.identity(like, channels=self.channels, dimensions=self.dimensions)
        total = steps[0].kernel(root, like, self.channels, self.dimensions)
        for step in steps[1:]:
            total = total.compose(step.kernel(root, like, total.out_channels, self.dimensions))
        return total

    def __call__(self, root: nn.Module, x: Tensor) -> Tensor:
        """Run ``(batch, channels, *axes)`` through the one conv, in the weights' own precision."""
        return assembled(partial(self.kernel, root), self.weight_in(root), self)(x)

    def weight_in(self, root: nn.Module) -> Tensor:
        """Return the tensor that gives dtype and device."""
        template: Layer = root.get_submodule(self.template)
        return template_of(template.conv if isinstance(template, RepBlock) else template)
