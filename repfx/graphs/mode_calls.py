"""Calls that take the mode, such as ``F.dropout(x, training=self.training)``: a trace would fix it, so modules replace them."""

from __future__ import annotations

import inspect
import itertools
import sys
from collections.abc import Container, Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx, nn

MODULES: dict[object, type[nn.Module]] = {
    F.dropout: nn.Dropout,
    F.dropout1d: nn.Dropout1d,
    F.dropout2d: nn.Dropout2d,
    F.dropout3d: nn.Dropout3d,
    F.alpha_dropout: nn.AlphaDropout,
    F.feature_alpha_dropout: nn.FeatureAlphaDropout,
}
_STOCHASTIC_DEPTH = "torchvision.ops.stochastic_depth"


def let_dropout_follow_the_mode(training: fx.Graph, evaluation: fx.Graph, taken: set[str]) -> dict[str, nn.Module]:
    """Replace each dropout call that is on in training and off in eval mode by the call of a dropout module, in the graphs of both modes.

    Return the modules by name. No name is among `taken`.
    """
    made: dict[str, nn.Module] = {}
    names = _free_names("dropout", taken)
    for nodes in list(zip(training.nodes, evaluation.nodes)):
        modules = [_as_module(node, mode) for node, mode in zip(nodes, (True, False))]
        if modules[0] is None or repr(modules[0]) != repr(modules[1]):
            continue
        name = next(names)
        made[name] = modules[0]
        for node in nodes:
            with node.graph.inserting_before(node):
                call = node.graph.call_module(name, (node.all_input_nodes[0],))
            node.replace_all_uses_with(call)
            node.graph.erase_node(node)
    return made


def _as_module(node: fx.Node, training: bool) -> nn.Module | None:
    """Return the dropout module that does what a dropout call does, or None.

    The call's own argument `training` must equal `training`, which is the mode of its graph.
    """
    if node.op != "call_function" or len(node.all_input_nodes) != 1:
        return None
    kind = _kind_of(node.target)
    if kind is None:
        return None
    call = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
    call.apply_defaults()
    if call.arguments["training"] is not training:
        return None
    others = ("mode",) if "mode" in call.arguments else ("inplace",)
    made: nn.Module = kind(call.arguments["p"], *(call.arguments[name] for name in others))
    return made


def _kind_of(function: Any) -> Any:
    """Return the class of modules that do what a function does, or None."""
    if function in MODULES:
        return MODULES[function]
    own = getattr(function, "__module__", None) == _STOCHASTIC_DEPTH and function.__name__ == "stochastic_depth"
    return sys.modules[_STOCHASTIC_DEPTH].StochasticDepth if own else None


# ---- batch_norm


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
    names = _free_names("norm_call", taken)
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


def _free_names(stem: str, taken: Container[str]) -> Iterator[str]:
    """Yield names ``stem_0``, ``stem_1``, … without end, but for those that are taken."""
    numbered = (f"{stem}_{index}" for index in itertools.count())
    return (name for name in numbered if name not in taken)
