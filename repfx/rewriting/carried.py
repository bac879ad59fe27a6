"""Matches of a BatchNorm and a conv that only carriers stand between, and concatenations of such.

The BatchNorm leaves the graph: the nodes behind it read its input. The conv takes its scale and shift over, for each of its own channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor, fx

from repfx.algebra.kernel import Kernel, NoKernel
from repfx.algebra.layers import is_batch_norm
from repfx.algebra.meaning import Meaning
from repfx.calls.carriers import Carrier, Numbers, Place, slice_of
from repfx.graphs.operations import Op, split
from repfx.graphs.vocabulary import ADDITIONS, CONCATENATIONS, SUBTRACTIONS
from repfx.rewriting.match import Match, Term
from repfx.rewriting.view import META, View


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


def norm_behind(norm: Op, view: View) -> Iterator[Match]:
    """Yield the match of a BatchNorm behind carriers of a conv's output, or of the concatenated outputs of several convs."""
    node = norm.node
    paths = _paths_from_convs(norm.source, view) if _is_norm(norm, view) else None
    if not paths or not paths[0].carriers or _is_seen_through_a_view(node, view):
        return
    if all(view.op(each) is not None for path in paths for each in path.nodes) and _enters_a_sum(node, view):
        return  # the sum takes poolings, too
    last = _place_of(norm, view)
    if last is None or not all(_starts_right(path, last) for path in paths):
        return
    matches = [_match_before(path, norm) for path in paths]
    yield replace(matches[0], others=tuple(matches[1:]))


def norm_in_front(conv: Op, view: View) -> Iterator[Match]:
    """Yield the match of a BatchNorm from which carriers lead to a conv."""
    path = _path_from_norm(conv.source, view)
    first = None if path is None or not path.carriers else _place_of(path.op, view)
    if path is None or first is None or not any(path.leads(first, last) for last in _places(conv)):
        return
    functions = [carrier.after for carrier in path.carriers]
    if None in functions:
        return
    moved = _moved(path.op, functions, conv.meaning.in_channels)  # type: ignore[arg-type]
    yield Match(conv.node, conv.source, (Term((moved, conv)),), carried=path.op.node, carriers=path.nodes[1:])


def _is_norm(op: Op, view: View) -> bool:
    module = view.module(op.node)
    return module is not None and is_batch_norm(module)


def _place_of(norm: Op, view: View) -> Place | None:
    """Return where a BatchNorm has its channels, or None if the number of axes isn't known."""
    dimensions = norm.meaning.dimensions
    axes = view.input_axes(str(norm.node.target)) if dimensions is None else dimensions + 2
    return None if axes is None else Place(1, axes)


def _places(conv: Op) -> list[Place]:
    """Return where the input and the output of a conv may have their channels. A linear layer takes any number of axes."""
    dimensions = conv.meaning.dimensions or 0
    return [Place(1, dimensions + 2)] if dimensions else [Place(axes - 1, axes) for axes in range(2, 6)]


def _starts_right(path: _Path, last: Place) -> bool:
    known = all(carrier.before is not None for carrier in path.carriers)
    return known and any(path.leads(first, last) for first in _places(path.op))


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
    carriers = view.carriers(node)
    found = _paths_from_convs(_input_of(node), view) if carriers else None
    for carrier in carriers or ():
        found = None if found is None else [path.over(carrier, node) for path in found]
    return found


def _paths_through_parts(node: fx.Node, view: View) -> list[_Path] | None:
    parts = node.args[0] if node.args else node.kwargs.get("tensors")
    axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis", 0))
    if not isinstance(parts, (list, tuple)) or not all(isinstance(part, fx.Node) for part in parts):
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


def _path_from_norm(node: fx.Node, view: View) -> _Path | None:
    """Return the way to a node from the BatchNorm at which it starts, or None."""
    norm = view.op(node)
    if norm is not None and _is_norm(norm, view):
        return _Path(norm, (), (node,), None)
    carriers = view.carriers(node)
    found = _path_from_norm(_input_of(node), view) if carriers else None
    for carrier in carriers or ():
        found = None if found is None else found.over(carrier, node)
    return found


def _input_of(carrier: fx.Node) -> fx.Node:
    """Return the first argument of a node. Others may hold sizes."""
    source: fx.Node = split(carrier)[0]
    return source


def _match_before(path: _Path, norm: Op) -> Match:
    functions = [carrier.before for carrier in reversed(path.carriers)]
    moved = _moved(norm, functions, None)  # type: ignore[arg-type]
    terms = (Term((path.op, moved)),)
    return Match(path.op.node, path.op.source, terms, carried=norm.node, carriers=path.nodes[1:])


def _moved(norm: Op, functions: list[Numbers], channels: int | None) -> Op:
    """Return a BatchNorm's map in another place, where its numbers are what these functions make of them, one after another."""

    def build(like: Tensor, count: int, dimensions: int) -> Kernel:
        kernel = norm.meaning.build(like, norm.meaning.in_channels or 0, dimensions)
        scale, shift = kernel.weight.reshape(-1), kernel.bias
        for function in functions:
            scale, shift = function(scale), None if shift is None else function(shift)
        return Kernel.diagonal(scale, shift, dimensions)

    return replace(norm, meaning=Meaning("affine", None, channels, build))


def _is_seen_through_a_view(node: fx.Node, view: View) -> bool:
    """Whether a node behind a BatchNorm is read as one map together with it."""
    ops = (view.op(user) for user in node.users)
    return any(op is not None and node in op.inner for op in ops)


def _enters_a_sum(node: fx.Node, view: View) -> bool:
    while len(node.users) == 1:
        node = next(iter(node.users))
        if node.target in ADDITIONS | SUBTRACTIONS and len(node.all_input_nodes) > 1:
            return True
        if view.op(node) is None:
            return False
    return False
