"""The graphs of one module, traced in training and in eval mode, or why it can't be traced."""

from __future__ import annotations

import keyword
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn

from repfx.records.generators import Generators
from repfx.tracing.tensor_state import tensor_state
from repfx.tracing.tracer import Tracer, asks_for_gradient, sentence

OfOneMode: TypeAlias = tuple[fx.Graph, dict[str, Tensor]]  # a graph, and the constants that tracing made


@dataclass(frozen=True)
class Untraceable:
    """Why tracing failed, and the innermost module whose code was to blame, if one is known."""

    reason: str
    culprit: nn.Module | None = None


def graphs_by_mode(
    module: nn.Module,
    opaque: Container[type[nn.Module]],
    given: Mapping[str, Any] | None,
    settled: Mapping[nn.Module, bool],
) -> tuple[OfOneMode, OfOneMode] | Untraceable:
    """Trace a module in training mode, then in eval mode, in which it is left.

    If code asks for gradients, it has to give the same graph for both answers in both modes.
    """
    training = graph_in_mode(module, True, opaque, given, settled)
    if isinstance(training, Untraceable):
        return training
    evaluation = graph_in_mode(module, False, opaque, given, settled)
    if isinstance(evaluation, Untraceable):
        return evaluation
    for mode, expected in ((True, training), (False, evaluation)):
        if any(map(asks_for_gradient, expected[0].nodes)):
            other = graph_in_mode(module, mode, opaque, given, settled, differentiated=not mode)
            if isinstance(other, Untraceable) or differ((other, expected)):
                return Untraceable("it computes different things with and without gradients")
    return training, evaluation


def graph_in_mode(
    module: nn.Module,
    training: bool,
    opaque: Container[type[nn.Module]],
    given: Mapping[str, Any] | None,
    settled: Mapping[nn.Module, bool],
    *,
    differentiated: bool | None = None,
) -> OfOneMode | Untraceable:
    """Trace a module in one mode, in which it is left; in the mode that `settled` names, if it names one.

    Code that asks whether values need gradients is told so in training mode, or as `differentiated` says.
    """
    module.train(settled.get(module, training))
    state = tensor_state(module)
    result = _traced(module, opaque, given, settled, training if differentiated is None else differentiated)
    keeper = _forget_values(module)
    if isinstance(result, Untraceable):
        return result
    if keeper is not None:
        return Untraceable("it keeps a value that is computed from the input as an attribute", keeper)
    if tensor_state(module) != state:
        return Untraceable("it changes its own tensors while it runs")
    return result


def differ(graphs: tuple[OfOneMode, OfOneMode]) -> bool:
    """Whether two graphs, or the constants that tracing made for them, aren't the same."""
    (training, made), (evaluation, made_in_eval) = graphs
    return _text(training) != _text(evaluation) or not _same_tensors(made, made_in_eval)


def _forget_values(module: nn.Module) -> nn.Module | None:
    """Delete the proxies that code has kept as attributes. Return one of the modules that had any, or None."""
    keeper = None
    for inner in module.modules():
        for name in [name for name, value in vars(inner).items() if issubclass(type(value), fx.Proxy)]:
            delattr(inner, name)
            keeper = inner
    return keeper


def _require_names(graph: fx.Graph) -> None:
    """Raise ValueError if a path can't be written in the code that torch.fx generates."""
    for node in graph.nodes:
        word = next((part for part in str(node.target).split(".") if keyword.iskeyword(part)), None)
        if node.op in ("call_module", "get_attr") and word is not None:
            raise ValueError(f"{node.target!r} has a Python keyword in it")


def _traced(
    module: nn.Module,
    opaque: Container[type[nn.Module]],
    given: Mapping[str, Any] | None,
    settled: Mapping[nn.Module, bool],
    differentiated: bool,
) -> OfOneMode | Untraceable:
    """Trace a module in the mode it is in. Return its graph and the constants that tracing made, or why it can't be traced."""
    generators = Generators(module)
    result = _traced_once(module, opaque, given, None, settled, differentiated)
    if generators.have_drawn():  # the code has, or another thread
        with generators.of_this_thread():
            result = _traced_once(module, opaque, given, generators, settled, differentiated)
    return result


def _traced_once(
    module: nn.Module,
    opaque: Container[type[nn.Module]],
    given: Mapping[str, Any] | None,
    generators: Generators | None,
    settled: Mapping[nn.Module, bool],
    differentiated: bool,
) -> OfOneMode | Untraceable:
    """Trace a module, and count it as a failure if one of the generators, where they are watched, has given a number.

    A block that is called more than once stays a leaf and so is an island of its own. Whatever it becomes then serves every call.
    """
    before = set(vars(module))
    shared: set[nn.Module] = set()
    while True:
        tracer = Tracer(shared, opaque, given, generators, settled, differentiated=differentiated)
        try:
            graph = tracer.trace(module)
            tracer.note_draws(None)
            graph.lint()  # code that keeps the values it was given may mix two graphs
            _require_names(graph)
            if tracer.failures:
                return Untraceable(*tracer.failures[0])
        except Exception as error:
            return Untraceable(sentence(error), tracer.running[-1] if tracer.running else None)
        finally:
            made = {name: value for name, value in vars(module).items() if name not in before}
            for name in made:
                delattr(module, name)
            again = {block for block, calls in tracer.block_calls.items() if calls > 1} - shared
            tracer.let_go()
        if not again:
            return graph, {name: value for name, value in made.items() if isinstance(value, Tensor)}
        shared |= again


def _text(graph: fx.Graph) -> list[str]:
    """Return a line for each node, without questions about gradients that code alone has read."""
    return [line_of(node) for node in graph.nodes if node.users or not asks_for_gradient(node)]


def line_of(node: fx.Node) -> str:
    """Return a line by which nodes of two graphs are compared."""
    return f"{node.name} {node.op} {node.target} {node.args} {node.kwargs}"


def _same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(_same_tensor(a[name], b[name]) for name in a)


def _same_tensor(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal, as far as they have numbers."""
    if a.dtype != b.dtype or a.shape != b.shape or a.is_meta != b.is_meta:
        return False
    return a.is_meta or torch.equal(a, b)
