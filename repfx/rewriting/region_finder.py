"""The search for linear regions outside blocks that may run as one conv each. The rules that fuse a model find them.

The rules run on an outline of the model: a copy without numbers in which each block is a conv of its sizes. What they find depends on sizes
alone, so it stays right while parameters are trained.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx, nn
from torch.nn.modules.dropout import _DropoutNd

from repfx.algebra.activated_norm import join
from repfx.algebra.baking import conv_module
from repfx.algebra.layers import has_tensors
from repfx.blocks.block import RepBlock
from repfx.blocks.squeezed_form import NAME, SqueezedForm, copies_itself
from repfx.graphs.dropout import MODULES
from repfx.graphs.operations import Op
from repfx.graphs.sums import SumOf
from repfx.reading.source_code import calls
from repfx.records.module_tree import outer_paths
from repfx.records.notes import copy_without_numbers
from repfx.records.report import Skip
from repfx.rewriting.editor import Editor
from repfx.rewriting.explanation import left_alone
from repfx.rewriting.input_shapes import InputShapes
from repfx.rewriting.linear_region import LinearRegion
from repfx.rewriting.match import Match
from repfx.rewriting.pipeline import Views, run_rules
from repfx.rewriting.rule import RULES, Rule
from repfx.rewriting.view import View
from repfx.tracing.aliases import set_aside
from repfx.tracing.leaves import is_leaf
from repfx.tracing.trace import Island, trace
from repfx.tracing.tracer import OUTSIDE


def find_forms(model: nn.Module, parts: Collection[str], held: Collection[str]) -> Iterator[SqueezedForm]:
    """Yield the forms that modules of a model can take. No module may have taken one yet.

    Args:
        parts: the paths of all modules with tensors that a region may consist of; squeezed blocks among them.
        held: those of BatchNorms that stay in eval mode if they lie in a region.
    """
    for path, finder, _ in _searches(_Place(model, _outline(model)), parts):
        if finder is not None and finder.merged:
            inside = finder.island.full_path
            yield _form(model.get_submodule(_joined(path, finder.island.path)), finder, _below(held, path, inside("")))


def reasons_against(model: nn.Module, parts: Collection[str]) -> list[Skip]:
    """Return why no more of a model can run as one conv: what stands in the way at layers, or why the code around them can't be a graph."""
    found = [
        replace(skip, path=_joined(path, skip.path))
        for path, _, skips in _searches(_Place(model, _outline(model)), parts)
        for skip in skips
    ]
    return list(dict.fromkeys(found))


@dataclass(frozen=True)
class _Place:
    """A module of a model, its outline, and its path in the model."""

    model: nn.Module
    outline: nn.Module
    path: str = ""

    def children(self, inner: str) -> Iterator[_Place]:
        """Yield the places of the children of a module at a path inside."""
        model, outline = self.model.get_submodule(inner), self.outline.get_submodule(inner)
        for name, child in outline.named_children():
            if is_leaf(child):
                continue
            yield _Place(model.get_submodule(name), child, _joined(_joined(self.path, inner), name))


def _searches(place: _Place, parts: Collection[str]) -> Iterator[tuple[str, _Finder | None, list[Skip]]]:
    """Search each graph of a place. Yield the place's path, what was found, and reasons why there is no more, with paths in the place.

    Where a module can't take a form, its children are searched by themselves.
    """
    traces = trace(place.outline)
    set_aside(place.outline, traces)
    rules = tuple(rule for rule in RULES.values() if rule.pattern.holds_in_training)
    views = Views(place.outline, traces, InputShapes(place.outline))
    yield place.path, None, [Skip(path, f"it can't be traced: {reason}") for path, reason in traces.untraced.items()]
    for island in traces.islands:
        reason = _refusal(place.model.get_submodule(island.path), island)
        if reason is None:
            inside = _below(parts, place.path, island.path)
            finder = _Finder(_LinearView.over(views.of(island), inside), island)
            near_misses = run_rules(finder, rules)
            yield place.path, finder, left_alone(finder, near_misses)
            continue
        yield place.path, None, [Skip(island.path, reason)]
        for child in place.children(island.path):
            yield from _searches(child, parts)


def _joined(path: str, inner: str) -> str:
    return f"{path}.{inner}" if path and inner else path or inner


def _below(paths: Collection[str], place: str, island: str) -> set[str]:
    """Return the paths that lie in an island of a place, as paths in the island."""
    around = _joined(place, island)
    prefix = f"{around}." if around else ""
    return {path.removeprefix(prefix) for path in paths if path.startswith(prefix)}


def _outline(model: nn.Module) -> nn.Module:
    """Return a copy without numbers, with a conv in the place of each block."""
    convs: dict[int, nn.Module] = {}
    for module in model.modules():
        if isinstance(module, RepBlock):
            like = module.conv.weight.detach().to("meta")
            convs[id(module)] = conv_module(module.site, like, bias=True, padded=True)
    outline: nn.Module = copy_without_numbers(model, convs)
    return outline


