"""The graphs of one module, traced in training and in eval mode, and how one graph may serve both modes.

Calls of dropout such as ``F.dropout(x, training=self.training)`` become dropout modules, which follow the mode. A module that runs branches
in training mode, and in eval mode a conv of a weight composed of the branches' weights, may run its eval path in both: its fused form is
that conv. So training mode may have nothing that the conv would lose, such as dropout, another output, or a weight of its own.
"""

from __future__ import annotations

import inspect
import keyword
from collections import Counter
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from repfx.algebra.layers import is_batch_norm, is_conv
from repfx.algebra.meaning import meaning_of
from repfx.graphs.constants import Constants, draws
from repfx.graphs.functional_conv import read_functional_conv, tensors_of
from repfx.graphs.leaves import calls_conv, is_leaf, stays_whole
from repfx.graphs.operations import Op
from repfx.graphs.settings import tensor_state
from repfx.graphs.tracer import DRAWS, Tracer, sentence
from repfx.records.generators import Generators

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
    settled: Container[nn.Module],
) -> tuple[OfOneMode, OfOneMode] | Untraceable:
    """Trace a module in training mode, then in eval mode, in which it is left."""
    results = []
    for training in (True, False):
        module.train(training and module not in settled)
        state = tensor_state(module)
        result = _traced(module, opaque, given, settled)
        keeper = _forget_values(module)
        if isinstance(result, Untraceable):
            return result
        if keeper is not None:
            return Untraceable("it keeps a value that is computed from the input as an attribute", keeper)
        if tensor_state(module) != state:
            return Untraceable("it changes its own tensors while it runs")
        results.append(result)
    return results[0], results[1]


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
    settled: Container[nn.Module],
) -> OfOneMode | Untraceable:
    """Trace a module in the mode it is in. Return its graph and the constants that tracing made, or why it can't be traced."""
    generators = Generators(module)
    result = _traced_once(module, opaque, given, generators, settled)
    if isinstance(result, Untraceable) and result.reason == DRAWS:  # or another thread has drawn
        with generators.of_this_thread():
            result = _traced_once(module, opaque, given, generators, settled)
    return result


def _traced_once(
    module: nn.Module,
    opaque: Container[type[nn.Module]],
    given: Mapping[str, Any] | None,
    generators: Generators,
    settled: Container[nn.Module],
) -> OfOneMode | Untraceable:
    """Trace a module, and count it as a failure if one of the generators has given a number.

    A block that is called more than once stays a leaf and so is an island of its own. Whatever it becomes then serves every call.
    """
    before = set(vars(module))
    shared: set[nn.Module] = set()
    while True:
        tracer = Tracer(shared, opaque, given, generators, settled)
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
    return [line_of(node) for node in graph.nodes]


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


# ---- dropout that follows the mode

MODULES: dict[object, type[nn.Module]] = {
    F.dropout: nn.Dropout,
    F.dropout1d: nn.Dropout1d,
    F.dropout2d: nn.Dropout2d,
    F.dropout3d: nn.Dropout3d,
    F.alpha_dropout: nn.AlphaDropout,
    F.feature_alpha_dropout: nn.FeatureAlphaDropout,
}


def let_dropout_follow_the_mode(training: fx.Graph, evaluation: fx.Graph, taken: set[str]) -> dict[str, nn.Module]:
    """Replace each dropout call that is on in training and off in eval mode by the call of a dropout module, in the graphs of both modes.

    Return the modules by name. No name is among `taken`.
    """
    made: dict[str, nn.Module] = {}
    free = (name for index in range(len(taken) + len(training.nodes)) if (name := f"dropout_{index}") not in taken)
    for nodes in list(zip(training.nodes, evaluation.nodes)):
        modules = [_as_module(node, mode) for node, mode in zip(nodes, (True, False))]
        if modules[0] is None or repr(modules[0]) != repr(modules[1]):
            continue
        name = next(free)
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
    if node.op != "call_function" or node.target not in MODULES or len(node.all_input_nodes) != 1:
        return None
    call = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
    call.apply_defaults()
    if call.arguments["training"] is not training:
        return None
    return MODULES[node.target](call.arguments["p"], call.arguments["inplace"])


# ---- eval paths that stand for both modes

