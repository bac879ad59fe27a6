"""Tracing that can't be wrong: torch.fx graphs of a model, or of its largest traceable parts (*islands*).

- A module that holds neither a conv nor a BatchNorm, and is no plain sequence, stays a leaf. So dropout, stochastic depth and attention
  keep their own behaviour in both modes.
- A module with hooks stays a leaf, too; its children are tried one by one. Code that may read what hooks collect can't be traced.
- Lists and dicts of modules without a forward, and sequences that hold more than layers, are tried member by member if the code around
  them can't be traced, because that code may index them.
- Conv classes with a forward of their own, and modules that call a function for convs, are traced through, because they may compute a
  plain conv. If they can't be traced, they are leaves.
- A graph is accepted only if the module traces to the same graph in training and in eval mode; ``F.dropout(…, self.training)`` does.
- If the code of a part inside a module can't be traced, that part becomes a leaf and the rest is tried again. Then the part is tried
  child by child.
- The graph of a gated block has the paths that run in eval mode.
- Code that draws random numbers can't be traced: a graph would repeat what it drew once.
- Tracing runs on a copy, because code may write into its parameters. Neither the model nor the state of random numbers is changed.
"""

from __future__ import annotations

import keyword
from collections import Counter
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from repfx.algebra.activated_norm import separate
from repfx.algebra.layers import code_of_its_own, is_conv, is_plain_sequence, own_classes
from repfx.blocks.block import RepBlock
from repfx.blocks.gates import gates_in
from repfx.blocks.squeezed_form import release_all
from repfx.graphs.keepers import attribute_of, kept_by_a_leaf, kept_from_outside, kept_in
from repfx.graphs.leaves import holds_modules, is_container, is_leaf, stays_whole
from repfx.graphs.mode_calls import let_dropout_follow_the_mode, let_norms_follow_the_mode
from repfx.graphs.tracer import DRAWS, Tracer, sentence
from repfx.reading.collecting import read_by_code
from repfx.reading.source_code import Around
from repfx.records.generators import Generators, random_state_kept
from repfx.records.module_tree import require_module
from repfx.records.notes import copy_of
from repfx.records.wrappers import passes_on

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
    """The islands of a model. `untraced` maps the paths of modules outside of them to the reason why they could not be traced."""

    islands: tuple[Island, ...]
    untraced: dict[str, str]


def trace(model: nn.Module, given: Mapping[str, Any] | None = None) -> Traces:
    """Trace a model, whole or in islands.

    Args:
        given: what a caller gives the model, by the name of the argument. Other arguments keep their defaults. If it is None, so do all
            but the first.

    >>> [island.path for island in trace(nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU())).islands]
    ['']
    """
    require_module(model)
    with random_state_kept(model):
        return _traces(copy_of(model), read_by_code(model), given)


