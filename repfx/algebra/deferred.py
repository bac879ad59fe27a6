"""`Deferred`: a tensor of which only the shape is known. What computes it is recorded, to run later, together with other such tensors.

The algebra's operations are pure tensor functions, so they can be recorded by being run on deferred tensors. A deferred `like` begins
this: ``weight.to(like)`` is deferred, too, and so is all that follows. `repfx.algebra.program` runs what was recorded.

An operation that isn't known here raises `NotDeferred`. Whoever records then computes with tensors instead.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from repfx.algebra.kernel import Ints


class NotDeferred(Exception):
    """An operation can't be recorded."""


class Recording:
    """All operations on deferred tensors that began with one recording, each operation once."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Deferred] = {}
        self.tensors: list[Tensor] = []

    def input(self, tensor: Tensor) -> Deferred:
        """Return an existing tensor as a deferred one."""
        known = self._known.get(id(tensor))
        if known is None:
            known = self._known[id(tensor)] = Deferred(
                self, "input", len(self.tensors), (), tuple(tensor.shape), tensor.dtype, tensor.device
            )
            self.tensors.append(tensor)  # which keeps its id
        return known

    def full(self, shape: Ints, fill: float, like: Deferred) -> Deferred:
        """Return a deferred tensor that has one value everywhere."""
        key = ("full", fill, shape, like.dtype, like.device)
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = Deferred(self, "full", fill, (), shape, like.dtype, like.device)
        return known

    def operation(self, name: str, options: Hashable, sources: tuple[Deferred, ...], shape: Ints) -> Deferred:
        """Return the deferred result of an operation, which has the dtype and the device of its first source."""
        key = (name, options, shape, *map(id, sources))
        known = self._known.get(key)
        if known is None:
            first = sources[0]
            known = self._known[key] = Deferred(self, name, options, sources, shape, first.dtype, first.device)
        return known


class Deferred:
    """A tensor that isn't computed yet. It has those methods and operators of a tensor that the algebra uses.

    Args:
        recording: what it belongs to.
        name, options: the operation that computes it.
        sources: the operands.
        shape, dtype, device: as a tensor has them.

    >>> like = Recording().input(torch.ones(2, 3))
    >>> (torch.ones(2, 3).to(like) * like).sum(1).shape
    (2,)
    """

    __slots__ = ("depth", "device", "dtype", "name", "options", "recording", "shape", "sources")
    is_meta = False
    requires_grad = True

    def __init__(
        self,
        recording: Recording,
        name: str,
        options: Any,
        sources: tuple[Deferred, ...],
        shape: Ints,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.recording, self.name, self.options, self.sources = recording, name, options, sources
        self.shape, self.dtype, self.device = shape, dtype, device
        self.depth: int = 1 + max((source.depth for source in sources), default=-1)

    @classmethod
    def __torch_function__(cls, function: Any, _: Any, args: Sequence[Any] = (), options: Any = None) -> Any:
        """Record a function of torch that was called with a deferred tensor among its arguments."""
        name = function.__name__
        if name == "einsum":
            return _einsum(*args)
        method = getattr(cls, name, None)
        if method is None or not isinstance(args[0], (Tensor, Deferred)):
            raise NotDeferred(name)
        recording = next(each.recording for each in args if isinstance(each, Deferred))
        first = recording.input(args[0]) if isinstance(args[0], Tensor) else args[0]
        return method(first, *args[1:], **(options or {}))

    @property
    def ndim(self) -> int:
        return len(self.shape)

    # ---- numbers

    def to(self, like: object) -> Deferred:
        if not isinstance(like, Deferred) or like.device != self.device:
            raise NotDeferred(f"to {like}")
        if like.dtype == self.dtype:
            return self
        found = self.recording.operation("to", like.dtype, (self,), self.shape)
        found.dtype = like.dtype
        return found

    def mul(self, other: Any) -> Deferred:
        if isinstance(other, Deferred):
            for x, constant in ((self, other), (other, self)):
                same = x.dtype == constant.dtype
                if same and constant.name == "full" and _broadcast(x.shape, constant.shape) == x.shape:
                    return x if constant.options == 1 else x._with("mul", (None, constant.options))
        return self._with("mul", (None, None), other)

    def add(self, other: Any) -> Deferred:
        return self._with("add", (None, None), other)

    def neg(self) -> Deferred:
        return self._with("neg", (None,))

    def rsqrt(self) -> Deferred:
        return self._with("rsqrt", (None,))

    def _with(self, name: str, options: tuple[Any, ...], *others: Any) -> Deferred:
        """Return the result of an operation on each number. In `options`, None stands for each operand in turn."""
        operands = (self, *(self.recording.input(each) if isinstance(each, Tensor) else each for each in others))
        if others:
            options = tuple(None if isinstance(each, Deferred) else each for each in operands)
        deferred = tuple(each for each in operands if isinstance(each, Deferred))
        shape = self.shape
        for each in deferred[1:]:
            if each.dtype != self.dtype:
                raise NotDeferred("dtypes differ")
            shape = _broadcast(shape, each.shape)
        return self.recording.operation(name, options, deferred, shape)

    __mul__ = __rmul__ = mul
    __add__ = __radd__ = add
    __neg__ = neg

    def sum(self, axis: int) -> Deferred:
        axis %= self.ndim
        return self.recording.operation("sum", axis, (self,), self.shape[:axis] + self.shape[axis + 1 :])

    # ---- constants

    def new_full(self, shape: Iterable[int], fill: float) -> Deferred:
        return self.recording.full(tuple(shape), fill, self)

    def new_ones(self, *shape: Any) -> Deferred:
        return self.new_full(_sizes(shape), 1)

    def new_zeros(self, *shape: Any) -> Deferred:
        return self.new_full(_sizes(shape), 0)

    # ---- shapes

    def reshape(self, *shape: Any) -> Deferred:
        sizes = _sizes(shape)
        if -1 in sizes:
            rest = math.prod(self.shape) // math.prod(size for size in sizes if size != -1)
            sizes = tuple(rest if size == -1 else size for size in sizes)
        if sizes == self.shape:
            return self
        if self.name == "full":
            return self.new_full(sizes, self.options)
        if self.name == "reshape":
            return self.sources[0].reshape(sizes)
        return self.recording.operation("reshape", None, (self,), sizes)

    def flatten(self, first: int = 0, last: int = -1) -> Deferred:
        last %= self.ndim
        return self.reshape((*self.shape[:first], math.prod(self.shape[first : last + 1]), *self.shape[last + 1 :]))

    def squeeze(self, axis: int) -> Deferred:
        axis %= self.ndim
        return self.reshape(self.shape[:axis] + self.shape[axis + 1 :]) if self.shape[axis] == 1 else self

    def permute(self, *axes: Any) -> Deferred:
        order = tuple(axis % self.ndim for axis in _sizes(axes))
        shape = tuple(self.shape[axis] for axis in order)
        wide = [axis for axis in order if self.shape[axis] != 1]
        if wide == sorted(wide):
            return self.reshape(shape)
        return self.recording.operation("permute", order, (self,), shape)

    def transpose(self, first: int, second: int) -> Deferred:
        axes = list(range(self.ndim))
        axes[first], axes[second] = axes[second], axes[first]
        return self.permute(axes)

    def movedim(self, source: int, target: int) -> Deferred:
        axes = list(range(self.ndim))
        axes.insert(target % self.ndim, axes.pop(source))
        return self.permute(axes)

    def expand(self, *shape: Any) -> Deferred:
        sizes = _sizes(shape)
        shared = (1,) * (len(sizes) - self.ndim) + self.shape
        sizes = tuple(own if size == -1 else size for size, own in zip(sizes, shared, strict=True))
        return self.recording.operation("expand", None, (self.reshape(shared),), sizes)

    def diag_embed(self, offset: int = 0, *, dim1: int, dim2: int) -> Deferred:
        dim1, dim2 = dim1 % (self.ndim + 1), dim2 % (self.ndim + 1)
        shape = list(self.shape[:-1])
        for axis in sorted((dim1, dim2)):
            shape.insert(axis, self.shape[-1] + abs(offset))
        return self.recording.operation("diag_embed", (offset, dim1, dim2), (self,), tuple(shape))

    def pad(self, sides: Sequence[int], mode: str = "constant", value: float | None = None) -> Deferred:
        if mode != "constant" or value:
            raise NotDeferred(f"pad {mode} {value}")
        shape = list(self.shape)
        for axis, (before, after) in enumerate(zip(sides[::2], sides[1::2])):
            shape[-1 - axis] += before + after
        return self.recording.operation("pad", tuple(sides), (self,), tuple(shape))

    def __getitem__(self, places: Any) -> Deferred:
        places = places if isinstance(places, tuple) else (places,)
        if not all(isinstance(each, slice) or each is ... for each in places):
            raise NotDeferred(f"index {places}")
        shape = tuple(torch.empty(self.shape, device="meta")[places].shape)
        options = tuple((each.start, each.stop, each.step) if isinstance(each, slice) else each for each in places)
        return self.recording.operation("slice", options, (self,), shape)


def _sizes(shape: tuple[Any, ...]) -> Ints:
    """Return the sizes that a method was given one by one or as one sequence."""
    return tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape


def _broadcast(first: Ints, second: Ints) -> Ints:
    if first == second:
        return first
    return (
        tuple(torch.broadcast_shapes(first, second))
        if len(first) != len(second)
        else tuple(b if a == 1 else a for a, b in zip(first, second))
    )


def _einsum(equation: str, *operands: Any) -> Deferred:
    if (
        not all(isinstance(each, (Tensor, Deferred)) for each in operands)
        or not equation.replace("->", ",").replace(",", "").isalpha()
    ):
        raise NotDeferred(f"einsum {equation}")
    recording = next(each.recording for each in operands if isinstance(each, Deferred))
    sources = tuple(recording.input(each) if isinstance(each, Tensor) else each for each in operands)
    terms, result = equation.split("->")
    sizes: dict[str, int] = {}
    for term, each in zip(terms.split(","), sources, strict=True):
        for letter, size in zip(term, each.shape, strict=True):
            if len({*term}) < len(term) or sizes.setdefault(letter, size) != size:  # a diagonal, or a broadcast
                raise NotDeferred(f"einsum {equation} of {[each.shape for each in sources]}")
    return recording.operation("einsum", equation, sources, tuple(sizes[letter] for letter in result))
