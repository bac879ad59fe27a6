"""Padding with known values: a border of one number per channel, which may be what a conv outputs for zeros.

DBB, ECBSR and DyRep pad in this way between a 1×1 and a k×k conv, so that the two equal one conv with padding in front. Code spells it
in three ways: `F.pad` adds zeros, and the values are written over them, strip by strip (in place or into copies); `F.pad` adds one number;
or strips of the values are concatenated around the picture, axis by axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from repfx.algebra.kernel import Kernel, NoKernel, Padding
from repfx.algebra.meaning import pairs_of
from repfx.graphs.aliasing import reads_only_the_form
from repfx.graphs.constants import Constants
from repfx.graphs.indexing import Strip, strip_of
from repfx.graphs.operations import Op, per_channel, read_op
from repfx.graphs.vocabulary import CONCATENATIONS, listed
from repfx.graphs.written_strips import EXPANSIONS, Write, writes_in_place, writes_into_copies

CLOSE = 1e-12  # largest relative difference that counts as rounding in float64


@dataclass(frozen=True)
class Border:
    """A border around a picture.

    Args:
        source: the node of the picture.
        padding: how wide the border is on each side.
        values: constants that fill it, each of which broadcasts against ``(batch, channels, *axes)``.
        inner: nodes that make it, besides the one whose value is the picture with its border.
        partial: those of them that hold the picture with a part of its border, each with the padding that is still missing.
    """

    source: fx.Node
    padding: Padding
    values: tuple[Tensor, ...]
    inner: tuple[fx.Node, ...] = ()
    partial: tuple[tuple[fx.Node, Padding], ...] = ()

    def around(self, border: Border | None, picture: fx.Node) -> Border:
        """Return the two borders as one, if another one has been put around the picture before at the node `picture`."""
        if border is None or len(border.padding) != len(self.padding):
            return self
        partial = *((node, _sum(padding, self.padding)) for node, padding in border.partial), (picture, self.padding)
        inner = (*self.inner, picture, *border.inner)
        return Border(border.source, _sum(border.padding, self.padding), border.values + self.values, inner, partial)


def _sum(one: Padding, other: Padding) -> Padding:
    return tuple((before + more, after + more_after) for (before, after), (more, more_after) in zip(one, other))


def read_border(node: fx.Node, pad: Op | None, module: nn.Module | None, constants: Constants) -> Border | None:
    """Return the border that ends up around the picture in `node`, or None if there is none or its values aren't known.

    Args:
        pad: the node as a linear map, if it is one.
        module: the module that the node calls, if it calls one.
    """
    if pad is not None:
        return _written(node, pad, constants) if pad.meaning.kind == "pad" else None
    return _filled(node, module) or _concatenated(node, constants) or _written_into_copies(node, constants)


def padded_before(op: Op, border: Border) -> Op | None:
    """Return a map with zeros padded around its input, or None unless it then outputs on the border what `border` holds.

    It must be a 1×1 conv, or a scale and shift per channel, of stride 1, without padding other than zeros, and not transposed.
    """
    padding, like = border.padding, torch.empty((), dtype=torch.float64, device="cpu")
    dimensions = len(padding) if op.meaning.dimensions is None else op.meaning.dimensions
    kernel = op.meaning.build(like, op.meaning.in_channels or 0, dimensions)
    if kernel.dimensions != len(padding) or not _is_pointwise(kernel) or kernel.weight.is_meta:
        return None
    bias = kernel.weight.new_zeros(kernel.out_channels) if kernel.bias is None else kernel.bias.detach()
    try:
        values = [per_channel(value.to(like), kernel.out_channels, len(padding)) for value in border.values]
    except NoKernel:
        return None
    largest = max(float(bias.abs().max()), *(float(value.abs().max()) for value in values))
    if any(float((value - bias.to(value)).abs().max()) > CLOSE * largest for value in values):
        return None

    def build(like: Tensor, channels: int, dimensions: int) -> Kernel:
        kernel = op.meaning.build(like, channels, dimensions)
        return replace(kernel, padding=_sum(kernel.padding, padding))

    return replace(op, meaning=replace(op.meaning, dimensions=dimensions, build=build))


def _is_pointwise(kernel: Kernel) -> bool:
    """Whether a conv outputs its bias wherever its input is padded, and keeps every position."""
    simple = all(size == 1 for size in (*kernel.kernel_size, *kernel.stride))
    zeros = kernel.padding_mode == "zeros" or not kernel.padded
    return simple and zeros and not kernel.transposed and all(side >= 0 for pair in kernel.padding for side in pair)


# ---- written over zeros


def _written(node: fx.Node, pad: Op, constants: Constants) -> Border | None:
    """Return the border of a padding by zeros if constants are written over all of it before another node reads it."""
    writes = writes_in_place(node)
    inner = tuple(each for write in writes for each in write.nodes)
    others = [user for user in node.users if user not in inner and not reads_only_the_form(user)]
    if any(other < write.nodes[0] for other in others for write in writes):
        return None
    return _over_zeros(pad, writes, inner, constants)


def _written_into_copies(node: fx.Node, constants: Constants) -> Border | None:
    """Return the border of a padding by zeros if constants are written over all of it, each into a copy of what was there before."""
    for axes in (3, 4, 5):
        picture, writes = writes_into_copies(node, axes)
        pad = read_op(picture, constants.root, constants) if writes else None
        if pad is not None and pad.meaning.kind == "pad" and _padding_of(pad).dimensions == axes - 2:
            chain = tuple(each for write in reversed(writes) for each in write.nodes)
            return _over_zeros(pad, writes, (*chain[1:], picture), constants)
    return None


def _over_zeros(pad: Op, writes: Sequence[Write], inner: tuple[fx.Node, ...], constants: Constants) -> Border | None:
    """Return the border of a padding by zeros, if the writes put constants over all of it."""
    zeros = _padding_of(pad)
    sides = {(axis, side): size for axis, pair in enumerate(zeros.padding) for side, size in enumerate(pair) if size}
    strips = [strip_of(write.index, zeros.dimensions) for write in writes]
    found = {(strip.axis, strip.side): strip.width for strip in strips if strip is not None}
    if zeros.padding_mode != "zeros" or not sides or found != sides or len(found) != len(writes):
        return None
    if not any(strip is not None and strip.fixes_the_axes for strip in strips):
        return None
    values = [_value(write.value, strip, constants) for write, strip in zip(writes, strips) if strip is not None]
    known = tuple(value for value in values if value is not None)
    return Border(pad.source, zeros.padding, known, inner) if len(known) == len(values) else None


def _padding_of(pad: Op) -> Kernel:
    return pad.meaning.build(torch.empty((), device="meta"), 1, pad.meaning.dimensions or 0)


def _value(value: Any, strip: Strip, constants: Constants) -> Tensor | None:
    """Return a constant that is written into a strip, with the axis that an index without a slice takes away."""
    known = constants.number(value)
    if known is None or (isinstance(known, Tensor) and known.is_meta):
        return None
    tensor = torch.as_tensor(known, dtype=torch.float64, device="cpu")
    if strip.keeps_axis or tensor.ndim == 0:
        return tensor
    return tensor.unsqueeze(-1)  # all axes but that of the channels have size 1, so any place will do


# ---- filled with one number

_CONSTANT_PADS = (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)


def _filled(node: fx.Node, module: nn.Module | None) -> Border | None:
    """Return the border of a padding by a number other than 0."""
    call = _padding_call(node, module)
    if call is None:
        return None
    source, sides, value = call
    if not all(isinstance(side, int) and side >= 0 for side in sides) or not isinstance(value, (int, float)):
        return None
    known = torch.tensor(float(value), dtype=torch.float64, device="cpu")
    return Border(source, pairs_of(sides), (known,)) if any(sides) and isinstance(source, fx.Node) else None


def _padding_call(node: fx.Node, module: nn.Module | None) -> tuple[Any, tuple[Any, ...], Any] | None:
    """Return what a node pads, on which sides, and with which number, or None if it doesn't pad with a number."""
    if module is not None and type(module) in _CONSTANT_PADS and len(node.args) == 1:
        layer: Any = module
        return node.args[0], tuple(layer.padding), layer.value
    if node.target is not F.pad:
        return None
    names = ("input", "pad", "mode", "value")
    call: dict[str, Any] = {"mode": "constant", "value": None, **dict(zip(names, node.args)), **node.kwargs}
    plain = call["mode"] == "constant" and isinstance(call.get("pad"), (tuple, list)) and len(call["pad"]) % 2 == 0
    return (call.get("input"), tuple(call["pad"]), call["value"]) if plain else None


