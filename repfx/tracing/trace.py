"""Tracing that can't be wrong: torch.fx graphs of a model, or of its largest traceable parts (*islands*).

- A module that holds neither a conv nor a BatchNorm, and is no plain sequence, stays a leaf. So dropout, stochastic depth and attention
  keep their own behaviour in both modes. The blocks of linear layers inside it are islands of their own.
- A module with hooks stays a leaf, too; its children are tried one by one. Code that may read what hooks collect can't be traced.
- Lists and dicts of modules without a forward, and sequences that hold more than layers, are tried member by member if the code around
  them can't be traced, because that code may index them.
- Conv classes with a forward of their own, and modules that call a function for convs, are traced through, because they may compute a
  plain conv. If they can't be traced, they are leaves.
- A graph is accepted only if the module traces to the same graph in training and in eval mode; ``F.dropout(…, self.training)`` does.
  For `fuse`, a module whose eval path is a conv of weights composed of its branches runs one path in both modes.
- If the code of a part inside a module can't be traced, that part becomes a leaf and the rest is tried again. Then the part is tried
  child by child.
- The graph of a gated block has the paths that run in eval mode.
- Activation checkpointing changes no number. So for `fuse`, graphs have the code that is checkpointed.
- Code that draws random numbers can't be traced: a graph would repeat what it drew once.
- Code may check its input's sizes, dtype and device: the graph then does, too.
- Tracing runs on a copy, because code may write into its parameters. Neither the model nor the state of random numbers is changed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, TypeAlias

from torch import Tensor, fx, nn

from repfx.algebra.activated_norm import separate
from repfx.algebra.layers import code_of_its_own, is_conv, is_plain_sequence, own_classes
from repfx.blocks.block import RepBlock
from repfx.blocks.gates import gates_in
from repfx.blocks.paths import outermost_blocks
from repfx.blocks.squeezed_form import release_all
from repfx.graphs.calls_by_mode import let_follow_the_mode
from repfx.graphs.dropout import dropout_in_mode
from repfx.graphs.norm_calls import norm_in_mode
from repfx.reading.collecting import read_by_code
from repfx.reading.source_code import Around
from repfx.records.generators import random_state_kept
from repfx.records.module_tree import require_module
from repfx.records.notes import copy_of
from repfx.records.wrappers import passes_on
from repfx.tracing.eval_path import NOTES, settled_modes
from repfx.tracing.keepers import attribute_of, kept_by_a_leaf, kept_from_outside, kept_in
from repfx.tracing.leaves import holds_modules, is_container, is_leaf, is_linear_block, is_only_linear, stays_whole
from repfx.tracing.recording import checkpoints_passed_through
from repfx.tracing.traced import Untraceable, differ, graphs_by_mode, line_of

DIFFERS = "it computes different things in training and in eval mode"
_Traced: TypeAlias = tuple[fx.Graph, dict[str, Tensor | nn.Module]]


@dataclass(frozen=True)
class Island:
    """One traced module of a model: its path ("" for the model itself), its graph, and the constants and modules that tracing made.

    `used` holds the paths, inside the island, of all modules and tensors that the graph called or read when it was traced.
    """

    path: str
    graph: fx.Graph
    constants: dict[str, Tensor | nn.Module] = field(default_factory=dict)
    used: frozenset[str] = frozenset()

    def full_path(self, target: str) -> str:
        """Return a path inside the island as a path in the model."""
        return f"{self.path}.{target}" if self.path and target else self.path or target


@dataclass(frozen=True)
class Traces:
    """The islands of a model. `untraced` maps the paths of modules outside of them to the reason why they could not be traced.

    `notes` tells of the modules in the islands of which one path stands for both modes, by their paths in the model.
    """

    islands: tuple[Island, ...]
    untraced: dict[str, str]
    notes: dict[str, str] = field(default_factory=dict)


def trace(model: nn.Module, given: Mapping[str, Any] | None = None, *, composed: bool = False) -> Traces:
    """Trace a model, whole or in islands.

    Args:
        given: what a caller gives the model, by the name of the argument. Other arguments keep their defaults. If it is None, so do all
            but the first.
        composed: let one path stand for both modes: the eval path where it is a conv of weights that are composed of the branches of
            training mode, or the training path where both give equal numbers. The graphs have what code checkpoints, without checkpoints.

    >>> [island.path for island in trace(nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU())).islands]
    ['']
    """
    require_module(model)
    checkpoints = checkpoints_passed_through(model) if composed else nullcontext()
    with random_state_kept(model), checkpoints:
        return _traces(copy_of(model), read_by_code(model), given, composed)


def _traces(
    scratch: nn.Module, closed_to_traces: dict[str, str], given: Mapping[str, Any] | None, composed: bool
) -> Traces:
    """Trace a copy of a model, but not the code at the paths in `closed_to_traces`, which gives the reasons."""
    islands: list[Island] = []
    untraced: dict[str, str] = {}
    release_all(scratch)
    for gates in gates_in(scratch).values():
        gates.choose(gates.open_in(training=False))
    kept = kept_in(scratch)
    settled, refused = settled_modes(scratch) if composed else ({}, {})
    pending = [("", scratch, Around())]
    while pending:
        path, module, around = pending.pop()
        if passes_on(module) and code_of_its_own(module) is None:
            pending.append((f"{path}.module".lstrip("."), module.get_submodule("module"), around))
            continue
        closed = code_of_its_own(module) or around.order_of_children
        if closed is not None:
            if isinstance(module, RepBlock) and code_of_its_own(module) is None:
                around = Around()  # whatever it becomes takes its place, so its neighbours' order stays
            else:
                if not is_leaf(module) and not is_only_linear(module):
                    untraced[path] = closed
                if code_of_its_own(module) is None:
                    pending += [
                        (f"{path}.{name}" if path else name, child, around) for name, child in _with_blocks(module)
                    ]
                continue
        reason = closed_to_traces.get(path) or kept_from_outside(path, kept)
        result = reason or _graph_of(path, module, around, None if path else given, settled)
        if isinstance(result, str):
            if not is_leaf(module) and not is_container(module) and not is_only_linear(module):
                untraced[path] = f"{result}; {refused[module]}" if module in refused and reason is None else result
                around = around.inside(module)
            elif _holds_linear_block(module) or any(map(is_plain_sequence, module.modules())):
                around = around.inside(module)
            if path in kept:
                around = replace(around, closed=around.closed or f"{attribute_of(kept[path][0])} keeps what it lies in")
            pending += [
                (f"{path}.{name}" if path else name, child, around.toward(name))
                for name, child in module.named_children()
            ]
            continue
        graph, constants = result
        keeper = kept_by_a_leaf(path, graph, kept)
        if keeper is not None:
            untraced[path] = keeper
            pending += [(f"{path}.{name}" if path else name, child, around) for name, child in module.named_children()]
            continue
        for name, value in constants.items():
            setattr(module, name, value)
        separate(graph, module)
        used = {str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")}
        island = Island(path, graph, constants, frozenset(used | _replaced_in(module, graph, settled)))
        islands.append(island)
        pending += [
            (island.full_path(name), module.get_submodule(name), _around_leaf(around, name, graph))
            for name in _opaque_calls(module, graph)
        ]
        pending += [(island.full_path(name), block, around) for name, block in _blocks_beside(module, island.used)]
    run = {island.full_path(path) for island in islands for path in ("", *_paths_of_code(island.graph))}
    paths = ((path, module) for path, module in scratch.named_modules() if module in settled and path in run)
    notes = {path: NOTES[settled[module]] for path, module in paths}
    return Traces(tuple(reversed(islands)), untraced, notes)


def _replaced_in(root: nn.Module, graph: fx.Graph, settled: Mapping[nn.Module, bool]) -> set[str]:
    """Return the paths of the convs that only the eval path of a module has called, where the training path stands for both modes."""
    run = {"", *_paths_of_code(graph)}
    return {
        f"{path}.{name}".lstrip(".")
        for path, module in root.named_modules()
        if settled.get(module) and path in run
        for name, inner in module.named_modules()
        if is_conv(inner)
    }


def _paths_of_code(graph: fx.Graph) -> set[str]:
    """Return the paths of the modules whose code made nodes of a graph."""
    return {str(path) for node in graph.nodes for path, _ in node.meta.get("nn_module_stack", {}).values()}


def _with_blocks(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The children that are blocks or hold some."""
    for name, child in module.named_children():
        if any(isinstance(inner, RepBlock) for inner in child.modules()):
            yield name, child


