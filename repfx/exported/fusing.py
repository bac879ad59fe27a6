"""`fuse_exported`: the fused form of a program of `torch.export`, or of a graph module of ATen operators, by the rules of `fuse`."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from repfx.algebra.cost import Cost, weights
from repfx.errors import InvalidInput
from repfx.exported.lowering import lowered
from repfx.exported.operators import conv_call
from repfx.exported.raising import Raised, call_counts, raised
from repfx.exported.result import module_of, program_of
from repfx.exported.source import Source
from repfx.graphs.operations import Op
from repfx.measuring.in_float64 import Inputs
from repfx.measuring.proof import prove
from repfx.records.report import Report
from repfx.records.wrappers import innermost, is_aten_graph
from repfx.rewriting.editor import Editor, Merged
from repfx.rewriting.explanation import all_that_stays, left_alone
from repfx.rewriting.pipeline import run_rules
from repfx.rewriting.rule import Rule
from repfx.rewriting.view import View
from repfx.tracing.trace import Island

Exported: TypeAlias = "ExportedProgram | fx.GraphModule"


def is_exported(model: object) -> bool:
    """Whether a model is a program of `torch.export`, or a graph of ATen operators.

    >>> is_exported(torch.export.export(nn.ReLU(), (torch.ones(2),))), is_exported(nn.ReLU())
    (True, False)
    """
    return isinstance(model, ExportedProgram) or (isinstance(model, fx.GraphModule) and is_aten_graph(model))


def takes_exported(rules: Mapping[str, Rule]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator by which `fuse` on modules also takes programs and graphs of ATen operators, and runs these rules on them."""

    def decorated(fuse: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(fuse)
        def either(model: Any, *args: Any, **options: Any) -> Any:
            inner: Any = innermost(model) if isinstance(model, nn.Module) else model
            if not is_exported(inner):
                return fuse(model, *args, **options)
            with torch.inference_mode(False):
                return fuse_exported(inner, rules.values(), *args, **options)

        return either

    return decorated


def fuse_exported(
    model: Exported, rules: Iterable[Rule], *, example: Inputs | None = None, cost: Cost = weights, strict: bool = False
) -> Exported:
    """Return the fused form of a program or a graph of ATen operators. The arguments are those of `fuse`.

    Raises:
        InvalidInput: there is no conv or linear layer, or a merged weight isn't finite.
        Refused: with `strict`, something was left alone; EquivalenceError: the output on `example` would change.
    """
    source = Source.of_program(model) if isinstance(model, ExportedProgram) else Source.of_module(model)
    if not any(map(conv_call, source.graph.nodes)):
        raise InvalidInput("the program has no conv or linear layer, so there is nothing to fuse.")
    graph = raised(source)
    editor, report = _rewritten(graph, source, tuple(rules), cost)
    if strict:
        report.require_all()
    convs = {node: editor.templates.get(notes.path) for node, notes in editor.merged.items()}
    low = lowered(source, graph, convs)
    result = program_of(model, source, low) if isinstance(model, ExportedProgram) else module_of(model, source, low)
    if example is not None:
        prove("fuse", _as_module(model), _as_module(result), example)
    report.attach(result)  # type: ignore[arg-type]  # a program carries it as a module does
    return result


def _as_module(model: Exported) -> nn.Module:
    """Return a program as a module that can be called and copied. Hooks that check its inputs can't be copied, so it has none."""
    module: Any = model.module() if isinstance(model, ExportedProgram) else model
    return fx.GraphModule(module, copy.deepcopy(module.graph))


def _rewritten(graph: Raised, source: Source, rules: tuple[Rule, ...], cost: Cost) -> tuple[_Editor, Report]:
    """Run rules over a raised graph, in place. Return the editor that has changed it, and what was done."""
    island = Island("", graph.graph)
    calls = call_counts(graph)
    view = View(
        graph.root,
        graph.graph,
        calls,
        Counter(dict.fromkeys(calls, 1)),
        input_axes=graph.axes,
        input_shape=graph.shape,
        cost=cost,
        inputs=_inputs(source),
    )
    editor = _Editor(view, island, origins=graph.origins)
    near_misses = run_rules(editor, rules)
    skips = [*graph.skips, *left_alone(editor, near_misses)]
    editor.lower()
    stays = [*graph.skips, *all_that_stays(editor, near_misses)]
    optional = {rule.name for rule in rules if rule.optional}
    declined = tuple(skip for skip in dict.fromkeys(skips) if skip.rule in optional)
    skipped = tuple(skip for skip in dict.fromkeys(skips) if skip.rule not in optional)
    return editor, Report("fuse", tuple(editor.edits), skipped, declined, tuple(dict.fromkeys(stays)))


def _inputs(source: Source) -> dict[str, Tensor]:
    """Return the inputs whose number of channels is fixed, without numbers. Free sizes don't count."""
    found = {}
    for node in source.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and node not in source.names and isinstance(value, Tensor):
            shape = [size if isinstance(size, int) else 0 for size in value.shape]
            found[node.name] = torch.empty(shape, dtype=value.dtype, device="meta")
    return found


@dataclass
class _Editor(Editor):
    """An editor that knows the node of the source whose place each merged conv takes, by the conv's path."""

    origins: Mapping[fx.Node, fx.Node] = field(default_factory=dict)
    templates: dict[str, fx.Node] = field(default_factory=dict)

    def _path(self, op: Op) -> str:
        path = super()._path(op)
        if op.node in self.origins:
            self.templates.setdefault(path, self.origins[op.node])
        return path

    def _remember(self, conv: nn.Module, notes: Merged, path: str, block_path: str | None) -> None:
        """Record nothing: `restore` doesn't take programs."""