# ---- concatenated around the picture


def _concatenated(node: fx.Node, constants: Constants) -> Border | None:
    """Return the border that a concatenation puts in front of a picture and behind it, along one axis."""
    if node.target not in CONCATENATIONS:
        return None
    parts, dim = listed(node)
    strips = [_expanded(part, constants) for part in parts]
    if strips.count(None) != 1 or len(parts) < 2 or not isinstance(dim, int):
        return None
    place = strips.index(None)
    known = [strip for strip in strips if strip is not None]
    axes = {len(strip.sizes) for strip in known}
    widths = [strip.width(dim) if strip is not None else 0 for strip in strips]
    axis = dim % next(iter(axes)) - 2
    if len(axes) != 1 or axis < 0 or None in widths or not isinstance(parts[place], fx.Node):
        return None
    padding = [(0, 0)] * (axes.pop() - 2)
    padding[axis] = sum(widths[:place]), sum(widths[place + 1 :])  # type: ignore[arg-type]
    picture = parts[place]
    inner = tuple({part: None for part in parts if part is not picture and [*part.users] == [node]})
    border = Border(picture, tuple(padding), tuple(strip.value for strip in known), inner)
    return border.around(_concatenated(picture, constants), picture)


@dataclass(frozen=True)
class _Expanded:
    """A constant that is expanded to these sizes, in which -1 keeps the size that an axis has."""

    value: Tensor
    sizes: tuple[Any, ...]

    def width(self, dim: int) -> int | None:
        """Return the size along an axis, or None if it isn't known."""
        size = self.sizes[dim] if -len(self.sizes) <= dim < len(self.sizes) else None
        if size == -1 and isinstance(size, int):
            return 1
        return size if isinstance(size, int) and size > 0 else None


_REPETITIONS = {"repeat", torch.Tensor.repeat}


def _expanded(node: Any, constants: Constants) -> _Expanded | None:
    """Read a node as an expanded constant with at most one number for each channel, or return None."""
    if (
        not isinstance(node, fx.Node)
        or node.target not in EXPANSIONS | _REPETITIONS
        or node.kwargs
        or len(node.args) < 2
    ):
        return None
    value = constants.tensor(node.args[0])
    sizes: Any = node.args[1] if isinstance(node.args[1], (tuple, list)) else node.args[1:]
    if value is None or value.is_meta or len(sizes) < 3 or value.ndim > len(sizes):
        return None
    if node.target in _REPETITIONS and value.numel() > 1 and sizes[1] != 1:
        return None  # the channels are repeated
    return _Expanded(value.to("cpu", torch.float64), tuple(sizes))