NOTE = "it asks for its mode; fused, it runs its eval path, a conv of composed weights, in training mode, too"


def composing(scratch: nn.Module) -> tuple[dict[nn.Module, str], dict[nn.Module, str]]:
    """Return the modules whose eval path stands for training mode, too, with their paths; and those for which it can't, with the reason."""
    settled: dict[nn.Module, str] = {}
    refused: dict[nn.Module, str] = {}
    for path, module in reversed(list(scratch.named_modules())):  # inner ones first
        if is_leaf(module) or not calls_conv(module) or stays_whole(module) is not None:
            continue
        graphs = graphs_by_mode(module, set(), None, settled.keys())
        module.train(False)
        if isinstance(graphs, Untraceable) or not differ(graphs):
            continue
        reason = _why_not_composed(module, graphs)
        if reason is None:
            settled[module] = path
        else:
            refused[module] = reason
    return settled, refused


def _why_not_composed(module: nn.Module, graphs: tuple[OfOneMode, OfOneMode]) -> str | None:
    """Return why the eval path of a module can't stand for training mode; None if it can."""
    (training, _), (evaluation, constants) = graphs
    try:
        for name, value in constants.items():
            setattr(module, name, value)
        return _why_not_the_eval_path(module, training, evaluation)
    finally:
        for name in constants:
            delattr(module, name)


def _why_not_the_eval_path(root: nn.Module, training: fx.Graph, evaluation: fx.Graph) -> str | None:
    """Return why the graph of eval mode can't stand for that of training mode, or None if it can."""
    constants = Constants(evaluation, root)
    composed = [node for node in evaluation.nodes if isinstance(read_functional_conv(node, constants), Op)]
    composed = [node for node in composed if not _is_called(node, training)]
    if not composed:
        return "its eval path computes no conv of composed weights"
    used = _tensors_used(training, root)
    for node in composed:
        parameters = [name for name in tensors_of(node) if _is_parameter(root, name)]
        strange = [name for name in parameters if name not in used]
        if strange or not parameters:
            return f"its eval path has a weight that training mode doesn't use: {(strange or tensors_of(node))[0]}"
    return _what_is_lost(root, training, evaluation)


def _what_is_lost(root: nn.Module, training: fx.Graph, evaluation: fx.Graph) -> str | None:
    """Return what only the graph of training mode does, beside convs and BatchNorms that add up to a conv; None if there is nothing."""
    drawn = next((node.name for node in training.nodes if draws(node)), None)
    if drawn is not None:
        return f"its {drawn} would be lost"
    if not all(isinstance(graph.output_node().args[0], fx.Node) for graph in (training, evaluation)):
        return "it returns several values"
    only_in_eval = _calls(evaluation) - _calls(training)
    if only_in_eval:
        return f"training mode doesn't call {min(only_in_eval)}"
    lost = [path for path in _calls(training) - _calls(evaluation) if not _is_linear_layer(root.get_submodule(path))]
    if lost:
        return f"eval mode doesn't call {min(lost)}"
    return None


def _is_called(node: fx.Node, graph: fx.Graph) -> bool:
    """Whether a graph has the very call of `node`: of the same function, with weights that have the same names."""
    return any(other.target is node.target and tensors_of(other) == tensors_of(node) for other in graph.nodes)


def _is_parameter(root: nn.Module, path: str) -> bool:
    owner, _, name = path.rpartition(".")
    return name in dict(root.get_submodule(owner).named_parameters(recurse=False))


def _tensors_used(graph: fx.Graph, root: nn.Module) -> set[str]:
    """Return the names of the parameters that a graph reads, itself or through the modules that it calls."""
    found = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    for path in _calls(graph):
        found |= {f"{path}.{name}" for name, _ in root.get_submodule(path).named_parameters()}
    return found


def _calls(graph: fx.Graph) -> Counter[str]:
    return Counter(str(node.target) for node in graph.nodes if node.op == "call_module")


def _is_linear_layer(module: nn.Module) -> bool:
    """Whether a module is a layer of torch that adds up to a conv with others, in eval mode, and draws nothing in training mode."""
    plain = (nn.Identity, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d)
    return meaning_of(module) is not None and (is_conv(module) or is_batch_norm(module) or type(module) in plain)