_ASKS_FOR_GRADIENTS = frozenset({"is_grad_enabled"})


def _refusal(root: nn.Module, island: Island) -> str | None:
    """Why a module can't take a form, or None."""
    if isinstance(root, fx.GraphModule):
        return "it is a graph already"
    if copies_itself(root):
        return f"{type(root).__name__} is copied or subclassed by code of its own"
    if not all(isinstance(value, _DropoutNd) for value in island.constants.values()):
        return "its code makes tensors that don't depend on the input"
    outside = next((node.meta[OUTSIDE] for node in island.graph.nodes if OUTSIDE in node.meta), None)
    if outside is not None:
        return f"its code calls a {outside} that is not installed as a submodule, and it may be exchanged unseen"
    classes = {type(module) for module in root.modules()}
    foreign = [cls for cls in classes if not cls.__module__.startswith(("torch.nn.", "repfx."))]
    if any(calls(cls, _ASKS_FOR_GRADIENTS) for cls in foreign):  # type: ignore[arg-type]
        return "code in it asks whether gradients are on, which a graph forgets"
    return None


@dataclass
class _LinearView(View):
    """A view in which rules touch only these parts, maps without tensors, and what was merged from them."""

    parts: Collection[str] = ()

    @classmethod
    def over(cls, view: View, parts: Collection[str]) -> _LinearView:
        """Return a view of the graph of `view` in which rules touch only `parts`."""
        return cls(
            view.root,
            view.graph,
            view.calls,
            view.registered,
            input_axes=view.input_axes,
            takes_ones=False,  # a region runs with one input
            parts=parts,
        )

    def op(self, node: fx.Node) -> Op | None:
        found = super().op(node)
        return found if found is not None and (node in self.kernels or self._is_touchable(found)) else None

    def sum_of(self, node: fx.Node) -> SumOf | None:
        found = super().sum_of(node)
        return found if found is not None and found.fixed else None

    def _is_touchable(self, op: Op) -> bool:
        module = self.module(op.node)
        if not op.meaning.lasts:
            return False
        if module is None:  # a constant among the arguments may be trained
            return not op.inner and len(op.node.all_input_nodes) == 1
        return str(op.node.target) in self.parts or not has_tensors(module)


@dataclass
class _Finder(Editor):
    """An editor that remembers the region of each merged node."""

    regions: dict[fx.Node, LinearRegion] = field(default_factory=dict)

    def apply(self, rule: Rule, match: Match) -> fx.Node:
        if all(op.meaning.kind == "identity" for op in match.ops):
            return super().apply(rule, match)
        region = LinearRegion.of(match, self._path(self._template(match)), self.regions)
        node = super().apply(rule, match)
        self.regions[node] = region
        return node


def _form(root: nn.Module, finder: _Finder, held: Collection[str]) -> SqueezedForm:
    """Return the form of a module, with code that calls each region that was found."""
    graph = finder.view.graph
    join(finder.view.root, graph)
    regions = {f"region_{index}": finder.regions[node] for index, node in enumerate(finder.merged)}
    for name, node in zip(regions, finder.merged):
        with graph.inserting_before(node):
            form = graph.get_attr(NAME)
            call = graph.call_method("run", (form, name, node.args[0]))
        node.replace_all_uses_with(call)
        graph.erase_node(node)
    inside = {path for region in regions.values() for path in region.modules}
    one_mode = _use_modes(graph, finder.island) if finder.island.constants else ()
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    inputs = sum(node is placeholders[0] or not node.args for node in placeholders)
    return SqueezedForm(root, _code_of(graph), inputs, regions, tuple(sorted(inside & {*held})), one_mode)


def _use_modes(graph: fx.Graph, island: Island) -> tuple[str, ...]:
    """Let dropout follow the mode of the root. Return the paths of the modules that must be in that mode, too: those whose code ran."""
    for node in list(graph.nodes):
        module: Any = island.constants.get(str(node.target)) if node.op == "call_module" else None
        if module is not None:
            with graph.inserting_before(node):
                training = graph.get_attr("training")
                call = graph.call_function(_FUNCTIONS[type(module)], (node.args[0], module.p, training, module.inplace))
            node.replace_all_uses_with(call)
            graph.erase_node(node)
    return tuple(sorted({outer for path in island.used for outer in outer_paths(path)}))


_FUNCTIONS: dict[type[nn.Module], Any] = {module: function for function, module in MODULES.items()}


def _code_of(graph: fx.Graph) -> Callable[..., Any]:
    code = graph.python_code("self")
    names: dict[str, Any] = dict(code.globals)
    exec(code.src, names)
    forward: Callable[..., Any] = names["forward"]
    return forward
