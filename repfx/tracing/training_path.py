"""Modules that ask for their mode, and whose eval path writes into their own tensors, such as the weight of a conv that it then calls.

No graph can do that. So the training path may stand for both modes, if in eval mode it computes what the eval path computes. This is found
by running both, in float64 on copies: with the module's own weights and with random ones, on inputs of several sizes and magnitudes. Linear
paths are polynomials in the input and the weights. Two polynomials that differ agree at random numbers only by a chance of zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from repfx.algebra.layers import has_hooks, is_conv
from repfx.errors import first_line
from repfx.graphs.aliasing import may_share_memory, mutated_by
from repfx.graphs.constants import draws
from repfx.records.module_tree import called_by
from repfx.records.notes import copy_of
from repfx.tracing.traced import OfOneMode

_TOLERANCE = 1e-9  # largest relative difference that counts as rounding
_MORE = (
    (2, 5, 3),
    (7, 2, 4),
    (3, 4, 8),
    (12, 9, 5),
)  # how much longer an input is than the largest window, along each axis
_MAGNITUDES = (1.0, 1e3, 1e-3, 30.0)


def writes_into_itself(graph: fx.Graph, root: nn.Module) -> bool:
    """Whether a graph changes one of its module's own tensors in place."""
    written = (mutated_by(node, root) for node in graph.nodes)
    return any(node.op == "get_attr" for each in written if each is not None for node in may_share_memory(each, root))


def why_not_the_training_path(module: nn.Module, training: OfOneMode) -> str | None:
    """Return why the training path of a module can't stand for eval mode, too; None if it can.

    Args:
        module: in eval mode; it isn't changed.
        training: the graph of the training path, and the constants that tracing made for it.
    """
    graph, _ = training
    drawn = next((node.name for node in graph.nodes if draws(node)), None)
    if drawn is not None:
        return f"its training path draws random numbers: {drawn}"
    if writes_into_itself(graph, module):
        return "its training path writes into its own tensors"
    if any(map(has_hooks, module.modules())):
        return "a layer in it has hooks, which would run in eval mode, too"
    try:
        return _difference(module, training)
    except Exception as error:  # code of anybody runs on numbers that aren't its own
        return f"its two paths can't be compared: {first_line(error)}"


@torch.no_grad()
def _difference(module: nn.Module, training: OfOneMode) -> str | None:
    """Compare the eval path of a module with the graph of its training path, with all layers in eval mode."""
    first = _first_conv(module, training[0])
    if first is None:
        return "its training path calls no conv"
    generator = torch.Generator().manual_seed(0)
    for own_weights in (True, False):
        twin = _in_float64(module)
        if not own_weights:
            _randomize(twin, generator)
        path = _as_module(copy_of(twin), training)
        for x in _inputs(module, first, generator):
            expected, found = twin(x.clone()), path(x.clone())
            reason = _unlike(found, expected)
            if reason is not None:
                return f"its two paths differ on an input of {tuple(x.shape)}: {reason}"
    return None


def _unlike(found: Any, expected: Any) -> str | None:
    """Say how two outputs differ; None if they don't."""
    if not isinstance(found, Tensor) or not isinstance(expected, Tensor):
        return "their outputs are no single tensors"
    if found.shape != expected.shape:
        return f"{tuple(found.shape)} in training mode, {tuple(expected.shape)} in eval mode"
    worst, largest = float((found - expected).abs().max()), float(expected.abs().max())
    return None if worst <= _TOLERANCE * largest and largest > 0 else f"by {worst:.1e}, of numbers up to {largest:.1e}"


def _in_float64(module: nn.Module) -> nn.Module:
    twin: nn.Module = copy_of(module)
    return twin.double().eval()


def _as_module(root: nn.Module, training: OfOneMode) -> nn.Module:
    """Return a module that runs a graph with the layers of `root`, in the mode that they are in."""
    graph, constants = training
    for name, value in constants.items():
        setattr(root, name, value.double() if value.is_floating_point() else value)
    return fx.GraphModule(root, graph)


def _randomize(module: nn.Module, generator: torch.Generator) -> None:
    """Give a module random parameters, and random buffers above 0, because these may be variances."""
    for weight in filter(Tensor.is_floating_point, module.parameters()):
        per_output = weight[:1].numel() if weight.ndim else 1
        weight.copy_(torch.randn(weight.shape, generator=generator, dtype=weight.dtype) / max(per_output, 1) ** 0.5)
    for tensor in filter(Tensor.is_floating_point, module.buffers()):
        tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype) + 0.5)


def _first_conv(module: nn.Module, graph: fx.Graph) -> Any:
    """Return the conv that a graph calls first, or None."""
    called = (called_by(module, node) for node in graph.nodes if node.op == "call_module")
    return next(filter(is_conv, called), None)


def _inputs(module: nn.Module, first: Any, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield random inputs of several sizes that the conv `first` can take, each larger than all windows of the module."""
    windows = (
        dilation * (size - 1) + 1 for conv in _convs(module) for dilation, size in zip(conv.dilation, conv.kernel_size)
    )
    largest = max(windows)
    for batch, (more, magnitude) in enumerate(zip(_MORE, _MAGNITUDES), 1):
        sizes = [largest + extra for extra in more[: len(first.kernel_size)]]
        numbers = torch.randn((batch, first.in_channels, *sizes), generator=generator, dtype=torch.float64)
        yield (magnitude * numbers).to(first.weight.device)


def _convs(module: nn.Module) -> Iterator[Any]:
    return (inner for inner in module.modules() if is_conv(inner))
