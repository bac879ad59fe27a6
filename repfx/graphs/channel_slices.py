"""Slices of channels: indices such as ``x[:, :4]``, `narrow`, and the parts that `split`, `chunk` and `tensor_split` give.

Code spells a slice in many ways. So the call is run on a tensor whose elements are numbered, and the numbers that come out say which
channels it takes.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from repfx.algebra.kernel import Kernel
from repfx.algebra.meaning import Meaning
from repfx.graphs.checks import require_parts
from repfx.graphs.operations import Op, split

_NARROW = {torch.narrow, "narrow"}
_PARTS = {torch.split, torch.split_with_sizes, torch.chunk, torch.tensor_split} | {
    "split",
    "split_with_sizes",
    "chunk",
    "tensor_split",
}


def sliced_by(node: fx.Node) -> fx.Node | None:
    """Return the node of which a node may be a slice of channels, or None."""
    first = split(node)[0]
    if not isinstance(first, fx.Node) or len(node.all_input_nodes) != 1:
        return None
    if node.target is operator.getitem and isinstance(node.args[1], int):
        source = split(first)[0] if first.target in _PARTS and len(first.all_input_nodes) == 1 else None
        return source if isinstance(source, fx.Node) else None
    return first if node.target is operator.getitem or node.target in _NARROW else None


def read_channel_slice(node: fx.Node, source: fx.Node, channels: int, dimensions: int) -> Op | None:
    """Read a node as a slice of the channels of `source`, or return None.

    Args:
        source: what `sliced_by` returns.
        channels, dimensions: number of channels and of spatial axes of `source`; without spatial axes, the channels come last.
    """
    shapes = [(2, channels, *range(3, 3 + dimensions))] if dimensions else [(*range(2, n), channels) for n in (3, 4, 5)]
    found = {_taken(node, source, shape, 1 if dimensions else len(shape) - 1) for shape in shapes}
    places = found.pop()
    if places is None or found:
        return None

    def build(like: Tensor, count: int, axes: int) -> Kernel:
        return Kernel.identity(like, channels=channels, dimensions=axes).slice_channels(places.start, places.stop)

    parts = node.all_input_nodes[0]
    checks = [user for user in parts.users if user.target is require_parts] if parts is not source else []
    inner = () if parts is source else (*checks, parts)
    return Op(node, source, Meaning("slice", dimensions, channels, build), inner)


def takes_a_batch(op: Op) -> bool:
    """Whether the code of a slice raises an error for an input without a batch."""
    dimensions = op.meaning.dimensions or 0
    shape = (op.meaning.in_channels or 0, *range(3, 3 + dimensions))
    return _run(op.node, op.source, torch.empty(shape)) is None


def _taken(node: fx.Node, source: fx.Node, shape: tuple[int, ...], axis: int) -> range | None:
    """Return the channels that a slice takes of a tensor with its channels on this axis, or None if it does anything else."""
    numbered = torch.arange(torch.Size(shape).numel()).reshape(shape)
    found = _run(node, source, numbered)
    if found is None or found.ndim != len(shape) or not found.numel():
        return None
    first = int(found.flatten()[0]) // numbered.stride(axis)
    places = range(first, first + found.shape[axis])
    same = places.stop <= shape[axis] and torch.equal(found, numbered.narrow(axis, first, len(places)))
    return places if same else None


def _run(node: fx.Node, source: fx.Node, value: Tensor) -> Any:
    """Return what a slice makes of a value, or None if it raises an error or checks for another number of parts."""

    def called(each: fx.Node) -> Any:
        if each is source:
            return value
        args, keywords = fx.node.map_arg((each.args, each.kwargs), called)
        if callable(each.target):
            return each.target(*args, **keywords)
        return getattr(args[0], each.target)(*args[1:], **keywords)

    try:
        parts = node.all_input_nodes[0]
        for check in parts.users if parts is not source else ():
            if check.target is require_parts:
                called(check)
        found = called(node)
    except Exception:  # whatever torch says of these arguments
        return None
    return found if isinstance(found, Tensor) else None