def _graph_of(
    path: str, module: nn.Module, around: Around, given: Mapping[str, Any] | None, settled: Mapping[nn.Module, bool]
) -> _Traced | str:
    """Return the graph that is the same in both modes, with the constants and modules it needs, or the reason why there is none."""
    is_root = not path
    if is_container(module) and not (is_root and is_plain_sequence(module)):
        return "a container: its members are tried"
    if (is_plain_sequence(module) or holds_modules(module)) and around.takes_apart(path):
        return "a container: its members are tried"
    if is_leaf(module) and not is_root:
        return "a leaf"
    reason = around.reason(module)
    if reason is not None:
        return reason
    reason = stays_whole(module) or around.other_arguments(module)
    if reason is not None:
        return reason
    taken = None if isinstance(module, fx.GraphModule) else _name_taken(module)
    if taken is not None:
        return f"it has something named {taken!r}, a name that a traced module needs for itself"
    opaque = set() if is_root else _convs_that_stay(module, settled)
    if type(module) in opaque:
        return "a leaf"
    while True:
        result = _graph_of_both_modes(module, opaque, given, settled)
        if not isinstance(result, Untraceable):
            return result
        culprit = result.culprit
        if culprit is None or culprit is module or type(culprit) in opaque or is_plain_sequence(culprit):
            return result.reason
        opaque.add(type(culprit))


