"""Nodes that a scale and a shift of each channel can pass: permutations, averages, upsampling, and shuffled channels.

Behind such a node, a BatchNorm in eval mode does the same as in front of it. For averages this holds because their weights sum to 1.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from repfx.algebra.layers import Layer, is_patched
from repfx.graphs.operations import split
from repfx.records.module_tree import called_by


@dataclass(frozen=True)
class Place:
    """Where a tensor has its channels: on one axis of so many."""

    axis: int
    axes: int


Move: TypeAlias = Callable[[Place], "Place | None"]
Numbers: TypeAlias = Callable[[Tensor], Tensor]


def _same(numbers: Tensor) -> Tensor:
    return numbers


@dataclass(frozen=True)
class Carrier:
    """A node's effect on the channels.

    Args:
        move: function from the place of the channels in the input to that in the output; None if a scale and a shift can't pass.
        before: function from numbers per channel of the output to numbers per channel of the input; None if there is none.
        after: function from numbers per channel of the input to numbers per channel of the output; None if there is none.
        around: how many channels of the output come from elsewhere, before those of the input and behind them. `after` sees them, too.
    """

    move: Move
    before: Numbers | None = _same
    after: Numbers | None = _same
    around: tuple[int, int] = (0, 0)

    @property
    def keeps_channels(self) -> bool:
        """Whether the channels stay in their order."""
        return self.before is _same and self.after is _same


def slice_of(axis: Any, start: int, stop: int) -> Carrier:
    """Return the carrier from one part of a concatenation to the whole, in which the part has the channels from `start` up to `stop`."""

    return Carrier(_along(axis), lambda numbers: numbers[start:stop], None)


def part_of(axis: Any, before: int, behind: int) -> Carrier:
    """Return the carrier from one part of a concatenation to the whole, in which other parts have so many channels before and behind."""
    return Carrier(_along(axis), None, _same, (before, behind))


def _along(axis: Any) -> Move:
    def move(place: Place) -> Place | None:
        along = isinstance(axis, int) and -place.axes <= axis < place.axes and axis % place.axes == place.axis
        return place if along else None

    return move


def read_carrier(node: fx.Node, root: nn.Module) -> Carrier | None:
    """Read a node as a carrier of its first input, or return None."""
    if node.op == "call_module":
        layer: Layer = called_by(root, node)
        alone = len(node.args) == 1 and not node.kwargs and not is_patched(layer)
        reader = _LAYERS.get(type(layer)) if alone else None
        return None if reader is None else reader(layer, _Input.of(node.args[0], root))
    if node.op not in ("call_function", "call_method") or node.target not in _CALLS:
        return None
    source, others, keywords = split(node)
    try:
        return _CALLS[node.target](_Input.of(source, root), *others, **keywords)
    except TypeError:  # arguments that are computed in the graph, or that don't fit
        return None


@dataclass(frozen=True)
class _Input:
    """The input of a node: how many axes behind the channels were averaged to size 1, or None if that isn't known."""

    averaged: int | None

    @classmethod
    def of(cls, source: Any, root: nn.Module) -> _Input:
        if not isinstance(source, fx.Node):
            return cls(None)
        if source.op == "call_module":
            layer: Layer = called_by(root, source)
            return cls(_averaged_by(_ADAPTIVE_LAYERS.get(type(layer)), getattr(layer, "output_size", None)))
        if source.target in _ADAPTIVE:
            return cls(_averaged_by(_ADAPTIVE[source.target], (*source.args[1:], *source.kwargs.values())[-1]))
        return cls(_averaged_by_mean(source))


def _averaged_by(dimensions: int | None, size: Any) -> int | None:
    sizes = {size} if isinstance(size, int) else set(size) if isinstance(size, (tuple, list)) else {None}
    return dimensions if sizes == {1} else None


def _averaged_by_mean(node: fx.Node) -> int | None:
    if node.target not in _MEAN or not (node.kwargs.get("keepdim") is True or node.args[2:] == (True,)):
        return None
    dims: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    if not isinstance(dims, (tuple, list)):
        return None
    count = len(dims)
    return count if set(dims) in ({*range(2, 2 + count)}, {*range(-count, 0)}) else None


