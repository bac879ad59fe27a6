"""The axes of a model's inputs that an ONNX file leaves free, by name, and inputs that differ in size along them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from repfx.errors import InvalidInput, UnknownName
from repfx.measuring.in_float64 import Inputs, as_arguments, by_name, map_tensors

AxisNames: TypeAlias = Mapping[str, Mapping[int, str]]

BATCH = "batch"
_SIDES = {1: ("length",), 2: ("height", "width"), 3: ("depth", "height", "width")}
_STEP = 32  # how much sides grow in a check; nets that halve their input five times take only multiples of 32


@dataclass(frozen=True)
class FreeAxes:
    """Names of the free axes of each tensor of an input, in order. Axes that share a name have the same size.

    >>> free = FreeAxes.usual(torch.zeros(2, 3, 8, 6), batch=True, size=True)
    >>> free.names, free.sizes(torch.zeros(2, 3, 8, 6))
    (({0: 'batch', 2: 'height', 3: 'width'},), {'batch': 2, 'height': 8, 'width': 6})
    """

    names: tuple[Mapping[int, str], ...] = ()

    @classmethod
    def usual(cls, x: Inputs, *, batch: bool, size: bool) -> FreeAxes:
        """Free the first axis, the axes from the third on, or both, in each tensor that is as long along them as the first tensor.

        Raises:
            InvalidInput: `size` is set, and the first tensor has no third axis or too many axes.
        """
        tensors = [tensor for tensor in tensors_of(x) if tensor.dim()]
        if not tensors:
            return cls()
        wanted = {0: BATCH} if batch else {}
        if size:
            sides = _SIDES.get(tensors[0].dim() - 2)
            if sides is None:
                raise InvalidInput(
                    f"dynamic_size=True frees the axes from the third on, such as height and width, but x has {tensors[0].dim()} "
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
        """Free the axes that a user names, such as ``{"x": {0: "batch", 2: "height"}}``. Inputs have the names that forward gives them.

        Raises:
            InvalidInput: the model has no such input, an input has no such axis, or two axes of one name differ in size.
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
        """Return the size of x along each free axis.

        Raises:
            InvalidInput: two axes of one name differ in size.
        """
        found: dict[str, int] = {}
        for tensor, names in zip(tensors_of(x), self.names):
            for axis, name in names.items():
                if found.setdefault(name, tensor.shape[axis]) != tensor.shape[axis]:
                    raise InvalidInput(
                        f"two axes of x are named {name!r} and are {found[name]} and {tensor.shape[axis]} long: "
                        "give axes one name only if they always have the same size."
                    )
        return found

    def resized(self, x: Inputs, sizes: Mapping[str, int]) -> Any:
        """Return x with these sizes along the axes that they name, made of the numbers of x in another order."""
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
        """Yield new sizes of all free axes, to try in turn: sides grown by different amounts, by the same amount, and doubled."""
        sizes = self.sizes(x)
        first = {names[0] for names in self.names if 0 in names}
        sides = [name for name in sizes if name not in first]
        more = {name: size + 1 for name, size in sizes.items()}
        yield more | {name: sizes[name] + _STEP * place for place, name in enumerate(sides, 1)}
        if sides:
            yield more | {name: sizes[name] + _STEP for name in sides}
            yield more | {name: sizes[name] * 2 for name in sides}

    def specification(self, model: nn.Module, x: Inputs) -> Any:
        """Return what torch.export needs to know of the axes of each tensor, by the model's arguments; None if no axis is free."""
        if not self:
            return None
        names = {id(tensor): own for tensor, own in zip(tensors_of(x), self.names)}
        args, kwargs = as_arguments(x)
        return _specified(by_name(model, x) or kwargs or args, names)


def tensors_of(x: Any) -> list[Tensor]:
    """Return the tensors in a nesting, in the order in which an exported file takes them."""
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
            raise InvalidInput(
                f"axis {axis} of input {name!r} is to be called {label!r}: give a name such as 'height'."
            )
    return {axis % tensor.dim(): label for axis, label in axes.items()}


def _specified(value: Any, names: Mapping[int, Mapping[int, str]]) -> Any:
    if isinstance(value, Tensor):
        # With a named Dim torch refuses a model that takes only some sizes, such as even ones. DYNAMIC leaves that to the runtime.
        return dict.fromkeys(names.get(id(value), {}), torch.export.Dim.DYNAMIC) or None
    if isinstance(value, Mapping):
        return {key: _specified(child, names) for key, child in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_specified(child, names) for child in value)
    return None