# names that a GraphModule has and other modules don't
_TAKEN = {*dir(fx.GraphModule), *vars(fx.GraphModule(nn.Module(), fx.Graph()))} - {*dir(nn.Module), *vars(nn.Module())}


def _name_taken(module: nn.Module) -> str | None:
    own = {name for cls in own_classes(type(module)) for name in vars(cls) if not name.startswith("__")}
    tensors = (name for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)))
    names = {*own, *vars(module), *dict(module.named_children()), *tensors}
    return min(names & _TAKEN, default=None)


def _graph_of_both_modes(
    module: nn.Module,
    opaque: Container[type[nn.Module]],
    given: Mapping[str, Any] | None,
    settled: Mapping[nn.Module, bool],
) -> _Traced | Untraceable:
    """Try once to trace a module in both modes, with modules of the `opaque` classes as leaves. It is in eval mode afterwards.

    The code of `settled` modules runs in the mode that is named there, whatever the mode.
    """
    taken = set(dir(module))
    try:
        graphs = graphs_by_mode(module, opaque, given, settled)
    finally:
        module.train(False)
    if isinstance(graphs, Untraceable):
        return graphs
    (training, _), (evaluation, constants) = graphs
    following = {
        **let_follow_the_mode(training, evaluation, dropout_in_mode, "dropout", taken),
        **let_follow_the_mode(training, evaluation, norm_in_mode, "norm_call", taken),
    }
    if differ(graphs):
        return Untraceable(DIFFERS, _first_difference(module, training, evaluation))
    return evaluation, {**constants, **following}


def _first_difference(root: nn.Module, *graphs: fx.Graph) -> nn.Module | None:
    """The innermost module whose code made the first node in which the graphs differ."""
    for nodes in zip(*(graph.nodes for graph in graphs)):
        if len({line_of(node) for node in nodes}) > 1:
            stacks = [list(node.meta.get("nn_module_stack", {}).values()) for node in nodes]
            # take the longer of two stacks, because the other node may come after the module's end
            path = max(stacks, key=len)[-1][0] if any(stacks) else ""
            return root.get_submodule(path)
    return None


def _convs_that_stay(module: nn.Module, settled: Mapping[nn.Module, bool]) -> set[type[nn.Module]]:
    """Return conv classes inside `module` whose forward is more than one call (for example: pad, then convolve) or can't be traced.

    If `module` is a conv or a plain sequence, it must keep its type, so these stay leaves. For any other module the result is empty.
    """
    if not (is_conv(module) or is_plain_sequence(module)):
        return set()
    own_code = [inner for inner in module.modules() if is_conv(inner) and not is_leaf(inner)]
    results = [(type(conv), _graph_of_both_modes(conv, set(), None, settled)) for conv in own_code]
    return {cls for cls, result in results if isinstance(result, Untraceable) or not _is_one_call(result[0])}


def _is_one_call(graph: fx.Graph) -> bool:
    """Whether a single call makes the output from the input."""
    nodes = list(graph.nodes)
    first, output = nodes[0], nodes[-1]
    return len(first.users) == 1 and output.args == (next(iter(first.users)),)


def _opaque_calls(root: nn.Module, graph: fx.Graph) -> Iterator[str]:
    """The paths of modules that the graph calls as leaves although they hold something to trace, such as the block of a linear layer."""
    targets = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    for target in sorted(targets):
        module = root.get_submodule(target)
        if not is_leaf(module) or _holds_linear_block(module):
            yield target


def _blocks_beside(root: nn.Module, used: frozenset[str]) -> Iterator[tuple[str, nn.Module]]:
    """The blocks that a graph runs neither itself nor in a leaf. Only other code can call them, such as a deeper stage of an encoder."""
    run = {outer for path in used for outer in _up_to(path)}
    return (
        (path, block) for path, block in outermost_blocks(root) if path not in run and used.isdisjoint(_up_to(path))
    )


def _up_to(path: str) -> Iterator[str]:
    """The paths of the modules around a path, and the path itself."""
    return accumulate(path.split("."), lambda outer, name: f"{outer}.{name}")


def _holds_linear_block(module: nn.Module) -> bool:
    return any(is_linear_block(inner) for inner in module.modules())


def _around_leaf(around: Around, target: str, graph: fx.Graph) -> Around:
    """Return the facts for a leaf that a graph calls: as the code around the graph has them, and what the graph gives the leaf."""
    counts = {len(node.args) + len(node.kwargs) for node in graph.nodes if node.target == target}
    return replace(
        around,
        passes_more=around.passes_more or max(counts, default=1) > 1,
        passes_nothing=around.passes_nothing or 0 in counts,
    )


def call_counts(traces: Traces) -> Counter[str]:
    """Count the calls of each module in all graphs, by its path in the model."""
    return Counter(
        island.full_path(str(node.target))
        for island in traces.islands
        for node in island.graph.nodes
        if node.op == "call_module"
    )
