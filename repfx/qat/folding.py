"""Fold the BatchNorms of a prepared graph into its convs, before the weights become integers.

torchao prepares a conv and its BatchNorm so that the weight is rounded as it will be in the file, with the factor of the BatchNorm in it:
`norm(conv(x, round(weight · factor)) / factor)`, factor = γ/σ. In eval mode, all that lies between the conv and the output of the
BatchNorm is affine for each channel, with slope 1. So the conv of the rounded weight takes the value at zero for its bias. torchao can
fold by itself, too, but for that it writes and compares a hundred patterns, which takes many seconds for the smallest net.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

_aten = torch.ops.aten
_NORM = _aten.batch_norm.default
_CONVS = {
    _aten.conv1d.default,
    _aten.conv2d.default,
    _aten.conv_transpose1d.default,
    _aten.conv_transpose2d.input,
}


@torch.no_grad()
def fold_norms(model: fx.GraphModule) -> None:
    """Fold each BatchNorm of a prepared graph in eval mode into the conv before it, in place.

    A BatchNorm stays if torchao hasn't prepared it together with a conv.
    """
    for node in list(model.graph.nodes):
        conv = _conv_before(node) if node.target == _NORM else None
        if conv is not None:
            _fold(model, conv, node)
    model.graph.eliminate_dead_code()
    model.recompile()


def _conv_before(norm: fx.Node) -> fx.Node | None:
    """Return the conv that torchao has prepared with a BatchNorm: only constants come between, and the weight is rounded."""
    node: Any = norm.args[0]
    while node.target not in _CONVS:
        if node.target not in (_aten.div.Tensor, _aten.add.Tensor) or len(node.users) != 1:
            return None
        node = node.args[0]
    rounding = node.args[1]
    return node if rounding.op == "call_module" and rounding.args[0].target == _aten.mul.Tensor else None


def _fold(model: fx.GraphModule, conv: fx.Node, norm: fx.Node) -> None:
    rounding: Any = conv.args[1]
    weight = _value(model, rounding.args[0], {})
    scale: Any = norm.args[1]
    channels = _value(model, scale, {})
    given: Any = conv.args[2] if len(conv.args) > 2 else None
    bias = channels.new_zeros(()) if given is None else _value(model, given, {})
    shape = [1, -1, *[1] * (weight.dim() - 2)]
    at_zero = (channels.new_zeros(channels.shape) + bias).reshape(shape)
    shift = _value(model, norm, {conv: at_zero}).flatten()
    with model.graph.inserting_before(rounding):
        rounding.update_arg(0, _constant(model, f"{conv.name}_weight", weight))
    with model.graph.inserting_before(conv):
        new = _constant(model, f"{conv.name}_bias", shift)
    conv.args = (*conv.args[:2], new, *conv.args[3:])
    norm.replace_all_uses_with(conv)
    model.graph.erase_node(norm)


def _constant(model: fx.GraphModule, name: str, value: Tensor) -> fx.Node:
    model.register_parameter(name, nn.Parameter(value))
    return model.graph.get_attr(name)


def _value(model: fx.GraphModule, node: fx.Node, known: dict[fx.Node, Tensor]) -> Tensor:
    """Return the value of a node that depends on constants and known nodes alone."""
    if node in known:
        return known[node]
    if node.op == "get_attr":
        *outer, last = str(node.target).split(".")
        found: Tensor = getattr(model.get_submodule(".".join(outer)), last)
        return found
    args = fx.map_arg(node.args, lambda each: _value(model, each, known))
    kwargs = fx.map_arg(node.kwargs, lambda each: _value(model, each, known))
    target: Any = node.target
    result: Tensor = target(*args, **kwargs)
    return result
