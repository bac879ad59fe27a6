"""`Spelling`: how a model spells out a merged kernel: the site's own conv, its BatchNorm, and the steps around them.

`spell` copies the nodes of a match into a graph of their own, in which two nodes stand for the site: its own conv with everything that
belongs to it, and the BatchNorm behind it. All that lies in the site's block belongs to it. So do convs and BatchNorms of other sites: they
leave the state dict when they are merged, so their class can't load it strictly. A BatchNorm in front of the conv is a step like any scale.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from typing import Any

from torch import fx, nn

from repfx.algebra.kernel import Kernel
from repfx.algebra.layers import BATCH_NORMS, KERNEL_LAYERS, Layer, is_batch_norm, is_frozen_norm
from repfx.algebra.meaning import torch_class
from repfx.algebra.moments import Moments
from repfx.blocks.block import RepBlock
from repfx.blocks.folded_norm import FoldedNorm
from repfx.graphs.functional_conv import is_functional_conv, owner_of, reads_its_own_weight, reads_saved_weight
from repfx.graphs.operations import Op
from repfx.graphs.sums import plus
from repfx.records.module_tree import called_by, outer_paths
from repfx.rewriting.match import Match, Term
from repfx.rewriting.surroundings import CONV, NORM
from repfx.rewriting.view import META, View
from repfx.tracing.trace import Island

_PADS = "pads"  # marks a step that only pads or crops


@dataclass(frozen=True)
class Spelling:
    """How a model spells out a merged kernel.

    Args:
        steps: a graph from the input of the merged conv to its output.
        form: kernel of the site's own conv without its numbers.
        norm: the BatchNorm behind the site's own conv, or None.
        reason: why the steps can't be told apart; empty if they can.
    """

    steps: fx.Graph
    form: Kernel
    norm: FoldedNorm | None
    reason: str = ""

    @property
    def is_plain(self) -> bool:
        """Whether the model computes nothing around the site, except padding and cropping, which have no influence on the weight."""
        nodes = [node for node in self.steps.nodes if node.op not in ("placeholder", "output")]
        return not self.reason and all(node.target in (CONV, NORM) or _PADS in node.meta for node in nodes)


def spell(
    match: Match, template: Op, path: str, known: Mapping[fx.Node, Spelling], view: View, island: Island
) -> Spelling:
    """Return how the model spells out a match.

    Args:
        template: the map of the match whose place the merged conv takes.
        path: the path of the merged conv.
        known: the spelling of each node that earlier rewrites have made.
    """
    site = _Site(match, template, path, known, view, island)
    inherited = next((known[op.node].reason for op in match.ops if op.node in known), "")
    others = [op for op in site.own if op is not template and op is not site.norm]
    if not others:
        return _spelled(site, inherited or site.refusal)
    if site.is_apart:
        return _collapsed(site, inherited)
    inside = all(site.lies_in_block(op.node) for op in others)
    return _whole(site, inherited or ("only a part of its block is merged with it" if inside else ""))


def _spelled(site: _Site, reason: str) -> Spelling:
    """Return the spelling of a match in which the site is one conv, and perhaps a BatchNorm behind it."""
    known = site.known.get(site.template.node)
    norm = site.norm_of(site.template if site.norm is None else site.norm)
    steps = _sum(site, [(term.factor, term) for term in site.match.terms])
    return Spelling(steps, site.form if known is None else known.form, norm, reason)


def _collapsed(site: _Site, reason: str) -> Spelling:
    """Return the spelling in which one conv and one BatchNorm stand for the terms of the site, and the other terms are added to them."""
    factors, parts = next(iter(site.factors.values())), tuple({_identity(term): term for term in site.terms}.values())
    others = [(term.factor, term) for term in site.match.terms if term not in site.terms]
    norm = site.norm_of_terms(parts)
    steps = _sum(site, [*((factor, None) for factor in factors), *others], normed=norm is not None)
    form = site.match.form if parts == site.match.terms else replace(site.match, terms=parts).form
    return Spelling(steps, form, norm, reason)


def _whole(site: _Site, reason: str) -> Spelling:
    """Return the spelling in which one conv and one BatchNorm stand for the whole match."""
    norm = site.norm_of_terms(site.match.terms)
    return Spelling(_sum(site, [(1, None)], normed=norm is not None), site.match.form, norm, reason)


# ---- what belongs to a site


@dataclass(frozen=True)
class _Site:
    """A site in a match: the arguments of `spell`, and what belongs to the site."""

    match: Match
    template: Op
    path: str
    known: Mapping[fx.Node, Spelling]
    view: View
    island: Island

    @cached_property
    def block(self) -> str | None:
        """The path of the outermost block around the site, or None."""
        paths = outer_paths(self.path)
        return next((path for path in paths if isinstance(self.view.root.get_submodule(path), RepBlock)), None)

    def lies_in_block(self, node: fx.Node) -> bool:
        """Whether a node calls a module of the block, or comes from code inside it."""
        if self.block is None:
            return False
        path = str(node.target) if node.op == "call_module" else owner_of(node)
        return not self.block or f"{path}.".startswith(f"{self.block}.")

    @cached_property
    def own(self) -> tuple[Op, ...]:
        """The convs and BatchNorms of the match, but for BatchNorms in front of the site, and all that lies in the block."""
        ops = {id(op): op for op in self.match.ops}.values()
        return tuple(op for op in ops if self.lies_in_block(op.node) or self._is_layer(op))

    def _is_layer(self, op: Op) -> bool:
        in_front = _is_readable_norm(self.view.module(op.node)) and op in self.term.ops[: self._place]
        return not in_front and any(map(self._calls_layer, op.nodes))

    def _calls_layer(self, node: fx.Node) -> bool:
        module = self.view.module(node)
        return self.view.is_conv(node) or (module is not None and is_batch_norm(module))

    @cached_property
    def term(self) -> Term:
        """The term of the template."""
        return next(term for term in self.match.terms if self.template in term.ops)

    @property
    def _place(self) -> int:
        return self.term.ops.index(self.template)

    @cached_property
    def norm(self) -> Op | None:
        """The one BatchNorm that the match adds behind the site's own conv, which had none before; None if there are more."""
        norms = [op for op in self.term.ops[self._place + 1 :] if _is_readable_norm(self.view.module(op.node))]
        known = self.known.get(self.template.node)
        new = len(norms) == 1 and (known is None or known.norm is None) and not self.lies_in_block(norms[0].node)
        return norms[0] if new else None

    @cached_property
    def terms(self) -> tuple[Term, ...]:
        """The terms of the match that hold a part of the site; also the input itself where the sum inside the block adds it."""
        return tuple(term for term in self.match.terms if self._holds_part(term))

    def _holds_part(self, term: Term) -> bool:
        if term.ops:
            return any(op in self.own for op in term.ops)
        return term.adder is not None and self.lies_in_block(term.adder)

    @cached_property
    def factors(self) -> dict[tuple[int, ...], list[float]]:
        """The factors with which each of these terms enters the sum."""
        found: dict[tuple[int, ...], list[float]] = {}
        for term in self.terms:
            found.setdefault(_identity(term), []).append(term.factor)
        return found

    @property
    def is_apart(self) -> bool:
        """Whether the terms of the site consist of nothing else, and all enter the sum alike, so that one conv can stand for them."""
        first, *others = map(sorted, self.factors.values())
        return all(op in self.own for term in self.terms for op in term.ops) and all(o == first for o in others)

    @property
    def form(self) -> Kernel:
        """The kernel of the template without its numbers."""
        channels, dimensions = self.match.sizes()
        meaning = self.template.meaning
        return meaning.build(META, meaning.in_channels or channels, dimensions)

    @property
    def refusal(self) -> str:
        """Why a conv that stands alone isn't the map that its class computes from its weight; empty if it is."""
        node = self.template.node
        if node in self.known or self.lies_in_block(node):
            return ""
        if is_functional_conv(node):
            inside = owner_of(node) == self.path
            same = reads_its_own_weight(node) if inside else reads_saved_weight(node, self.view.root)
            return "" if same else "its weight is computed in forward"
        torch_s = torch_class(called_by(self.view.root, node))
        return "" if torch_s in KERNEL_LAYERS else "its class has a meaning of its own"

    # -- the BatchNorm

    def norm_of(self, op: Op) -> FoldedNorm | None:
        """Return the BatchNorm that an op is, or that was merged into it before."""
        if op.node in self.known:
            return self.known[op.node].norm
        module: Layer | None = self.view.module(op.node)
        if not _is_readable_norm(module):
            return None
        return FoldedNorm.of(module, self.island.full_path(str(op.node.target)))

    def norm_of_terms(self, terms: tuple[Term, ...]) -> FoldedNorm | None:
        """Return the BatchNorm of the template's term, with the moments of the sum of all these terms if they are known."""
        norms = [self._norm_of_term(term) for term in terms]
        own = next((norm for term, norm in zip(terms, norms) if self.template in term.ops), None)
        if own is None:
            return None
        known = [norm.moments for norm in norms if norm is not None and norm.moments is not None]
        return replace(own, moments=reduce(Moments.add, known) if len(known) == len(norms) else None)

    def _norm_of_term(self, term: Term) -> FoldedNorm | None:
        """Return the last BatchNorm of a path. Return None if there is none, or if a map other than the identity comes after it."""
        norm: FoldedNorm | None = None
        for op in term.ops:
            if op.meaning.kind != "identity":
                norm = self.norm_of(op)
        return norm


