"""Which axes of a model's inputs an ONNX file leaves free, each by a name, and inputs that are of other sizes along them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from repfx.errors import InvalidInput, UnknownName
from repfx.measuring.in_float64 import Inputs, as_arguments, map_tensors

AxisNames: TypeAlias = Mapping[str, Mapping[int, str]]

BATCH = "batch"
_SIDES = {1: ("length",), 2: ("height", "width"), 3: ("depth", "height", "width")}
_STEP = 32  # by which sides grow in a check: nets that halve their input five times take no other sizes


@dataclass(frozen=True)
class FreeAxes:
    """For each tensor of an input, in order, the names of its free axes; axes of one name are of one size.

    >>> free = FreeAxes.usual(torch.zeros(2, 3, 8, 6), batch=True, size=True)
    >>> free.names, free.sizes(torch.zeros(2, 3, 8, 6))
    (({0: 'batch', 2: 'height', 3: 'width'},), {'batch': 2, 'height': 8, 'width': 6})
    """

    names: tuple[Mapping[int, str], ...] = ()

    @classmethod
    def usual(cls, x: Inputs, *, batch: bool, size: bool) -> FreeAxes:
        """The first axis, the axes from the third on, or both; of each tensor that is as long there as the first one is.

        Raises:
            InvalidInput: `size`, and the first tensor has no third axis, or too many.
        """
        tensors = [tensor for tensor in tensors_of(x) if tensor.dim()]
        if not tensors:
            return cls()
        wanted = {0: BATCH} if batch else {}
        if size:
            sides = _SIDES.get(tensors[0].dim() - 2)
            if sides is None:
                raise InvalidInput(
                    f"dynamic_size=True frees the axes from the third on, as height and width, but x has {tensors[0].dim()} "
                    "axes: give dynamic_axes instead."
                )
            wanted |= dict(enumerate(sides, 2))
        return cls(
            tuple(
                {
                    axis: name
                    for axis, name in wanted.items()
                    if axis < tensor.dim() and tensor.shape[axis] == tensors[0].shape[axis]
                }
                for tensor in tensors_of(x)
            )
        )

    @classmethod
    def named(cls, model: nn.Module, x: Inputs, given: AxisNames) -> FreeAxes:
        """Those that a user names, as ``{"x": {0: "batch", 2: "height"}}``; inputs go by the names that forward gives them.

        Raises:
            InvalidInput: no such input or axis, or two axes of one name and of two sizes.
        """
        inputs = _inputs_by_name(model, x)
        names: list[Mapping[int, str]] = []
        for name in given:
            if name not in inputs:
                raise UnknownName("input", name, inputs)
        for name, value in inputs.items():
            names += [_checked(name, tensor, given.get(name, {})) for tensor in tensors_of(value)]
        free = cls(tuple(names))
        free.sizes(x)
        return free

    def __bool__(self) -> bool:
        return any(self.names)

    def __str__(self) -> str:
        return ", ".join(dict.fromkeys(name for names in self.names for name in names.values()))

    def sizes(self, x: Inputs) -> dict[str, int]:
        """The size of x along each free axis.

        Raises:
            InvalidInput: two axes of one name are of two sizes.
        """
        found: dict[str, int] = {}
        for tensor, names in zip(tensors_of(x), self.names):
            for axis, name in names.items():
                if found.setdefault(name, tensor.shape[axis]) != tensor.shape[axis]:
                    raise InvalidInput(
                        f"two axes of x are named {name!r} and are {found[name]} and {tensor.shape[axis]} long: "
                        "name axes alike only where they are always of one size."
                    )
        return found

    def resized(self, x: Inputs, sizes: Mapping[str, int]) -> Any:
        """x with these sizes along the axes that they name, made of the same numbers in another order."""
        tensors = tensors_of(x)
        names = {id(tensor): own for tensor, own in zip(tensors, self.names)}

        def change(tensor: Tensor) -> Tensor:
            for axis, name in names.get(id(tensor), {}).items():
                if name in sizes and sizes[name] != tensor.shape[axis]:
                    places = torch.arange(sizes[name], device=tensor.device) % tensor.shape[axis]
                    tensor = tensor.flip(axis).index_select(axis, places)
            return tensor

        return map_tensors(change, x)

    def others(self, x: Inputs) -> Iterator[dict[str, int]]:
        """Other sizes of all free axes, to be tried in turn: each side its own, all sides alike, twice the sides."""
        sizes = self.sizes(x)
        first = {names[0] for names in self.names if 0 in names}
        sides = [name for name in sizes if name not in first]
        more = {name: size + 1 for name, size in sizes.items()}
        yield more | {name: sizes[name] + _STEP * place for place, name in enumerate(sides, 1)}
        if sides:
            yield more | {name: sizes[name] + _STEP for name in sides}
            yield more | {name: sizes[name] * 2 for name in sides}

    def specification(self, x: Inputs) -> Any:
        """x with each tensor replaced by what torch.export wants to know of its axes; None if none is free."""
        if not self:
            return None
        names = {id(tensor): own for tensor, own in zip(tensors_of(x), self.names)}
        args, kwargs = as_arguments(x)
        return _specified(kwargs or args, names)


def tensors_of(x: Any) -> list[Tensor]:
    """The tensors in a nesting, in the order in which an exported file takes them."""
    found: list[Tensor] = []
    map_tensors(lambda tensor: found.append(tensor) or tensor, x)  # type: ignore[func-returns-value]
    return found


def _inputs_by_name(model: nn.Module, x: Inputs) -> dict[str, Any]:
    args, kwargs = as_arguments(x)
    parameters = inspect.signature(model.forward).parameters
    return dict(zip(parameters, args)) if args else kwargs


def _checked(name: str, tensor: Tensor, axes: Mapping[int, str]) -> Mapping[int, str]:
    for axis, label in axes.items():
        if not (isinstance(axis, int) and -tensor.dim() <= axis < tensor.dim()):
            raise InvalidInput(
                f"input {name!r} has axes 0 to {tensor.dim() - 1}, and no axis {axis!r} to be left free."
            )
        if not (isinstance(label, str) and label.isidentifier()):
            raise InvalidInput(f"axis {axis} of input {name!r} is to be called {label!r}: give a name, as 'height'.")
    return {axis % tensor.dim(): label for axis, label in axes.items()}


def _specified(value: Any, names: Mapping[int, Mapping[int, str]]) -> Any:
    if isinstance(value, Tensor):
        # By name torch would refuse what holds for some sizes only, such as even ones; a hint leaves that to the runtime.
        return dict.fromkeys(names.get(id(value), {}), torch.export.Dim.DYNAMIC) or None
    if isinstance(value, Mapping):
        return {key: _specified(child, names) for key, child in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_specified(child, names) for child in value)
    return None
