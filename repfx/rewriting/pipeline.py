"""The run of rules over every island of a model, to a fixpoint; and the verbs that the passes offer."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import fx, nn

from repfx.algebra.cost import Cost, weights
from repfx.algebra.layers import has_modes_of_its_own, is_batch_norm, is_plain_sequence
from repfx.blocks.cropped_conv import unshare
from repfx.blocks.own_fusing import give_methods_back
from repfx.blocks.squeezed_form import release_all
from repfx.graphs.unused import erase_unused
from repfx.records.generators import random_state_kept
from repfx.records.journal import forget
from repfx.records.modes import set_modes
from repfx.records.module_tree import module_paths
from repfx.records.notes import copy_of
from repfx.records.report import Edit, Note, Report, Skip
from repfx.records.wrappers import innermost, require_layers
from repfx.rewriting.computed_weights import fix_weights
from repfx.rewriting.editor import Editor
from repfx.rewriting.explanation import UNTRACED, all_that_stays, left_alone, left_outside
from repfx.rewriting.input_shapes import InputShapes
from repfx.rewriting.installation import install, prepare
from repfx.rewriting.patterns import FunctionalConv
from repfx.rewriting.rule import PASSES as PASSES
from repfx.rewriting.rule import Pass, Rule
from repfx.rewriting.view import View
from repfx.tracing.aliases import put_back, set_aside
from repfx.tracing.trace import Island, Traces, call_counts, trace


def verb(function: Callable[..., Any]) -> Callable[..., Any]:
    """Register a function on models as a pass of its name, described by the first line of its docstring.

    Its results are ordinary tensors, which can be trained, even if the caller is in `torch.inference_mode()`. Of a compiled, parallel or
    averaged model, the module inside is meant; a new model has no such wrapper. Random numbers go on afterwards as if it had
    not been called.
    """
    Pass(function.__name__, (function.__doc__ or "").strip().splitlines()[0].rstrip("."))

    @wraps(function)
    def checked(model: nn.Module, *args: Any, **options: Any) -> Any:
        require_layers(model)
        inner = innermost(model)
        with random_state_kept(inner):
            result = function(inner, *args, **options)
        return model if result is inner else result

    return torch.inference_mode(False)(checked)


@dataclass(frozen=True)
class Result:
    """A rewritten model and the report of what was done to it."""

    model: nn.Module
    report: Report


def rewrite(
    model: nn.Module,
    rules: Iterable[Rule],
    name: str,
    *,
    given: Mapping[str, Any] | None = None,
    cost: Cost = weights,
) -> Result:
    """Run rules over a copy of the model until none applies.

    Each rewrite removes a node, and the rules go on from the place of the rewrite, so the cost is linear.

    Args:
        given: what a caller gives the model, by the name of the argument, as for `trace`.
        cost: the cost of a conv, by which rules decide which convs become one.
    """
    own = {} if any(map(has_modes_of_its_own, model.modules())) else _sharing_memory(model)
    shared = [weakref.ref(weight) for weight in own.values()]
    target = copy_of(model, own)
    del own
    result = _rewrite(target, model, tuple(rules), name, given, cost)
    for reference in shared:
        if (weight := reference()) is not None:  # a weight that has been merged is gone
            weight.data = weight.data.clone()
    return result


def _sharing_memory(model: nn.Module) -> dict[int, nn.Parameter]:
    """Return, for each parameter of a model, another one with the same memory, by the id of the first."""
    return {
        id(weight): nn.Parameter(weight.detach(), weight.requires_grad)
        for weight in model.parameters()
        if type(weight) is nn.Parameter and not weight.is_inference()
    }


def _rewrite(
    target: nn.Module,
    model: nn.Module,
    rules: tuple[Rule, ...],
    name: str,
    given: Mapping[str, Any] | None,
    cost: Cost,
) -> Result:
    """Rewrite `target`, a copy of `model` that has been made already."""
    release_all(target)
    target.eval()  # a parametrized weight may change when it is read in training mode
    fix_weights(target)
    for module in list(target.modules()):
        unshare(module)
    traces = trace(target, given, composed=any(isinstance(rule.pattern, FunctionalConv) for rule in rules))
    set_aside(target, traces)
    views = Views(target, traces, InputShapes(model, given), cost)
    edits: list[Edit] = []
    kept: list[Skip] = []
    skips: list[Skip] = [
        Skip(path, f"it can't be traced: {reason}", "trace") for path, reason in traces.untraced.items()
    ]
    for island in traces.islands:
        editor = Editor(views.of(island), island)
        near_misses = run_rules(editor, rules)
        edits += editor.edits
        skips += left_alone(editor, near_misses)
        editor.lower()
        kept += all_that_stays(editor, near_misses)
        target = install(target, island)
    put_back(target)
    give_methods_back(target)
    outside = list(left_outside(target, traces))
    skips += [s for s in outside if s.reason == UNTRACED and is_batch_norm(target.get_submodule(s.path))]
    kept += outside
    optional = {rule.name for rule in rules if rule.optional}
    declined = tuple(skip for skip in dict.fromkeys(skips) if skip.rule in optional)
    skipped = tuple(skip for skip in dict.fromkeys(skips) if skip.rule not in optional)
    take_over_modes(target, model)
    forget(target)
    notes = tuple(Note(path, text) for path, text in traces.notes.items())
    return Result(target, Report(name, tuple(edits), skipped, declined, tuple(dict.fromkeys(kept)), notes))


class Views:
    """The views of the islands of a traced model. `shapes` are those of the model of which it is a copy."""

    def __init__(self, model: nn.Module, traces: Traces, shapes: InputShapes, cost: Cost = weights) -> None:
        self._model = model
        self._calls = call_counts(traces)
        self._registered = module_paths(model)
        self._shapes = shapes
        self._cost = cost

    def of(self, island: Island) -> View:
        """Return the view of one island, after preparing the island's module for its graph."""
        root = self._model.get_submodule(island.path)
        prepare(root, island)
        paths = {path: self._registered.get(id(module), []) for path, module in root.named_modules()}
        calls = Counter({path: self._calls[island.full_path(path)] for path in paths})
        names = Counter({path: len(names) for path, names in paths.items()})
        return View(
            root,
            island.graph,
            calls,
            names,
            input_axes=lambda path: self._shapes.axes(island.full_path(path)),
            input_shape=lambda path: self._shapes.of(island.full_path(path)),
            cost=self._cost,
            inputs={} if island.path else self._shapes.given,
            takes_ones=not (island.path and is_plain_sequence(root)),  # code around it may index its layers
        )


def run_rules(editor: Editor, rules: tuple[Rule, ...]) -> dict[fx.Node, list[Skip]]:
    """Rewrite to a fixpoint. Return, by node, why rules whose pattern was there did not fire."""
    near_misses: dict[fx.Node, list[Skip]] = {}
    erase_unused(editor.view.graph, editor.view.graph.nodes)
    node = next(iter(editor.view.graph.nodes))
    while node.op != "root":
        near_misses.pop(node, None)
        for rule in rules:
            found = rule.find(node, editor.view)
            if isinstance(found, Skip):
                near_misses.setdefault(node, []).append(found)
            elif found is not None:
                node = editor.apply(rule, found)
                break
        else:
            editor.settle(node)
            node = node.next
    return near_misses


def take_over_modes(model: nn.Module, original: nn.Module) -> None:
    """Give each module the mode of the original module at its path, or else of the innermost original module around that path."""
    known = {path: module.training for path, module in original.named_modules()}
    modes = []
    for path, module in model.named_modules():
        while path not in known:
            path = path.rpartition(".")[0]
        modes.append((module, known[path]))
    set_modes(modes)