def _identity(term: Term) -> tuple[int, ...]:
    return tuple(map(id, term.ops))


def _is_readable_norm(module: nn.Module | None) -> bool:
    return module is not None and (torch_class(module) in BATCH_NORMS or is_frozen_norm(module))


# ---- steps as a graph


def _sum(site: _Site, terms: list[tuple[float, Term | None]], *, normed: bool = False) -> fx.Graph:
    """Return the graph of a sum of terms with their factors. None stands for the site; a term that occurs twice is computed once.

    Args:
        normed: whether the site has a BatchNorm.
    """
    graph = fx.Graph()
    x = graph.placeholder("x")
    values: dict[tuple[int, ...], fx.Node] = {}
    total: fx.Node | None = None
    for factor, term in terms:
        ops = (0,) if term is None else _identity(term)
        if ops not in values:
            values[ops] = _site(graph, x, normed=normed) if term is None else _term(site, graph, x, term)
        total = plus(graph, total, factor, values[ops])
    graph.output(total)
    return graph


def _site(graph: fx.Graph, x: fx.Node, *, normed: bool) -> fx.Node:
    conv = graph.call_module(CONV, (x,))
    return graph.call_module(NORM, (conv,)) if normed else conv


def _term(site: _Site, graph: fx.Graph, x: fx.Node, term: Term) -> fx.Node:
    for op in term.ops:
        if op is site.template and op.node in site.known:
            x = _inlined(graph, site.known[op.node].steps, x)
        elif op is site.template or op is site.norm:
            x = graph.call_module(CONV if op is site.template else NORM, (x,))
        elif op.meaning.kind != "identity":
            x = _copied(graph, op, x)
    return x


def _inlined(graph: fx.Graph, steps: fx.Graph, x: fx.Node) -> fx.Node:
    placeholder = next(node for node in steps.nodes if node.op == "placeholder")
    output: Any = graph.graph_copy(steps, {placeholder: x})
    assert isinstance(output, fx.Node)  # the one output of the steps
    return output


def _copied(graph: fx.Graph, op: Op, x: fx.Node) -> fx.Node:
    """Copy the nodes of an op, and the nodes that compute its constants, into a graph in which `x` is the op's source."""
    known = {op.source: x}

    def copied(node: fx.Node) -> fx.Node:
        if node not in known:
            known[node] = graph.node_copy(node, copied)
            known[node].target = _out_of_place(node)
            known[node].meta = {_PADS: True} if op.meaning.kind in ("pad", "crop") else {}
        return known[node]

    return copied(op.node)


_IN_PLACE: dict[Any, Any] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}


def _out_of_place(node: fx.Node) -> Any:
    """Return the target of a node, or if it writes into its first argument, the target that computes the same and doesn't."""
    if node.op == "call_method":
        return str(node.target).rstrip("_")
    return _IN_PLACE.get(node.target, node.target) if node.op == "call_function" else node.target