def _traces(scratch: nn.Module, closed_to_traces: dict[str, str], given: Mapping[str, Any] | None) -> Traces:
    """Trace a copy of a model, but not the code at the paths in `closed_to_traces`, which gives the reasons."""
    islands: list[Island] = []
    untraced: dict[str, str] = {}
    release_all(scratch)
    for gates in gates_in(scratch).values():
        gates.choose(gates.open_in(training=False))
    kept = kept_in(scratch)
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
                if not is_leaf(module):
                    untraced[path] = closed
                if code_of_its_own(module) is None:
                    pending += [
                        (f"{path}.{name}" if path else name, child, around) for name, child in _with_blocks(module)
                    ]
                continue
        reason = closed_to_traces.get(path) or kept_from_outside(path, kept)
        result = reason or _graph_of(path, module, around, None if path else given)
        if isinstance(result, str):
            if not is_leaf(module) and not is_container(module):
                untraced[path] = result
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
        used = frozenset(str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr"))
        island = Island(path, graph, constants, used)
        islands.append(island)
        pending += [
            (island.full_path(name), module.get_submodule(name), around) for name in _opaque_calls(module, graph)
        ]
    return Traces(tuple(reversed(islands)), untraced)


def _with_blocks(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The children that are blocks or hold some."""
    for name, child in module.named_children():
        if any(isinstance(inner, RepBlock) for inner in child.modules()):
            yield name, child


def _graph_of(path: str, module: nn.Module, around: Around, given: Mapping[str, Any] | None) -> _Traced | str:
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
    opaque = set() if is_root else _convs_that_stay(module)
    if type(module) in opaque:
        return "a leaf"
    while True:
        result = _graph_of_both_modes(module, opaque, given)
        if not isinstance(result, _Untraceable):
            return result
        culprit = result.culprit
        if culprit is None or culprit is module or type(culprit) in opaque or is_plain_sequence(culprit):
            return result.reason
        opaque.add(type(culprit))


@dataclass(frozen=True)
class _Untraceable:
    """Why tracing failed, and the innermost module whose code was to blame, if one is known."""

    reason: str
    culprit: nn.Module | None = None


# names that a GraphModule has and other modules don't
_TAKEN = {*dir(fx.GraphModule), *vars(fx.GraphModule(nn.Module(), fx.Graph()))} - {*dir(nn.Module), *vars(nn.Module())}


def _name_taken(module: nn.Module) -> str | None:
    own = {name for cls in own_classes(type(module)) for name in vars(cls) if not name.startswith("__")}
    tensors = (name for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)))
    names = {*own, *vars(module), *dict(module.named_children()), *tensors}
    return min(names & _TAKEN, default=None)


def _graph_of_both_modes(
    module: nn.Module, opaque: Container[type[nn.Module]], given: Mapping[str, Any] | None = None
) -> _Traced | _Untraceable:
    """Try once to trace a module in both modes, with modules of the `opaque` classes as leaves. It is in eval mode afterwards."""
    try:
        return _graph_of_modes(module, opaque, given)
    finally:
        module.train(False)


def _graph_of_modes(
    module: nn.Module, opaque: Container[type[nn.Module]], given: Mapping[str, Any] | None
) -> _Traced | _Untraceable:
    graphs = []
    constants: list[dict[str, Tensor]] = []
    taken = set(dir(module))
    for training in (True, False):
        module.train(training)
        state = _state(module)
        result = _traced(module, opaque, given)
        keeper = _forget_values(module)
        if isinstance(result, _Untraceable):
            return result
        if keeper is not None:
            return _Untraceable("it keeps a value that is computed from the input as an attribute", keeper)
        if _state(module) != state:
            return _Untraceable("it changes its own tensors while it runs")
        graphs.append(result[0])
        constants.append(result[1])
    following = {
        **let_dropout_follow_the_mode(graphs[0], graphs[1], taken),
        **let_norms_follow_the_mode(graphs[0], graphs[1], taken),
    }
    if _text(graphs[0]) != _text(graphs[1]) or not _same_tensors(*constants):
        reason = "it computes different things in training and in eval mode"
        return _Untraceable(reason, _first_difference(module, *graphs))
    return graphs[1], {**constants[1], **following}


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


def _first_difference(root: nn.Module, *graphs: fx.Graph) -> nn.Module | None:
    """The innermost module whose code made the first node in which the graphs differ."""
    for nodes in zip(*(graph.nodes for graph in graphs)):
        if len({_line(node) for node in nodes}) > 1:
            stacks = [list(node.meta.get("nn_module_stack", {}).values()) for node in nodes]
            # take the longer of two stacks, because the other node may come after the module's end
            path = max(stacks, key=len)[-1][0] if any(stacks) else ""
            return root.get_submodule(path)
    return None


def _traced(
    module: nn.Module, opaque: Container[type[nn.Module]], given: Mapping[str, Any] | None
) -> tuple[fx.Graph, dict[str, Tensor]] | _Untraceable:
    """Trace a module in the mode it is in. Return its graph and the constants that tracing made, or why it can't be traced."""
    generators = Generators(module)
    result = _traced_once(module, opaque, given, generators)
    if isinstance(result, _Untraceable) and result.reason == DRAWS:  # or another thread has drawn
        with generators.of_this_thread():
            result = _traced_once(module, opaque, given, generators)
    return result


def _traced_once(
    module: nn.Module, opaque: Container[type[nn.Module]], given: Mapping[str, Any] | None, generators: Generators
) -> tuple[fx.Graph, dict[str, Tensor]] | _Untraceable:
    """Trace a module, and count it as a failure if one of the generators has given a number.

    A block that is called more than once stays a leaf and so is an island of its own. Whatever it becomes then serves every call.
    """
    before = set(vars(module))
    shared: set[nn.Module] = set()
    while True:
        tracer = Tracer(shared, opaque, given, generators)
        try:
            graph = tracer.trace(module)
            tracer.note_draws(None)
            graph.lint()  # code that keeps the values it was given may mix two graphs
            _require_names(graph)
            if tracer.failures:
                return _Untraceable(*tracer.failures[0])
        except Exception as error:
            return _Untraceable(sentence(error), tracer.running[-1] if tracer.running else None)
        finally:
            made = {name: value for name, value in vars(module).items() if name not in before}
            for name in made:
                delattr(module, name)
            again = {block for block, calls in tracer.block_calls.items() if calls > 1} - shared
            tracer.let_go()
        if not again:
            return graph, {name: value for name, value in made.items() if isinstance(value, Tensor)}
        shared |= again


def _convs_that_stay(module: nn.Module) -> set[type[nn.Module]]:
    """Return conv classes inside `module` whose forward is more than one call (for example: pad, then convolve) or can't be traced.

    If `module` is a conv or a plain sequence, it must keep its type, so these stay leaves. For any other module the result is empty.
    """
    if not (is_conv(module) or is_plain_sequence(module)):
        return set()
    own_code = [inner for inner in module.modules() if is_conv(inner) and not is_leaf(inner)]
    results = [(type(conv), _graph_of_both_modes(conv, set())) for conv in own_code]
    return {cls for cls, result in results if isinstance(result, _Untraceable) or not _is_one_call(result[0])}


def _is_one_call(graph: fx.Graph) -> bool:
    """Whether a single call makes the output from the input."""
    nodes = list(graph.nodes)
    first, output = nodes[0], nodes[-1]
    return len(first.users) == 1 and output.args == (next(iter(first.users)),)


def _opaque_calls(root: nn.Module, graph: fx.Graph) -> Iterator[str]:
    """The paths of modules that the graph calls as leaves although they hold something to trace."""
    targets = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    for target in sorted(targets):
        module = root.get_submodule(target)
        if not is_leaf(module):
            yield target


def _text(graph: fx.Graph) -> list[str]:
    return [_line(node) for node in graph.nodes]


def _line(node: fx.Node) -> str:
    return f"{node.name} {node.op} {node.target} {node.args} {node.kwargs}"


def _state(module: nn.Module) -> dict[str, tuple[int, int, int]]:
    """Return for each tensor of a module, by name: its identity, how often it was written to, and for a parameter the sum of its bits.

    The sum shows writes into ``.data``, which torch doesn't count. It is 0 for other tensors.
    """
    weights = dict(module.named_parameters())
    tensors: dict[str, Tensor] = {**weights, **dict(module.named_buffers())}
    for path, inner in module.named_modules():
        tensors.update({f"{path}.{name}": value for name, value in vars(inner).items() if isinstance(value, Tensor)})
    return {
        name: (id(tensor), _version_of(tensor), _sum_of_bits(tensor) if name in weights else 0)
        for name, tensor in tensors.items()
        if "_tensor_constant" not in name and not is_lazy(tensor)
    }


def _version_of(tensor: Tensor) -> int:
    """How often a tensor was written to; 0 for an inference tensor, for which torch doesn't count."""
    return 0 if tensor.is_inference() else tensor._version


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _sum_of_bits(weight: Tensor) -> int:
    """Sum the bits of a parameter, read as integers; other values nearly always give another sum. 0 if there are none to read."""
    if weight.is_meta or weight.layout is not torch.strided:
        return 0
    real = torch.view_as_real(weight.detach()) if weight.is_complex() else weight.detach()
    size, flat = real.element_size(), real.contiguous().reshape(-1)
    # adding eight bytes at once is several times quicker
    in_eights = flat.numel() * size % 8 == flat.storage_offset() * size % 8 == 0
    return int(flat.view(torch.int64 if in_eights else _INTEGERS[size]).sum(dtype=torch.int64))


def _same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(_same_tensor(a[name], b[name]) for name in a)


def _same_tensor(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal, as far as they have numbers."""
    if a.dtype != b.dtype or a.shape != b.shape or a.is_meta != b.is_meta:
        return False
    return a.is_meta or torch.equal(a, b)


def call_counts(traces: Traces) -> Counter[str]:
    """Count the calls of each module in all graphs, by its path in the model."""
    return Counter(
        island.full_path(str(node.target))
        for island in traces.islands
        for node in island.graph.nodes
        if node.op == "call_module"
    )
