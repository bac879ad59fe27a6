"""Writes of values into parts of a picture: in place, or into one copy of it after another, as some programs of `torch.export` do.

Code writes ``x[index] = value``. A program of `torch.export` has ``x[index].copy_(value)`` in its place, or a chain of
`torch.slice_scatter`.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

EXPANSIONS = {"expand", "broadcast_to", torch.broadcast_to, torch.Tensor.expand}

_COPIES = {"copy_", "fill_", torch.Tensor.copy_, torch.Tensor.fill_}
_COPY = torch.ops.aten.copy.default  # `copy_` without a write: its second argument, in the shape and dtype of the first


@dataclass(frozen=True)
class Write:
    """A write into a part of a picture.

    Args:
        index: the index of the part.
        value: a number, or the node of a tensor that broadcasts against the part.
        nodes: the nodes that do it and nothing else, that of the write first.
    """

    index: tuple[Any, ...]
    value: Any
    nodes: tuple[fx.Node, ...]


def writes_in_place(picture: fx.Node) -> list[Write]:
    """Return all writes into a picture by an index, in place.

    >>> graph = fx.Graph()
    >>> x = graph.placeholder("x")
    >>> first = graph.call_function(operator.getitem, (x, (slice(None), slice(0, 1))))
    >>> _ = graph.call_method("fill_", (first, 2.0))
    >>> writes_in_place(x)[0].index, writes_in_place(x)[0].value
    ((slice(None, None, None), slice(0, 1, None)), 2.0)
    """
    found = (_write_of(user, picture) for user in picture.users)
    return [write for write in found if write is not None]


def _write_of(user: fx.Node, picture: fx.Node) -> Write | None:
    if user.target is operator.setitem and user.args[0] is picture:
        return Write(user.args[1], user.args[2], (user,))  # type: ignore[arg-type]
    if user.target is not operator.getitem or len(user.users) != 1:
        return None
    copy = next(iter(user.users))
    plain = copy.target in _COPIES and len(copy.args) == 2 and copy.args[0] is user and not copy.users
    value, expansions = _before_expansion(copy.args[1])
    return Write(user.args[1], value, (copy, user, *expansions)) if plain else None  # type: ignore[arg-type]


def writes_into_copies(node: fx.Node, axes: int) -> tuple[fx.Node, list[Write]]:
    """Return the picture that a chain of `torch.slice_scatter` begins with, and the writes; no writes if a node isn't the end of one.

    Args:
        axes: number of axes of the picture.
    """
    writes: list[Write] = []
    while (write := _scatter(node, axes)) is not None and isinstance(node.args[0], fx.Node):
        writes.insert(0, write)
        node = node.args[0]
    return node, writes


def _scatter(node: fx.Node, axes: int) -> Write | None:
    if node.target is not torch.slice_scatter:
        return None
    names = ("input", "src", "dim", "start", "end", "step")
    call: dict[str, Any] = {
        "dim": 0,
        "start": None,
        "end": None,
        "step": 1,
        **dict(zip(names, node.args)),
        **node.kwargs,
    }
    index = [slice(None)] * axes
    if not isinstance(call["dim"], int) or not -axes <= call["dim"] < axes:
        return None
    index[call["dim"]] = slice_between(call["start"], call["end"], call["step"])
    value, inner = call["src"], ()
    if isinstance(value, fx.Node) and value.target is _COPY:
        part = value.args[0]
        reads_alone = isinstance(part, fx.Node) and part.target is operator.getitem and [*part.users] == [value]
        inner = (value, part) if reads_alone else (value,)  # type: ignore[assignment]
        value = value.args[1]
    value, expansions = _before_expansion(value)
    return Write(tuple(index), value, (node, *inner, *expansions))


def slice_between(start: Any, end: Any, step: Any) -> slice:
    """Return the slice that an ATen operator means, where an end past every size stands for none.

    >>> slice_between(-1, 2**63 - 1, 1)
    slice(-1, None, None)
    """
    without_end = isinstance(end, int) and end >= _NO_END
    return slice(start, None if without_end else end, None if step == 1 else step)


_NO_END = 2**63 - 1


def _before_expansion(value: Any) -> tuple[Any, tuple[fx.Node, ...]]:
    """Return what a value was before it was expanded to the shape of the part, and the nodes that expand it for this write alone."""
    expansions: list[fx.Node] = []
    while isinstance(value, fx.Node) and value.target in EXPANSIONS:
        if len(value.users) == 1:
            expansions.append(value)
        value = value.args[0]
    return value, tuple(expansions)
