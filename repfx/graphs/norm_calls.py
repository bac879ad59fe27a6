"""Calls such as ``F.batch_norm(x, mean, variance, training=self.training)``: a trace would fix their mode, so modules replace them."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx, nn

from repfx.graphs.calls_by_mode import ModuleCall


class NormCall(nn.Module):
    """A call of `F.batch_norm` in the module's mode. It gets its tensors as arguments, so it holds none."""

    def forward(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        """Normalise by the batch in training mode, else by the running statistics. `training` isn't used."""
        return F.batch_norm(input, running_mean, running_var, weight, bias, self.training, momentum, eps)


_PLACE = 5  # of the argument `training`


def norm_in_mode(node: fx.Node, training: bool) -> ModuleCall | None:
    """Return the call of a module that does what a call of `F.batch_norm` does in this mode, or None."""
    if node.op != "call_function" or node.target is not F.batch_norm:
        return None
    given: Any = node.args[_PLACE] if len(node.args) > _PLACE else node.kwargs.get("training", False)
    if given is not training:
        return None
    args = (*node.args[:_PLACE], False, *node.args[_PLACE + 1 :]) if len(node.args) > _PLACE else node.args
    return ModuleCall(NormCall(), args, {key: value for key, value in node.kwargs.items() if key != "training"})
