"""`fuse`: the deployed form of a model, each linear region one plain conv. `Fuse`: the action that fuses one site in place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from repfx.algebra.activated_norm import norm_of, rest_of
from repfx.algebra.cost import Cost, weights
from repfx.algebra.layers import is_conv_or_linear
from repfx.algebra.moments import set_kernel
from repfx.blocks.block import ORIGIN, RepBlock
from repfx.blocks.branch import kernel_of_both
from repfx.blocks.folded_norm import FoldedNorm, remember_norm
from repfx.errors import InvalidInput
from repfx.exported.fusing import takes_exported
from repfx.measuring.in_float64 import Inputs, by_name
from repfx.measuring.proof import prove
from repfx.passes.drop import absorb
from repfx.records.journal import Action, record
from repfx.records.module_tree import set_submodule
from repfx.records.wrappers import require_layers
from repfx.rewriting.pipeline import Result, rewrite, verb
from repfx.rewriting.rule import RULES
from repfx.tracing.leaves import calls_conv
from repfx.tracing.sites import sites_at


@dataclass(frozen=True)
class Fuse(Action):
    """Turn a site into one plain conv with a bias, in place. Its branches and the BatchNorm that only it feeds are folded into it."""

    kind: ClassVar[str] = "fuse"

    @classmethod
    def apply(cls, model: nn.Module, actions: Sequence[Fuse], calibrate: Iterable[Any] | None) -> None:
        paths = [action.site for action in actions]
        sites = sites_at(model, paths)
        for path in paths:
            if any(path.startswith(f"{other}.") for other in paths):
                raise InvalidInput(f"{path!r} lies in another site that is to be fused.")
        blocks = {path: module for path in paths if isinstance(module := model.get_submodule(path), RepBlock)}
        # a BatchNorm behind a block is found only after the block has become a conv
        behind = any(block.norm is None for block in blocks.values())
        absorb(model, dict(each for path, block in blocks.items() for each in _branches(path, block)), calibrate)
        if behind:
            sites = sites_at(model, paths, anew=True)
        for path in paths:
            if sites[path].norm is not None and sites[path].refusal is None:
                _fold(model, path, str(sites[path].norm))
        record(model, actions)

    def __str__(self) -> str:
        return f"fuse {self.site}"


def _branches(path: str, block: RepBlock | None) -> Iterator[tuple[str, list[str]]]:
    """Yield the names of a block's branches, and of those of the block that its own conv may have become, with the block's path."""
    while block is not None:
        yield path, list(block.branches)
        path, block = f"{path}.{ORIGIN}.conv", block.inner


def _fold(model: nn.Module, site: str, norm_path: str) -> None:
    conv: Any = model.get_submodule(site)
    whole = model.get_submodule(norm_path)
    norm: Any = norm_of(whole)
    kernel = kernel_of_both(conv, norm)
    remember_norm(conv, FoldedNorm.of(norm, norm_path, site, bias=conv.bias is not None))
    set_kernel(conv, None, kernel, None)
    set_submodule(model, norm_path, rest_of(whole))


@takes_exported(RULES)
@verb
def fuse(model: nn.Module, *, example: Inputs | None = None, cost: Cost = weights, strict: bool = False) -> nn.Module:
    """Fuse each linear region of a model into one plain conv, by rules on its graph.

    The result is a new model, which computes what `model` computes in eval mode; `model` is untouched. It is a
    `torch.fx.GraphModule` or, if the model can't be traced as a whole, a copy with graphs in place of its largest traceable parts.
    Blocks that repfx didn't make are fused, too. New convs keep dtype, device, `requires_grad` and mode. The arithmetic is done in
    float64 and rounded once. `repfx.report` says what was done, and why each remaining BatchNorm stays.

    A program of `torch.export` becomes such a program, and a graph of ATen operators becomes such a graph.

    Args:
        example: input of the model, as `check_equivalent` takes it: proves that the model computes what it did, in float64. Without it,
            nothing is compared. The result's inputs are the arguments that it gives a tensor; all other arguments that have a default
            keep one value. Without an example, the first argument is an input.
        cost: function from the sizes of a conv (`ConvSpec`) and the shape of its input to a number. Convs become one where that costs no
            more. The shape is None without an example. By default weights are counted; `repfx.measuring.latency.Latency` measures seconds.
        strict: raise if anything was left alone.

    Raises:
        InvalidInput: the model has no conv or linear layer, or a merged weight isn't finite.
        Refused: with `strict`, something was left alone; EquivalenceError: the output on `example` would change.

    >>> print(fuse(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())).get_submodule("0"))
    Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
    """
    result = fused_for(model, example, cost)
    if strict:
        result.report.require_all()
    prove("fuse", model, result.model, example)
    result.report.attach(result.model)
    return result.model


@torch.inference_mode(False)
def fused_for(model: nn.Module, example: Inputs | None, cost: Cost = weights) -> Result:
    """Fuse a model for calls such as the one with `example`. Arguments that the example gives no tensor keep one value.

    Raises:
        InvalidInput: as `fuse`.
    """
    require_layers(model)
    if not any(is_conv_or_linear(inner) or calls_conv(inner) for inner in model.modules()):
        raise InvalidInput(f"{type(model).__name__} has no conv or linear layer, so there is nothing to fuse.")
    given = None if example is None else by_name(model, example)
    return rewrite(model, RULES.values(), "fuse", given=given, cost=cost)