# ---- permutations


def _permuted(order: Callable[[int], list[int]]) -> Carrier:
    """Return the carrier that brings axis ``order(axes)[i]`` to place i."""

    def move(place: Place) -> Place | None:
        try:
            found = [axis % place.axes for axis in order(place.axes)]
        except (IndexError, TypeError, RuntimeError):
            return None
        return Place(found.index(place.axis), place.axes) if sorted(found) == [*range(place.axes)] else None

    return Carrier(move)


def _permute(source: _Input, *dims: Any) -> Carrier:
    order = dims[0] if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else dims
    return _permuted(lambda axes: list(order))


def _transpose(source: _Input, dim0: Any, dim1: Any) -> Carrier:
    def order(axes: int) -> list[int]:
        found = list(range(axes))
        found[dim0], found[dim1] = found[dim1], found[dim0]
        return found

    return _permuted(order)


def _movedim(source: _Input, from_axes: Any, to_axes: Any) -> Carrier:
    def order(axes: int) -> list[int]:
        numbered = torch.empty(tuple(range(1, axes + 1)), device="meta")
        return [size - 1 for size in numbered.movedim(from_axes, to_axes).shape]

    return _permuted(order)


def _copied(source: _Input, *arguments: Any, **keywords: Any) -> Carrier:
    return Carrier(lambda place: place)


# ---- averages and upsampling


def _over_the_axes_behind(dimensions: int | None = None) -> Carrier:
    """Return the carrier that works on all axes behind the second one, which holds the channels."""
    return Carrier(lambda place: place if place.axis == 1 and dimensions in (None, place.axes - 2) else None)


