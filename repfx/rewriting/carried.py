"""The pattern of a BatchNorm and a conv that only carriers stand between, and concatenations of such.

The BatchNorm leaves the graph: the nodes behind it read its input. The conv takes its scale and shift over, for each of its own channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, TypeAlias

import torch.nn.functional as F
from torch import Tensor, fx

from repfx.algebra.kernel import Kernel, NoKernel
from repfx.algebra.layers import is_batch_norm
from repfx.algebra.meaning import Meaning
from repfx.graphs.carriers import Carrier, Place, part_of, read_carrier, slice_of
from repfx.graphs.operations import Op, split
from repfx.graphs.vocabulary import CONCATENATIONS, listed
from repfx.rewriting.match import Match, Term
from repfx.rewriting.paths import channels_of
from repfx.rewriting.patterns import Pattern
from repfx.rewriting.view import META, View

# what becomes of numbers per channel elsewhere, given the number for channels that come from other nodes
_Put: TypeAlias = Callable[[Tensor, float], Tensor]


@dataclass(frozen=True)
class _Path:
    """A way from one linear map to another node, over carriers.

    Args:
        op: where it starts.
        carriers: what the nodes on the way do with the channels, the first one first.
        nodes: the first node and those on the way.
        channels: number of channels at its end; None if they aren't those of the start.
    """

    op: Op
    carriers: tuple[Carrier, ...]
    nodes: tuple[fx.Node, ...]
    channels: int | None

    def over(self, carrier: Carrier, node: fx.Node) -> _Path:
        channels = self.channels if carrier.keeps_channels else None
        return replace(self, carriers=(*self.carriers, carrier), nodes=(*self.nodes, node), channels=channels)

    def leads(self, first: Place, last: Place) -> bool:
        """Whether channels that start at one place arrive at the other."""
        place: Place | None = first
        for carrier in self.carriers:
            place = None if place is None else carrier.move(place)
        return place == last


@dataclass(frozen=True)
class NormApart(Pattern):
    """A BatchNorm and a conv with carriers between them, whichever of the two comes first. A match is found at the later one.

    The BatchNorm may also come behind the concatenated outputs of several convs, and its own output may be concatenated with others.
    """

    holds_in_training: ClassVar[bool] = False

    def matches(self, node: fx.Node, view: View) -> Iterator[Match]:
        yield from self._behind(node, view)
        yield from self._in_front(node, view)

    def _behind(self, node: fx.Node, view: View) -> Iterator[Match]:
        norm = _norm_at(node, view)
        paths = None if norm is None else _paths_from_convs(norm.source, view)
        if norm is None or not paths or not paths[0].carriers or _is_seen_through_a_view(node, view):
            return
        if all(view.op(each) is not None for path in paths for each in path.nodes) and _enters_a_sum(node, view):
            return  # the sum takes poolings, too
        last = _place_of(norm, view)
        if last is None or not all(_starts_right(path, last, view) for path in paths):
            return
        matches = [_match_before(path, norm) for path in paths]
        yield replace(matches[0], others=tuple(matches[1:]))

    def _in_front(self, node: fx.Node, view: View) -> Iterator[Match]:
        conv = view.op(node)
        if conv is None or conv.meaning.kind != "conv":
            return
        for path in _paths_from_norms(conv.source, view):
            first = _place_of(path.op, view)
            if first is None or not path.carriers or any(carrier.after is None for carrier in path.carriers):
                continue
            if any(path.leads(first, last) for last in _places(conv, first)):
                moved = _moved(path.op, [_put_after(carrier) for carrier in path.carriers], conv.meaning.in_channels)
                yield Match(node, conv.source, (Term((moved, conv)),), carried=path.op.node, carriers=path.nodes[1:])


def _norm_at(node: fx.Node, view: View) -> Op | None:
    op, module = view.op(node), view.module(node)
    return op if op is not None and module is not None and is_batch_norm(module) else None


def _place_of(norm: Op, view: View) -> Place | None:
    """Return where a BatchNorm has its channels, or None if the number of axes isn't known."""
    dimensions = norm.meaning.dimensions
    axes = view.input_axes(str(norm.node.target)) if dimensions is None else dimensions + 2
    return None if axes is None else Place(1, axes)


def _places(conv: Op, end: Place) -> list[Place]:
    """Return where the input and the output of a conv may have their channels. A linear layer takes any number of axes."""
    dimensions = conv.meaning.dimensions or 0
    return [Place(1, dimensions + 2)] if dimensions else [Place(axes - 1, axes) for axes in range(2, 6)]


def _starts_right(path: _Path, last: Place, view: View) -> bool:
    known = all(carrier.before is not None for carrier in path.carriers)
    return known and any(path.leads(first, last) for first in _places(path.op, last))


