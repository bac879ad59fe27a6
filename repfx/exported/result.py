"""Fused programs and graph modules, made of a lowered graph: names of tensors, the signature, and the tensors themselves."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import chain, count
from typing import Any

from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, OutputSpec, TensorArgument

from repfx.exported.lowering import Lowered
from repfx.exported.source import Source
from repfx.records.module_tree import has, place_tensor
from repfx.records.notes import copy_of

_COUNTER = "num_batches_tracked"


@dataclass(frozen=True)
class _Tensors:
    """The tensors of a result.

    Args:
        kept: names of the tensors of the source that stay.
        new: the tensors that rules have made, by name.
        nodes: the name of the tensor of each node that reads a new one.
    """

    kept: frozenset[str]
    new: dict[str, nn.Parameter]
    nodes: dict[fx.Node, str]


def program_of(program: ExportedProgram, source: Source, lowered: Lowered) -> ExportedProgram:
    """Return a program like another one, with this graph. It shares no memory with the other program."""
    names = {
        node: source.names[old] for old, node in _placeholders(program.graph, lowered.graph) if old in source.names
    }
    tensors = _tensors(source, lowered, {name for node, name in names.items() if node.users})
    specs = _input_specs(program, lowered, names, tensors)
    graph, made = _in_order(lowered, [node for node, _ in specs], program.graph)
    inputs = [
        spec if spec.arg.name == made[node].name else replace(spec, arg=TensorArgument(made[node].name))
        for node, spec in specs
    ]
    signature = ExportGraphSignature(inputs, _output_specs(program, graph))
    state = {name: program.state_dict[name] for name in program.state_dict if _stays(name, tensors, source)}
    constants = {name: value for name, value in program.constants.items() if _stays(name, tensors, source)}
    state, constants = copy.deepcopy((state, constants))
    return ExportedProgram(
        root=program.graph_module,
        graph=graph,
        graph_signature=signature,
        state_dict={**state, **tensors.new},
        range_constraints=copy.deepcopy(program.range_constraints),
        module_call_graph=_calls(program, graph),
        example_inputs=program.example_inputs,
        constants=constants,
        verifiers=program.verifiers,
    )


def module_of(module: fx.GraphModule, source: Source, lowered: Lowered) -> fx.GraphModule:
    """Return a graph module like another one, with this graph. It shares no memory with the other one."""
    read = {str(node.target) for node in lowered.graph.nodes if node.op == "get_attr" and node not in lowered.tensors}
    tensors = _tensors(source, lowered, read)
    for node, name in tensors.nodes.items():
        node.target = name
    for node in list(lowered.graph.nodes):
        if node.op == "get_attr" and not node.users and str(node.target) in source.tensors.keys() - tensors.kept:
            lowered.graph.erase_node(node)
    placeholders = [node for node in lowered.graph.nodes if node.op == "placeholder"]
    graph, _ = _in_order(lowered, placeholders, module.graph)
    result: Any = copy_of(module)
    for name in ("validate_inputs", "range_constraints"):  # torch.export's hook asks for them
        if name in vars(module):
            setattr(result, name, getattr(module, name))
    for name in set(source.tensors) - tensors.kept:
        _delete(result, name)
    for name, value in tensors.new.items():
        owner, _, last = name.rpartition(".")
        place_tensor(result, owner, last, value, saved=True)
    result.graph = graph
    return result  # type: ignore[no-any-return]


# ---- names of tensors


def _tensors(source: Source, lowered: Lowered, read: Iterable[str]) -> _Tensors:
    """Name the new tensors, each as the one whose place it takes if that is gone, and decide which of the source's tensors stay."""
    before = {name for node, name in source.names.items() if node.users}
    gone = before - set(read)
    gone |= {name for name in source.tensors if name.endswith(_COUNTER) and _counts_for(name, gone)}
    kept = frozenset(source.tensors) - gone
    new: dict[str, nn.Parameter] = {}
    nodes: dict[fx.Node, str] = {}
    for node, tensor in lowered.tensors.items():
        usual = tensor.was or f"{tensor.conv}.{tensor.kind}"
        name = _free(usual, {*kept, *new})
        new[name], nodes[node] = tensor.value, name
    return _Tensors(kept, new, nodes)


def _counts_for(name: str, gone: set[str]) -> bool:
    return f"{name.removesuffix(_COUNTER)}running_mean" in gone


def _free(name: str, taken: set[str]) -> str:
    """Return a name like this one that no other tensor has, and that stands in no path of another or has another in its own."""
    candidates = chain([name], (f"{name.replace('.', '_')}_{number}" for number in count(1)))
    return next(candidate for candidate in candidates if not any(_clash(candidate, other) for other in taken))


def _clash(one: str, other: str) -> bool:
    return one == other or one.startswith(f"{other}.") or other.startswith(f"{one}.")


def _stays(name: str, tensors: _Tensors, source: Source) -> bool:
    return name in tensors.kept or name not in source.tensors