def _average_pool(dimensions: int) -> Callable[..., Carrier | None]:
    def read(
        source: _Input,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Carrier | None:
        padded = padding not in (0, (0,) * dimensions, [0] * dimensions)
        if divisor_override is not None or (padded and count_include_pad is not False):
            return None  # the zeros at the border count
        return _over_the_axes_behind(dimensions)

    return read


def _pool_layer(dimensions: int) -> Callable[[Layer, Any], Carrier | None]:
    def read(pool: Layer, source: _Input) -> Carrier | None:
        divisor = getattr(pool, "divisor_override", None)
        return _average_pool(dimensions)(
            source, pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode, pool.count_include_pad, divisor
        )

    return read


def _adaptive_pool(dimensions: int) -> Callable[..., Carrier]:
    return lambda source, *size, **keywords: _over_the_axes_behind(dimensions)


def _upsample(layer: Layer, source: _Input) -> Carrier | None:
    return _over_the_axes_behind() if layer.mode in _SUM_TO_ONE else None


def _interpolate(source: _Input, *arguments: Any, **keywords: Any) -> Carrier | None:
    call = inspect.signature(F.interpolate).bind(source, *arguments, **keywords)
    call.apply_defaults()
    return _over_the_axes_behind() if call.arguments["mode"] in _SUM_TO_ONE else None


_SUM_TO_ONE = ("nearest", "nearest-exact", "linear", "bilinear", "trilinear", "bicubic", "area")


def _mean(source: _Input, dim: Any, keepdim: bool = False) -> Carrier | None:
    dims = [dim] if isinstance(dim, int) else list(dim)
    if not all(isinstance(axis, int) for axis in dims):
        return None

    def move(place: Place) -> Place | None:
        gone = {axis % place.axes for axis in dims}
        if place.axis in gone:
            return None
        return place if keepdim else Place(place.axis - sum(a < place.axis for a in gone), place.axes - len(gone))

    return Carrier(move)


def _flatten(source: _Input, start_dim: int = 0, end_dim: int = -1) -> Carrier | None:
    """Read ``flatten(1)`` behind an average over all positions."""
    if (start_dim, end_dim) != (1, -1) or source.averaged is None:
        return None
    whole = source.averaged + 2
    return Carrier(lambda place: Place(1, 2) if place == Place(1, whole) else None)


# ---- channels in another order


def _pixel_shuffle(source: _Input, factor: Any) -> Carrier | None:
    if not isinstance(factor, int):
        return None
    return Carrier(_over_the_axes_behind(2).move, lambda numbers: numbers.repeat_interleave(factor**2), None)


def _pixel_unshuffle(source: _Input, factor: Any) -> Carrier | None:
    if not isinstance(factor, int):
        return None
    return Carrier(_over_the_axes_behind(2).move, None, lambda numbers: numbers.repeat_interleave(factor**2))


def _channel_shuffle(source: _Input, groups: Any) -> Carrier | None:
    if not isinstance(groups, int):
        return None

    def before(numbers: Tensor) -> Tensor:
        return numbers.reshape(-1, groups).t().reshape(-1)

    def after(numbers: Tensor) -> Tensor:
        return numbers.reshape(groups, -1).t().reshape(-1)

    return Carrier(_over_the_axes_behind().move, before, after)


def _settings(read: Callable[..., Carrier | None], *names: str) -> Callable[[Layer, _Input], Carrier | None]:
    """Return the reader of layers that keep the arguments of a call as attributes of these names."""
    return lambda layer, source: read(source, *(getattr(layer, name) for name in names))


_MEAN = {torch.mean, "mean"}
_AVERAGE: dict[Any, int] = {F.avg_pool1d: 1, F.avg_pool2d: 2, F.avg_pool3d: 3}
_AVERAGE_LAYERS: dict[type[nn.Module], int] = {nn.AvgPool1d: 1, nn.AvgPool2d: 2, nn.AvgPool3d: 3}
_ADAPTIVE: dict[Any, int] = {F.adaptive_avg_pool1d: 1, F.adaptive_avg_pool2d: 2, F.adaptive_avg_pool3d: 3}
_ADAPTIVE_LAYERS: dict[type[nn.Module], int] = {
    nn.AdaptiveAvgPool1d: 1,
    nn.AdaptiveAvgPool2d: 2,
    nn.AdaptiveAvgPool3d: 3,
}

_CALLS: dict[Any, Callable[..., Carrier | None]] = {
    **dict.fromkeys((torch.permute, "permute"), _permute),
    **dict.fromkeys((torch.transpose, torch.swapaxes, torch.swapdims, "transpose", "swapaxes", "swapdims"), _transpose),
    **dict.fromkeys((torch.movedim, torch.moveaxis, "movedim", "moveaxis"), _movedim),
    **dict.fromkeys((torch.clone, "clone", "contiguous"), _copied),
    **{function: _average_pool(dimensions) for function, dimensions in _AVERAGE.items()},
    **{function: _adaptive_pool(dimensions) for function, dimensions in _ADAPTIVE.items()},
    **dict.fromkeys((F.interpolate, F.upsample), _interpolate),
    **dict.fromkeys(_MEAN, _mean),
    **dict.fromkeys((torch.flatten, "flatten"), _flatten),
    **dict.fromkeys((F.pixel_shuffle, torch.pixel_shuffle), _pixel_shuffle),
    **dict.fromkeys((F.pixel_unshuffle, torch.pixel_unshuffle), _pixel_unshuffle),
    **dict.fromkeys((F.channel_shuffle, torch.channel_shuffle), _channel_shuffle),
}
_LAYERS: dict[type[nn.Module], Callable[[Layer, _Input], Carrier | None]] = {
    **{layer: _pool_layer(dimensions) for layer, dimensions in _AVERAGE_LAYERS.items()},
    **{layer: _settings(_adaptive_pool(dimensions)) for layer, dimensions in _ADAPTIVE_LAYERS.items()},
    **dict.fromkeys((nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d), _upsample),
    nn.Flatten: _settings(_flatten, "start_dim", "end_dim"),
    nn.PixelShuffle: _settings(_pixel_shuffle, "upscale_factor"),
    nn.PixelUnshuffle: _settings(_pixel_unshuffle, "downscale_factor"),
    nn.ChannelShuffle: _settings(_channel_shuffle, "groups"),
}
