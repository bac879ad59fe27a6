"""`fuse`: the deployed form of a model, each linear region one plain conv."""

from __future__ import annotations

from torch import nn

from repfx.errors import InvalidInput
from repfx.leaves import calls_conv
from repfx.meaning import is_conv
from repfx.pipeline import rewrite, verb
from repfx.rule import RULES


@verb
def fuse(model: nn.Module, *, strict: bool = False) -> nn.Module:
    """Fuse each linear region of a model into one plain conv, by rules on its graph.

    A new model is returned, equal to the eval form of `model`, which is untouched: a `torch.fx.GraphModule`, or, where the model
    can't be traced whole, a copy with graphs in place of its largest traceable parts. Whether repfx made a block plays no part.
    New convs keep dtype, device, `requires_grad` and mode. Arithmetic is float64, rounded once. `repfx.report` says what was done,
    and why each BatchNorm that stays does.

    Args:
        strict: raise if anything was left alone.

    Raises:
        InvalidInput: no conv or linear layer in the model; a merged weight isn't finite.
        Refused: with `strict`.

    >>> print(fuse(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())).get_submodule("0"))
    Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
    """
    if not any(is_conv(inner) or isinstance(inner, nn.Linear) or calls_conv(inner) for inner in model.modules()):
        raise InvalidInput(f"{type(model).__name__} has no conv or linear layer, so there is nothing to fuse.")
    result = rewrite(model, RULES.values(), "fuse")
    if strict:
        result.report.require_all()
    result.report.attach(result.model)
    return result.model
