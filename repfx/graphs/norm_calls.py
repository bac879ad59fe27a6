"""Calls such as ``F.batch_norm(x, mean, variance, training=self.training)``: a trace would fix their mode, so modules replace them."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx, nn

from repfx.graphs.free_names import free_names


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


def let_norms_follow_the_mode(training: fx.Graph, evaluation: fx.Graph, taken: set[str]) -> dict[str, nn.Module]:
    """Replace each call of `F.batch_norm` that takes the mode as its argument by the call of a module, in the graphs of both modes.

    Return the modules by name. No name is among `taken`.
    """
    made: dict[str, nn.Module] = {}
    names = free_names("norm_call", taken)
    for nodes in list(zip(training.nodes, evaluation.nodes)):
        if all(_in_mode(node, mode) for node, mode in zip(nodes, (True, False))):
            name = next(names)
            made[name] = NormCall()
            for node in nodes:
                _call_instead(node, name)
    return made


def _in_mode(node: fx.Node, training: bool) -> bool:
    """Whether a node calls `F.batch_norm` in this mode."""
    if node.op != "call_function" or node.target is not F.batch_norm:
        return False
    given: Any = node.args[_PLACE] if len(node.args) > _PLACE else node.kwargs.get("training", False)
    return given is training


def _call_instead(node: fx.Node, name: str) -> None:
    args = (*node.args[:_PLACE], False, *node.args[_PLACE + 1 :]) if len(node.args) > _PLACE else node.args
    keywords = {key: value for key, value in node.kwargs.items() if key != "training"}
    with node.graph.inserting_before(node):
        call = node.graph.call_module(name, args, keywords)
    node.replace_all_uses_with(call)
    node.graph.erase_node(node)