def _delete(module: nn.Module, name: str) -> None:
    """Delete a tensor, and then the modules that are empty without it."""
    owner, _, last = name.rpartition(".")
    if not has(module, name):
        return
    delattr(module.get_submodule(owner), last)
    while owner:
        inner = module.get_submodule(owner)
        if type(inner) is not nn.Module or any(
            True for _ in (*inner.children(), *inner.parameters(), *inner.buffers())
        ):
            return
        owner, _, last = owner.rpartition(".")
        delattr(module.get_submodule(owner), last)


# ---- signatures


def _placeholders(old: fx.Graph, new: fx.Graph) -> list[tuple[fx.Node, fx.Node]]:
    """Return the placeholders of two graphs that have the same ones."""
    found = [[node for node in graph.nodes if node.op == "placeholder"] for graph in (old, new)]
    return list(zip(*found, strict=True))


def _input_specs(
    program: ExportedProgram, lowered: Lowered, names: Mapping[fx.Node, str], tensors: _Tensors
) -> list[tuple[fx.Node, InputSpec]]:
    """Return the inputs of the new graph with their specs: first parameters, each new one in the place of that which it replaces."""
    old = dict(
        zip((node for _, node in _placeholders(program.graph, lowered.graph)), program.graph_signature.input_specs)
    )
    places = {str(spec.target): place for place, spec in enumerate(old.values()) if spec.target is not None}
    ends = [place for place, spec in enumerate(old.values()) if spec.kind in (InputKind.TOKEN, InputKind.PARAMETER)]
    ordered = [
        ((place, 0), node, spec)
        for place, (node, spec) in enumerate(old.items())
        if node not in names or names[node] in tensors.kept
    ]
    last = (max(ends, default=-1), 1)
    for place, (node, name) in enumerate(tensors.nodes.items()):
        parameter = places.get(name) if places.get(name) in ends else None
        spec = InputSpec(InputKind.PARAMETER, TensorArgument(_placeholder_name(name)), name)
        lowered.names[node] = _placeholder_name(name)
        last = last if parameter is None else (parameter, 0)
        ordered.append(((last[0], last[1] + place), node, spec))
    return [(node, spec) for _, node, spec in sorted(ordered, key=lambda item: item[0])]


def _placeholder_name(name: str) -> str:
    return f"p_{name}".replace(".", "_").lower()


def _output_of(graph: fx.Graph) -> Any:
    """Return what a graph gives out."""
    return next(node for node in reversed(graph.nodes) if node.op == "output").args[0]


def _output_specs(program: ExportedProgram, graph: fx.Graph) -> list[OutputSpec]:
    """Return the specs of outputs, with the names that the nodes of the new graph have."""
    outputs: Any = _output_of(graph)
    specs = []
    for spec, value in zip(program.graph_signature.output_specs, outputs, strict=True):
        named = isinstance(value, fx.Node) and value.name != spec.arg.name
        specs.append(replace(spec, arg=replace(spec.arg, name=value.name)) if named else spec)
    return specs


def _calls(program: ExportedProgram, graph: fx.Graph) -> list[Any]:
    """Return the modules' own signatures. One that names nodes which are merged is left out, except that of the program."""
    known = {node.name for node in graph.nodes}
    calls: list[Any] = copy.deepcopy(program.module_call_graph)
    for call in calls:
        values = [] if call.signature is None or not call.fqn else [*call.signature.inputs, *call.signature.outputs]
        if any(isinstance(value, TensorArgument) and value.name not in known for value in values):
            call.signature = None
    if calls and calls[0].signature is not None:
        root = calls[0].signature
        outputs: Any = _output_of(graph)
        user = [
            node.name if isinstance(node, fx.Node) else None
            for node, spec in zip(outputs, program.graph_signature.output_specs)
            if spec.kind.name == "USER_OUTPUT"
        ]
        for value, name in zip(root.outputs, user):
            if isinstance(value, TensorArgument) and name is not None:
                value.name = name
    return calls


# ---- the graph in its order


def _in_order(lowered: Lowered, placeholders: list[fx.Node], like: fx.Graph) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """Return a copy of a graph with these inputs, in which each node has the name that it should get. Return the copies of nodes, too."""
    graph = fx.Graph(tracer_cls=like._tracer_cls)
    made: dict[fx.Node, fx.Node] = {}
    inputs = set(placeholders)
    for node in [
        *placeholders,
        *(each for each in lowered.graph.nodes if each not in inputs and each.op != "placeholder"),
    ]:
        name = lowered.names.get(node, node.name)
        args, kwargs = (fx.node.map_arg(each, made.__getitem__) for each in (node.args, node.kwargs))
        op, target = ("placeholder", name) if node in inputs else (node.op, node.target)
        made[node] = graph.create_node(op, target, args, kwargs, name=name, type_expr=node.type)
        made[node].meta = dict(node.meta)
    graph.set_codegen(copy.deepcopy(like._codegen))
    return graph, made
