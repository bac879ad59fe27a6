"""Indices that select parts of a picture: strips along its sides, and pictures without such strips."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from repfx.algebra.kernel import Kernel, NoKernel, Padding
from repfx.algebra.meaning import Meaning, pad_meaning


@dataclass(frozen=True)
class Strip:
    """A part of a picture along one of its sides.

    Args:
        side: 0 for the side before, 1 for the side after.
        width: number of positions.
        keeps_axis: whether the index is a slice, not a number.
        fixes_the_axes: whether the index can't be taken for that of a picture with fewer axes.
    """

    axis: int
    side: int
    width: int
    keeps_axis: bool
    fixes_the_axes: bool


def strip_of(index: Any, dimensions: int) -> Strip | None:
    """Read an index into ``(batch, channels, *axes)`` as a strip, or return None."""
    parts = whole_index(index, dimensions + 2)
    if parts is None:
        return None
    cut = [(axis - 2, part) for axis, part in enumerate(parts) if part != slice(None)]
    if len(cut) != 1 or cut[0][0] < 0:
        return None
    axis, part = cut[0]
    fixes = len(index) == dimensions + 2 or Ellipsis in index
    if not isinstance(part, slice):
        return Strip(axis, -part, 1, keeps_axis=False, fixes_the_axes=fixes) if part in (0, -1) else None
    if part.step not in (None, 1):
        return None
    if part.start in (None, 0) and isinstance(part.stop, int) and part.stop > 0:
        return Strip(axis, 0, part.stop, keeps_axis=True, fixes_the_axes=fixes)
    if part.stop is None and isinstance(part.start, int) and part.start < 0:
        return Strip(axis, 1, -part.start, keeps_axis=True, fixes_the_axes=fixes)
    return None


def whole_index(index: Any, axes: int) -> tuple[Any, ...] | None:
    """Return an index with one entry for each of so many axes, or None if it has another form.

    >>> whole_index((..., slice(1, None)), 3)
    (slice(None, None, None), slice(None, None, None), slice(1, None, None))
    """
    if not isinstance(index, tuple) or not all(isinstance(part, (slice, int)) or part is Ellipsis for part in index):
        return None
    dots = [place for place, part in enumerate(index) if part is Ellipsis]
    if len(dots) > 1 or len(index) - len(dots) > axes:
        return None
    place = dots[0] if dots else len(index)
    missing = axes - len(index) + len(dots)
    return (*index[:place], *(slice(None),) * missing, *index[place + len(dots) :])


def crop_meaning(index: Any) -> Meaning | None:
    """Read an index such as ``[:, :, 1:-1, 1:-1]`` or ``[..., 1:-1]`` as the map that crops, or return None.

    Without an ellipsis, an index says how many axes its tensor has at least: two more than it crops.
    """
    if not isinstance(index, tuple):
        return None
    open_ended = any(part is Ellipsis for part in index)
    parts = whole_index(index, len(index) - open_ended)
    cut = None if parts is None else [_crop(part) for part in parts]
    if cut is None or None in cut or not any(map(any, cut)):  # type: ignore[arg-type]
        return None
    sides: list[Any] = [*cut]
    before = index.index(Ellipsis) if open_ended else 2
    if any(map(any, sides[:before])) or len(sides) < before:
        return None
    if not open_ended:
        return pad_meaning(tuple(sides[2:]), "zeros")
    return Meaning("crop", None, None, lambda like, channels, n: _cropping(sides[before:], like, channels, n))


def _crop(part: Any) -> tuple[int, int] | None:
    """Return the padding that a slice amounts to, or None if that depends on the size of the axis."""
    if not isinstance(part, slice) or part.step not in (None, 1):
        return None
    start, stop = part.start or 0, part.stop or 0
    if not isinstance(start, int) or not isinstance(stop, int) or start < 0 or stop > 0 or part.stop == 0:
        return None
    return -start, stop


def _cropping(sides: list[tuple[int, int]], like: Tensor, channels: int, dimensions: int) -> Kernel:
    padding: Padding = tuple([(0, 0)] * dimensions + sides)
    outer = len(padding) - dimensions
    if any(map(any, padding[:outer])):
        raise NoKernel(f"an index cuts {len(sides)} axes, but there are {dimensions}")
    return pad_meaning(padding[outer:], "zeros").build(like, channels, dimensions)
