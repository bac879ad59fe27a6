"""Modules that ask for their mode: branches in training mode, and in eval mode a conv of a weight composed of the branches' weights.

The fused form of such a module is that conv, in both modes. So its eval path may stand for both, if training mode has nothing that the
conv would lose, such as dropout, another output, or a weight of its own. Where no graph can hold the eval path, the training path may
stand for both (`training_path`).
"""

from __future__ import annotations

from collections import Counter

from torch import fx, nn

from repfx.algebra.layers import is_batch_norm, is_conv
from repfx.algebra.meaning import meaning_of
from repfx.graphs.constants import Constants, draws
from repfx.graphs.functional_conv import read_functional_conv, tensors_of
from repfx.graphs.operations import Op
from repfx.tracing.leaves import calls_conv, is_leaf, may_write_in_one_mode, stays_whole
from repfx.tracing.traced import OfOneMode, Untraceable, differ, graph_in_mode
from repfx.tracing.training_path import why_not_the_training_path, writes_into_itself

# what is told of a module, by whether it runs its training path in both modes
NOTES = {
    False: "it asks for its mode; fused, it runs its eval path, a conv of composed weights, in training mode, too",
    True: "it asks for its mode; fused, it runs its training path in eval mode, too: both gave equal numbers when they were compared",
}


def settled_modes(scratch: nn.Module) -> tuple[dict[nn.Module, bool], dict[nn.Module, str]]:
    """Return the modules of which one path stands for both modes, each with whether that is the path of training mode.

    Also return those of which neither does, with the reason.
    """
    settled: dict[nn.Module, bool] = {}
    refused: dict[nn.Module, str] = {}
    for module in reversed(list(scratch.modules())):  # inner ones first
        if is_leaf(module) or stays_whole(module) is not None:
            continue
        if not (calls_conv(module) or may_write_in_one_mode(module)):
            continue
        found = _path_for_both_modes(module, settled)
        module.train(False)
        if isinstance(found, bool):
            settled[module] = found
        elif found is not None:
            refused[module] = found
    return settled, refused


def _path_for_both_modes(module: nn.Module, settled: dict[nn.Module, bool]) -> bool | str | None:
    """Return whether the path that stands for both modes is that of training mode, or why there is none; None if there is one path."""
    evaluation = graph_in_mode(module, False, (), None, settled)
    no_graph = isinstance(evaluation, Untraceable) or writes_into_itself(evaluation[0], module)
    training = graph_in_mode(module, True, (), None, settled) if no_graph or calls_conv(module) else None
    module.train(False)
    if training is None or isinstance(training, Untraceable):
        return None
    if isinstance(evaluation, Untraceable) or no_graph:
        return why_not_the_training_path(module, training) or True
    return (_why_not_composed(module, (training, evaluation)) or False) if differ((training, evaluation)) else None


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
