"""`RepBlock`: the training form of one site, at the path where its conv or linear layer was: that layer and the branches beside it."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, fx, nn

from repfx.algebra.arithmetic import add_in_place, is_transformed
from repfx.algebra.assembly import assembled
from repfx.algebra.conv_spec import ConvSpec
from repfx.algebra.kernel import Kernel
from repfx.algebra.layers import Layer, has_hooks, is_batch_norm, takes_batch_statistics, template_of
from repfx.blocks.branch import Branch, Chain
from repfx.blocks.cropped_conv import is_shared
from repfx.blocks.gates import Gates
from repfx.blocks.one_conv import become_one_conv
from repfx.blocks.recompute import recomputed
from repfx.blocks.stages import AttachRate, Scale, batch_norm_in
from repfx.errors import InvalidInput, NotAConv, RepfxError, UnknownName

ORIGIN = "origin"
_RESERVED = ("attach", "gate")
SIZES = frozenset(
    {*ConvSpec.__dataclass_fields__, "in_features", "out_features"}
)  # the attributes of layers that say sizes


class RepBlock(nn.Module):
    """``origin(x) + Σ branch(x)``, or ``origin(x) + λ · Σ branch(x)``; the branches are children by name.

    The *paths* of a block are the origin and the branches. Each path can have a gate, and doesn't run while the gate is closed. The origin
    can also rest: it doesn't run until it takes over the kernel of a removed branch.

    A *squeezed* block runs as one conv wherever that is exact: where nothing in the block takes its statistics from the batch, and no hook
    listens to anything in it. Its forward assembles the kernel from the trainable parameters. A block that *recomputes* keeps only its
    input for the backward pass, and runs once more there.

    Args:
        conv: the site's own conv, the same object.
        norm: BatchNorm behind the conv: the site's own, if it moves there, or one made for it; else None.
        branches: branches by name.
        norm_path: path in the model at which the site's own BatchNorm stood, or None.
        attach_rate: first value of λ; None for a block without λ.
        origin_scale: first value of a `Scale` behind the conv; None for no `Scale`. With a `norm` there is no `Scale`.
        norm_behind: path in the model of the site's own BatchNorm if it stays behind the sum; else None.

    Code around the block can read the sizes of the conv (``kernel_size``, ``stride``, …) or linear layer (``in_features``, …) from the
    block.
    """

    def __init__(
        self,
        conv: Layer,
        norm: Layer | None,
        branches: Mapping[str, Branch],
        norm_path: str | None = None,
        attach_rate: float | None = None,
        origin_scale: float | None = None,
        norm_behind: str | None = None,
    ) -> None:
        super().__init__()
        self._resting: tuple[str, ...] | None = None  # names of the origin's parameters that `rest` froze
        self.squeezed = False
        self.holds_statistics = False  # its BatchNorms stay in eval mode
        self.recomputes = False
        self.drop_path = 0.0  # probability with which a branch leaves out an image; see `repfx.blocks.drop_path`
        self.site = ConvSpec.of(conv)
        self.norm_path = norm_path
        self.norm_behind = norm_behind
        self.origin_scale = origin_scale
        self.origin = Chain(iter({"conv": conv}.items()), self.site)
        if norm is not None:
            self.origin.add_module("norm", norm)
        elif origin_scale is not None:
            self.origin.add_module("scale", Scale.like(conv, origin_scale))
        for name, branch in branches.items():
            if "." in name:
                raise InvalidInput(f"a branch can't be named {name!r}: the name of a module has no dots.")
            if hasattr(self, name) or name in _RESERVED or hasattr(nn.ModuleDict, name):
                raise InvalidInput(
                    f"a branch can't be named {name!r}: a block, or a dict of modules, has an attribute of that name."
                )
            self.add_module(name, branch)
        if attach_rate is not None:
            self.attach = AttachRate(attach_rate, self.site.out_channels, self.site.dimensions, conv.weight)
        self.training = self.origin.training = conv.training

    @property
    def conv(self) -> Layer:
        """The site's own conv; if it has become a block, the own conv of that block."""
        return self.origin[0] if self.inner is None else self.inner.conv

    @property
    def inner(self) -> RepBlock | None:
        """The block that the site's own conv has become, or None."""
        own = self.origin[0]
        return own if isinstance(own, RepBlock) else None

    @property
    def norm(self) -> Layer | None:
        """The BatchNorm behind the site's own conv, if it has one."""
        return batch_norm_in(self.origin._modules.get("norm"))

    @property
    def scale(self) -> Layer | None:
        """The `Scale` behind the site's own conv, if it has one."""
        return self.origin._modules.get("scale")

    @property
    def branches(self) -> dict[str, Branch]:
        """The branches beside the origin, by name."""
        return {name: child for name, child in self.named_children() if isinstance(child, Branch)}

    @property
    def attach_rate(self) -> Tensor | None:
        """The factor λ of the branches, a buffer without axes, or None."""
        return self.attach.rate if "attach" in self._modules else None

    @property
    def paths(self) -> dict[str, Chain]:
        """The terms of the sum by name: the origin, unless it rests, and the branches."""
        origin = {} if self.rests else {ORIGIN: self.origin}
        return origin | self.branches

    @property
    def gates(self) -> Gates | None:
        """The gates of the paths, if there are any."""
        return self._modules.get("gate")  # type: ignore[return-value]

    @property
    def running(self) -> tuple[str, ...]:
        """The paths that run in the block's present mode."""
        return self.running_in(self.training)

    def running_in(self, training: bool) -> tuple[str, ...]:
        """Return the names of the paths that run in one mode."""
        gates = self.gates
        if gates is None:
            return tuple(self.paths)
        closed = set(gates.names) - set(gates.open_in(training))
        return tuple(name for name in self.paths if name not in closed)

    def forward(self, input: Tensor) -> Tensor:
        """Compute the sum of the paths, from ``(batch, in, *axes)`` to ``(batch, out, *axes)``.

        The block of a linear layer computes ``(…, out)`` from ``(…, in)``.
        """
        if isinstance(input, fx.Proxy):
            return self._sum_of_paths(input, self.running)
        kernel = _assembled(self) if self.squeezed and self.is_one_map else None
        if kernel is not None:
            return kernel(input)
        if self.recomputes and self.training and torch.is_grad_enabled() and not is_transformed():
            return recomputed(partial(self._sum_of_paths, running=self.running), self, input)
        return self._sum_of_paths(input, self.running)

    def _sum_of_paths(self, input: Tensor, running: Sequence[str]) -> Tensor:
        paths, gates = self.paths, self.gates
        outputs: dict[str, Tensor] = {name: paths[name](input) for name in running}
        if not outputs:
            nothing: Tensor = self.origin(input) * 0
            return nothing
        if len(outputs) == 1 and paths[running[0]].hands_on:
            outputs = {running[0]: outputs[running[0]].clone()}  # code behind the block may write into it
        if self.drop_path and self.training and not isinstance(input, fx.Proxy):
            outputs = {name: x if name == ORIGIN else _some_images(x, self.drop_path) for name, x in outputs.items()}
        if gates is not None:
            outputs = {name: gates.of[name](x) if name in gates.of else x for name, x in outputs.items()}
        own = [outputs.pop(ORIGIN)] if ORIGIN in outputs else []
        factors, branches = self._shared_factors, list(outputs.values())
        if isinstance(input, fx.Proxy):  # each branch by itself, so that it can be merged with the origin
            branches = [reduce(lambda x, factor: x * factor.factor(), factors, branch) for branch in branches]
        elif branches and factors:
            branches = [reduce(lambda x, factor: factor(x), factors, _sum(branches))]
        return _sum(own + branches)

    @property
    def nonlinear_part(self) -> str | None:
        """The path, in the block, of a BatchNorm that takes its statistics from the batch in its present mode, or None."""
        return next((path for path, module in self.named_modules() if takes_batch_statistics(module)), None)

    @property
    def is_one_map(self) -> bool:
        """Whether the block is linear in its present mode, and no hook listens to anything inside."""
        parts = [module for module in self.modules() if module is not self]
        return not any(takes_batch_statistics(module) or has_hooks(module) for module in parts)

    def squeeze(self, *, hold_statistics: bool) -> None:
        """Run as one conv wherever that is exact. With `hold_statistics`, BatchNorms keep theirs, so training mode is exact, too."""
        self.squeezed = True
        if hold_statistics:
            self.holds_statistics = True
            self.stop_norms()

    def unsqueeze(self) -> None:
        """Run path by path again, with BatchNorms that follow the mode of the block."""
        self.squeezed = False
        if self.holds_statistics:
            self.holds_statistics = False
            self.train(self.training)

    def extra_repr(self) -> str:
        states = {"squeezed": self.squeezed, "statistics held": self.holds_statistics, "recomputes": self.recomputes}
        return ", ".join(name for name, holds in states.items() if holds)

    def train(self, mode: bool = True) -> RepBlock:
        """Set the mode as torch does, but keep BatchNorms whose statistics are held in eval mode."""
        super().train(mode)
        self.stop_norms()
        return self

    def stop_norms(self) -> None:
        """Put BatchNorms whose statistics are held into eval mode."""
        for module in self.modules() if self.holds_statistics else ():
            if is_batch_norm(module):
                module.eval()

    @property
    def _shared_factors(self) -> list[Layer]:
        """The modules that multiply the sum of the branches: the attach rate, and the gate that all branches share."""
        found: list[Layer] = [
            self._modules.get("attach"),
            None if self.gates is None else self.gates._modules.get("block"),
        ]
        return [factor for factor in found if factor is not None]

    def equivalent_kernel(self, like: Tensor) -> Kernel:
        """Return the one kernel that the block amounts to in eval mode; differentiable. `like` gives dtype and device."""
        return self.kernel_in(False, like)

    def kernel_in(self, training: bool, like: Tensor) -> Kernel:
        """Return the kernel of the paths that run in one mode, each BatchNorm read as in eval mode. `like` gives dtype and device."""
        kernels = [self.kernel_of(name, like) for name in self.running_in(training)]
        return Kernel.sum(kernels or [self.nothing(like)])

    def kernel_of(self, name: str, like: Tensor) -> Kernel:
        """Return the kernel that a path adds to the block's if it runs: its own kernel times its gates, and for a branch times λ."""
        kernel = self.paths[name].equivalent_kernel(like)
        factors = [] if self.gates is None else [factor.kernel(like) for factor in self.gates.factors(name)]
        if name != ORIGIN and self.attach_rate is not None:
            factors.append(self.attach.kernel(like))
        return reduce(Kernel.compose, factors, kernel)

    def nothing(self, like: Tensor) -> Kernel:
        """Return the kernel of the block's sizes whose output is zero."""
        nothing = like.new_zeros(self.site.out_channels)
        return self.origin.equivalent_kernel(like).fold_affine(nothing)

    @property
    def rests(self) -> bool:
        """Whether the origin doesn't run."""
        return self._resting is not None

    def rest(self) -> None:
        """Stop running the origin, and freeze its parameters except weights that branches share."""
        if not self.branches:
            raise InvalidInput("the origin of a block without branches can't rest.")
        if self.rests:
            return
        trained = {name: each for name, each in self.origin.named_parameters() if each.requires_grad}
        if any(is_shared(branch) for branch in self.branches.values()):
            trained = {name: each for name, each in trained.items() if each is not self.conv.weight}
        for parameter in trained.values():
            parameter.requires_grad_(False)
        self._resting = tuple(trained)

    def wake(self) -> None:
        """Run the origin again, and train the parameters that `rest` froze."""
        parameters = dict(self.origin.named_parameters())
        for name in self._resting or ():
            parameters[name].requires_grad_(True)
        self._resting = None

    def require_branch(self, name: str) -> None:
        """Raise `UnknownName` if there is no branch of that name."""
        if name not in self.branches:
            raise UnknownName("branch", name, self.branches)

    def remove(self, name: str) -> None:
        """Remove a branch and its gate, and leave everything else as it is."""
        delattr(self, name)
        if self.gates is not None:
            self.gates.remove(name)

    def factor_of(self, name: str) -> Tensor:
        """Return the factor of a path's output if it runs, in float64: the product of its gates, and for a branch of λ."""
        one = torch.ones((), dtype=torch.float64, device=self.conv.weight.device)
        rate = one if name == ORIGIN or self.attach_rate is None else self.attach_rate.double()
        return rate if self.gates is None else rate * self.gates.factor_of(name).to(rate.device)

    def fuse(self) -> nn.Module:
        """Become one plain conv, and return it: tools such as timm's `reparameterize_model` put it in the place of the block."""
        become_one_conv(self)
        return self.conv  # type: ignore[no-any-return]

    def reparameterize(self) -> None:
        """Become one plain conv inside this block, which computes what the block computes in eval mode; see `repfx.fuse`."""
        become_one_conv(self)

    def switch_to_deploy(self) -> None:
        """Do what `reparameterize` does, under the name that RepVGG's own code uses."""
        become_one_conv(self)

    def __getattr__(self, name: str) -> Any:
        if name in SIZES or name == "bias":  # code may ask whether the conv has a bias
            return getattr(self.conv, name)
        if "origin" in self.__dict__.get("_modules", {}) and name not in self._modules and hasattr(self.conv, name):
            raise NotAConv(
                f"the block {self.site} has no {name!r}, because it is a sum of {len(self.paths)} paths: repfx.fuse(model) makes it a "
                f"plain conv, which has one."
            )
        return super().__getattr__(name)


def _some_images(x: Tensor, probability: float) -> Tensor:
    """Set each image of a batch to zero with a probability, and divide the others by that of staying."""
    kept = x.new_empty(x.shape[0], *(1,) * (x.ndim - 1)).bernoulli_(1 - probability)
    return x * (kept / (1 - probability))


def _sum(terms: list[Tensor]) -> Tensor:
    """Return the sum of the terms. Those after the second are added in place if the dtypes are equal."""
    if isinstance(terms[0], fx.Proxy):
        return reduce(operator.add, terms)
    return reduce(add_in_place, terms[2:], reduce(operator.add, terms[:2]))


def _assembled(block: RepBlock) -> Kernel | None:
    """Return the kernel of a squeezed block in its present mode, in the weights' own precision; differentiable.

    It is None if a part was exchanged for a module that has no kernel.
    """
    try:
        return assembled(partial(block.kernel_in, block.training), template_of(block.conv))
    except RepfxError:
        return None
