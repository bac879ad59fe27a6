"""`Editor`: the one place where rules change graphs. It replaces matches by nodes, lists its edits, and notes each node's origin."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from repfx.algebra.activated_norm import is_separated
from repfx.algebra.baking import conv_from_kernel, float64_like, rounded
from repfx.algebra.kernel import Kernel, Padding, is_symmetric
from repfx.algebra.layers import Layer, is_batch_norm
from repfx.blocks.block import RepBlock
from repfx.blocks.folded_norm import FoldedNorm, remember_norm
from repfx.graphs.bordered_padding import CLOSE
from repfx.graphs.checks import with_axes
from repfx.graphs.functional_conv import is_functional_conv, path_for, settings_of
from repfx.graphs.operations import Op
from repfx.graphs.sums import plus
from repfx.graphs.unused import erase_unused
from repfx.records.module_tree import called_by, has, outer_paths, set_part, set_submodule
from repfx.records.provenance import Provenance, attach
from repfx.records.report import Edit
from repfx.rewriting.carried import carriers_at
from repfx.rewriting.match import Match, Term, shape_before
from repfx.rewriting.rule import Rule
from repfx.rewriting.spelling import Spelling, spell
from repfx.rewriting.surroundings import Surroundings, remember_surroundings, with_steps
from repfx.rewriting.view import META, View
from repfx.tracing.trace import Island


@dataclass(frozen=True)
class Merged:
    """Notes on a node whose kernel rules have merged. The kernel itself is in the view.

    `axes` is how many axes the input gets, at least, because a merged constant gave them to the output.
    """

    template: Layer
    path: str
    provenance: Provenance
    spelling: Spelling
    axes: int = 0


@dataclass
class Editor:
    """An editor of the graph of one island, which writes the outcome into the island's module."""

    view: View
    island: Island
    merged: dict[fx.Node, Merged] = field(default_factory=dict)
    edits: list[Edit] = field(default_factory=list)
    _placed: list[str] = field(default_factory=list)
    _settled: set[fx.Node] = field(default_factory=set)

    @torch.no_grad()  # otherwise autograd would keep the operands of each product until the model is written
    def apply(self, rule: Rule, match: Match) -> fx.Node:
        """Replace a match by one node. Return that node, or the source of the match if the match was the identity."""
        nodes = [self._replace(rule, part) for part in (match, *match.others)]
        if match.carried is not None:
            self._pass_by(match.carried)
        self.view.graph_changed()
        return nodes[0]

    def _pass_by(self, carried: fx.Node) -> None:
        """Leave the place of a map, which convs elsewhere have taken over, to its input."""
        carried.replace_all_uses_with(carried.all_input_nodes[0])
        self.view.graph.erase_node(carried)

    def _replace(self, rule: Rule, match: Match) -> fx.Node:
        if all(op.meaning.kind == "identity" for op in match.ops):
            return self._remove(rule, match)
        template_op = self._template(match)
        first = match.ops[0].node
        # a kernel that an earlier rewrite has made, and that no other term reads
        owned = first in self.view.kernels and sum(op.node is first for op in match.ops) == 1
        kernel = _without_rounded_bias(match, float64_like(self._weight_of(template_op)), owned=owned)
        before = match.root if match.carried is not None else min(op.node for op in match.ops)
        graph = self.view.graph
        path = self._path(template_op)
        if is_functional_conv(template_op.node) and not has(self.view.root, path):
            set_submodule(self.view.root, path, conv_from_kernel(kernel, self._template_module(template_op), path))
            self._placed.append(path)
        with graph.inserting_before(before):
            source = self._beside_ones(match) if match.ones else match.source
            node = graph.call_module(path, (source,))
        self.view.set_shape(node, shape_before(match, self.view))
        self.view.kernels[node] = kernel
        self.merged[node] = self._merge_notes(rule, match, template_op, path)
        self._replace_root(match, node)
        self.edits.append(
            Edit(rule.name, self.island.full_path(str(node.target)), self.merged[node].provenance.sources)
        )
        return node

    def _beside_ones(self, match: Match) -> fx.Node:
        """Add the source of a match with a further channel of ones."""
        sides = (*(0, 0) * match.sizes()[1], 0, 1)
        return self.view.graph.call_function(F.pad, (match.source, sides), {"value": 1.0})

    def _remove(self, rule: Rule, match: Match) -> fx.Node:
        path = str(match.root.target) if match.root.op == "call_module" else match.root.name
        self.edits.append(Edit(rule.name, self.island.full_path(path)))
        match.root.replace_all_uses_with(match.source)
        for node in match.nodes:
            self.view.graph.erase_node(node)
        return match.source

    def _replace_root(self, match: Match, node: fx.Node) -> None:
        graph = self.view.graph
        total, needed = node, [source for old in match.nodes for source in old.all_input_nodes]
        with graph.inserting_before(match.root):
            for factor, term in match.remainder:
                total = plus(graph, total, factor, term)
        match.root.replace_all_uses_with(total)
        inside = set(match.nodes)
        for old, padding in match.cropped:
            if any(user not in inside for user in old.users):
                old.replace_all_uses_with(self._cropped(node, padding), lambda user: user not in inside)
        for old in match.nodes:  # users outside only ask for the shape (`used_once`), which `node` has too
            old.replace_all_uses_with(node, lambda user: user not in inside)
        for old in match.nodes:
            graph.erase_node(old)
            self.view.kernels.pop(old, None)
            self.merged.pop(old, None)
        erase_unused(graph, [source for source in needed if source not in inside])

    def _cropped(self, node: fx.Node, padding: Padding) -> fx.Node:
        """Add the value of a node without what was padded around it."""
        sides = tuple(-side for pair in reversed(padding) for side in pair)
        with self.view.graph.inserting_after(node):
            return self.view.graph.call_function(F.pad, (node, sides))

    def settle(self, node: fx.Node) -> None:
        """Finish the kernel that feeds `node`, at which no rule fired: round it to the dtype of its module.

        If `node` is not linear, nothing can merge with that kernel any more. If `node` reads a sum, the kernels of its terms are rounded.
        So only a few kernels at a time are in float64. A node that reads several others, such as a concatenation, may yet be merged.
        """
        if self.view.op(node) is not None or len(node.all_input_nodes) != 1 or carriers_at(node, self.view):
            return
        self._settled.add(node)
        pending = node.all_input_nodes
        while pending:
            source = pending.pop()
            if source in self._settled or any(user not in self._settled for user in source.users):
                continue
            if source in self.merged:
                self._round(source)
            elif self.view.sum_of(source) is not None or carriers_at(source, self.view):
                self._settled.add(source)
                pending += source.all_input_nodes

    def _round(self, node: fx.Node) -> None:
        kernel, dtype = self.view.kernels[node], self.merged[node].template.weight.dtype
        bias = None if kernel.bias is None else rounded(kernel.bias, dtype)
        self.view.set_kernel(node, replace(kernel, weight=rounded(kernel.weight, dtype), bias=bias))

    def _template(self, match: Match) -> Op:
        """Return the op whose module lends its path and settings to the merged conv: the first one with the largest window."""
        convs = [op for op in match.ops if self.view.is_conv(op.node)]
        return max(convs, key=lambda op: _window(self._template_module(op)))

    def _template_module(self, op: Op) -> Layer:
        if op.node in self.merged:
            return self.merged[op.node].template
        if is_functional_conv(op.node):
            return settings_of(op.node, self.view.root)
        return called_by(self.view.root, op.node)

    def _weight_of(self, op: Op) -> Tensor:
        weight: Tensor = self._template_module(op).weight
        return weight

    def _path(self, op: Op) -> str:
        if op.node in self.merged:
            return self.merged[op.node].path
        if is_functional_conv(op.node):
            return path_for(op.node, self.view.root, {notes.path for notes in self.merged.values()})
        return str(op.node.target)

    # ---- what the merged conv will carry

    def _merge_notes(self, rule: Rule, match: Match, template: Op, path: str) -> Merged:
        rules: dict[str, None] = {}
        sources: dict[str, None] = {}
        for op in match.ops:
            known = self.merged.get(op.node)
            rules.update(dict.fromkeys(known.provenance.rules if known else ()))
            own = tuple(self.island.full_path(str(node.target)) for node in op.nodes if node.op == "call_module")
            sources.update(dict.fromkeys(known.provenance.sources if known else own))
        rules[rule.name] = None
        provenance = Provenance(tuple(rules), tuple(sources), self._equals(match))
        axes = max(self._axes_of(term) for term in match.terms)
        spelled = {op.node: self.merged[op.node].spelling for op in match.ops if op.node in self.merged}
        spelling = spell(match, template, path, spelled, self.view, self.island)
        if match.carried is not None:
            spelling = replace(
                spelling, norm=None, reason=f"{match.carriers[-1].name!r} stands between it and its BatchNorm"
            )
        return Merged(self._template_module(template), path, provenance, spelling, axes)

    def _axes_of(self, term: Term) -> int:
        """Return the most axes of the constants in a path. Behind a BatchNorm, which demands a batch, constants add no axis."""
        axes = 0
        for op in term.ops:
            known, module = self.merged.get(op.node), self.view.module(op.node)
            axes = max(axes, self.view.axes_of_constants(op.node) if known is None else known.axes)
            if (module is not None and is_batch_norm(module)) or (
                known is not None and known.spelling.norm is not None
            ):
                break
        return axes

    def _equals(self, match: Match) -> str | None:
        last = match.terms[0].ops[-1]
        if (
            len(match.terms) > 1
            or match.remainder
            or match.root is not last.node
            or is_separated(self.view.module(last.node))
        ):
            return None
        if last.node in self.merged:
            return self.merged[last.node].provenance.equals
        return self.island.full_path(str(last.node.target)) if last.node.op == "call_module" else None

    # ---- back to modules

    def lower(self) -> None:
        """Write every merged kernel into a plain conv. A conv that is all that is left of a block takes the block's path."""
        # scales, shifts, and everything that weights were computed from
        erase_unused(self.view.graph, self.view.graph.nodes, self.view.constants.depends_on_parameters_alone)
        inside, parts = self._calls_inside(), self._parts_in_use()
        for node, notes in self.merged.items():
            kernel = self.view.kernels[node]
            self.view.kernels[node] = kernel.to(META)  # so that the numbers are freed as soon as they are written
            block_path = self._block_path(node, inside)
            path = notes.path if block_path is None else block_path
            conv = conv_from_kernel(kernel, notes.template, self.island.full_path(path))
            attach(conv, self._final_provenance(notes, block_path))
            self._remember(conv, notes, path, block_path)
            if notes.axes == kernel.weight.ndim:
                self._give_axes(node, notes.axes)
            if not is_symmetric(kernel.padding) and not isinstance(conv.padding, str):
                self._pad_before(node, kernel)
            node.target = path or notes.path  # `path` is empty if the island itself is the block
            if block_path is None:
                _take_over(self.view.root.get_submodule(path), conv, parts[path])
            set_submodule(self.view.root, str(node.target), conv)
        self._remove_unused_places()

    def _remove_unused_places(self) -> None:
        """Remove the convs that the editor added at new paths and that have been merged into others since."""
        called = {node.target for node in self.view.graph.nodes if node.op == "call_module"}
        for path in self._placed:
            if path not in called:
                owner, _, name = path.rpartition(".")
                delattr(self.view.root.get_submodule(owner), name)

    def _calls_inside(self) -> Counter[str]:
        """Return how many nodes call or read something inside each module, by the module's path in the island."""
        called = (str(node.target) for node in self.view.graph.nodes if node.op in ("call_module", "get_attr"))
        return Counter(path for target in called for path in outer_paths(target))

    def _parts_in_use(self) -> defaultdict[str, list[str]]:
        """Return the paths, inside each module, of all that nodes call or read there, by the module's path."""
        found: defaultdict[str, list[str]] = defaultdict(list)
        for node in self.view.graph.nodes:
            target = str(node.target)
            for path in outer_paths(target) if node.op in ("call_module", "get_attr") else ():
                found[path].append(target.removeprefix(f"{path}."))
        return found

    def _block_path(self, node: fx.Node, inside: Counter[str]) -> str | None:
        """Return the path of the outermost block of which `node` is all that is left, or None."""
        for path in outer_paths(str(node.target)):
            if not path and not self.island.path:
                continue
            if inside[path] == 1 and isinstance(self.view.root.get_submodule(path), RepBlock):
                return path
        return None

    def _final_provenance(self, notes: Merged, block_path: str | None) -> Provenance:
        if block_path is None or notes.provenance.equals is not None:
            return notes.provenance
        return replace(notes.provenance, equals=self.island.full_path(block_path))

    def _remember(self, conv: nn.Module, notes: Merged, path: str, block_path: str | None) -> None:
        """Record on a conv what `restore` has to know: the BatchNorm that the conv absorbed, and what else the model computes there."""
        spelling, bias = notes.spelling, notes.template.bias is not None
        if spelling.norm is not None:
            remember_norm(conv, replace(self._final_norm(spelling.norm, path, block_path), bias=bias))
        if not spelling.is_plain:
            around = Surroundings(self.island.full_path(path), bias, spelling.form, notes.template.weight.dtype)
            remember_surroundings(conv, self._spelled_out(around, spelling))

    def _spelled_out(self, around: Surroundings, spelling: Spelling) -> Surroundings:
        if spelling.reason:
            return replace(around, reason=spelling.reason)
        return with_steps(around, spelling.steps, self.view.root, self.island.full_path("x").removesuffix("x"))

    def _final_norm(self, norm: FoldedNorm, path: str, block_path: str | None) -> FoldedNorm:
        conv = self.island.full_path(path)
        if block_path is not None and norm.norm.startswith(f"{conv}."):
            block: Layer = self.view.root.get_submodule(block_path)
            place = block.norm_path or block.norm_behind
            if place is not None:
                norm = replace(norm, norm=place)
        return replace(norm, conv=conv)

    def _give_axes(self, node: fx.Node, axes: int) -> None:
        with self.view.graph.inserting_before(node):
            node.args = (self.view.graph.call_function(with_axes, (node.args[0], axes)),)

    def _pad_before(self, node: fx.Node, kernel: Kernel) -> None:
        """Pad in front of a conv whose two sides need different padding, because torch's convs pad both sides alike."""
        grow = [max(side, 0) for pair in reversed(kernel.padding) for side in pair]
        crop = [min(side, 0) for pair in reversed(kernel.padding) for side in pair]
        source = node.args[0]
        with self.view.graph.inserting_before(node):
            if any(grow):
                mode = "constant" if kernel.padding_mode == "zeros" else kernel.padding_mode
                source = self.view.graph.call_function(F.pad, (source, tuple(grow)), {"mode": mode})
            if any(crop):
                source = self.view.graph.call_function(F.pad, (source, tuple(crop)))
        node.args = (source,)


def _without_rounded_bias(match: Match, like: Tensor, *, owned: bool) -> Kernel:
    """Return the kernel of a match. Leave out its bias if that is only the rounding error of shifts that cancel."""
    kernel = match.kernel(like, owned=owned)
    if kernel.bias is None or kernel.bias.is_meta or len(match.ops) < 2:
        return kernel
    largest = max((float(shift.detach().abs().max()) for shift in match.shifts(like) if shift.numel()), default=0.0)
    cancelled = largest > 0 and float(kernel.bias.detach().abs().max()) <= CLOSE * largest
    return replace(kernel, bias=None) if cancelled else kernel


def _take_over(owner: nn.Module, conv: nn.Module, paths: Iterable[str]) -> None:
    """Give a conv those parts of the module whose place it takes that it has no counterpart of, such as an activation."""
    for path in sorted(paths, key=len):  # a part comes before what lies inside it
        if not has(conv, path):
            set_part(conv, path, owner)


def _window(module: nn.Module) -> int:
    return math.prod(getattr(module, "kernel_size", ()))