def _paths_from_convs(node: fx.Node, view: View) -> list[_Path] | None:
    """Return the ways to a node from the convs at which they all start, or None if one starts elsewhere."""
    op = view.op(node)
    if op is not None and op.meaning.kind == "conv":
        try:
            kernel = op.meaning.build(META, op.meaning.in_channels or 0, op.meaning.dimensions or 0)
        except NoKernel:
            return None
        return [_Path(op, (), (node,), kernel.out_channels)]
    if node.target in CONCATENATIONS:
        return _paths_through_parts(node, view)
    carriers = carriers_at(node, view)
    found = _paths_from_convs(_input_of(node), view) if carriers else None
    for carrier in carriers or ():
        found = None if found is None else [path.over(carrier, node) for path in found]
    return found


def _paths_through_parts(node: fx.Node, view: View) -> list[_Path] | None:
    parts, axis = listed(node)
    if not parts or not all(isinstance(part, fx.Node) for part in parts):
        return None
    paths: list[_Path] = []
    start = 0
    for part in parts:
        found = _paths_from_convs(part, view)
        if found is None or any(path.channels is None for path in found):
            return None
        stop = start + sum(path.channels or 0 for path in found)
        paths += [replace(path.over(slice_of(axis, start, stop), node), channels=path.channels) for path in found]
        start = stop
    return paths


def _paths_from_norms(node: fx.Node, view: View) -> list[_Path]:
    """Return the ways to a node from BatchNorms."""
    norm = _norm_at(node, view)
    if norm is not None:
        return [_Path(norm, (), (node,), None)]
    if node.target in CONCATENATIONS:
        return _paths_over_concatenation(node, view)
    carriers = carriers_at(node, view)
    found = _paths_from_norms(_input_of(node), view) if carriers else []
    for carrier in carriers:
        found = [path.over(carrier, node) for path in found]
    return found


def _paths_over_concatenation(node: fx.Node, view: View) -> list[_Path]:
    """Return the ways to a concatenation from BatchNorms, over one part each, if the channels of all other parts are known."""
    parts, axis = listed(node)
    if not all(isinstance(part, fx.Node) for part in parts):
        return []
    found: list[_Path] = []
    for place, part in enumerate(parts):
        for path in _paths_from_norms(part, view) if parts.count(part) == 1 else ():
            first = _place_of(path.op, view)
            dimensions = 0 if first is None else first.axes - 2
            counts = [channels_of(other, dimensions, view) for other in parts if other is not part]
            if dimensions and None not in counts:
                before, behind = sum(counts[:place]), sum(counts[place:])  # type: ignore[arg-type]
                found.append(path.over(part_of(axis, before, behind), node))
    return found


def carriers_at(node: fx.Node, view: View) -> tuple[Carrier, ...]:
    """Return what a node does as one carrier, or as several if it calls a module whose code does that; none if it does anything else."""
    if not isinstance(split(node)[0], fx.Node) or view.refusal(node):
        return ()
    carrier = read_carrier(node, view.root)
    if carrier is not None:
        return (carrier,)
    code = view.code(node)
    found: list[Carrier] = []
    inner = None if code is None else code.result
    while code is not None and inner is not None and inner is not code.source:
        carrier = read_carrier(inner, code.module)
        if carrier is None:
            return ()
        found.insert(0, carrier)
        inner = _input_of(inner)
    return tuple(found)


def _input_of(carrier: fx.Node) -> fx.Node:
    """Return the first argument of a node. Others may hold sizes."""
    source: fx.Node = split(carrier)[0]
    return source


def _match_before(path: _Path, norm: Op) -> Match:
    moved = _moved(norm, [_put_before(carrier) for carrier in reversed(path.carriers)], None)
    terms = (Term((path.op, moved)),)
    return Match(path.op.node, path.op.source, terms, carried=norm.node, carriers=path.nodes[1:])


def _put_before(carrier: Carrier) -> _Put:
    return lambda numbers, _: numbers if carrier.before is None else carrier.before(numbers)


def _put_after(carrier: Carrier) -> _Put:
    def put(numbers: Tensor, other: float) -> Tensor:
        whole = F.pad(numbers, carrier.around, value=other)
        return whole if carrier.after is None else carrier.after(whole)

    return put


def _moved(norm: Op, functions: list[_Put], channels: int | None) -> Op:
    """Return a BatchNorm's map in another place, where its numbers are what these functions make of them, one after another."""

    def build(like: Tensor, count: int, dimensions: int) -> Kernel:
        kernel = norm.meaning.build(like, norm.meaning.in_channels or 0, dimensions)
        scale, shift = kernel.weight.reshape(-1), kernel.bias
        for function in functions:
            scale, shift = function(scale, 1.0), None if shift is None else function(shift, 0.0)
        return Kernel.diagonal(scale, shift, dimensions)

    return replace(norm, meaning=Meaning("affine", None, channels, build))


def _is_seen_through_a_view(node: fx.Node, view: View) -> bool:
    """Whether a node behind a BatchNorm is read as one map together with it."""
    ops = (view.op(user) for user in node.users)
    return any(op is not None and node in op.inner for op in ops)


def _enters_a_sum(node: fx.Node, view: View) -> bool:
    while len(node.users) == 1:
        node = next(iter(node.users))
        if view.sum_of(node) is not None:
            return True
        if view.op(node) is None:
            return False
    return False
