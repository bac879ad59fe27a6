"""The difference between two outputs: tensors in any nesting of tuples, lists, mappings and dataclasses."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from repfx.errors import InvalidInput


@dataclass(frozen=True)
class Difference:
    """How far one output is from its reference.

    Args:
        where: name of the output: ``output 0``, ``output 'out'``, ``output 1[0]``.
        error: ``max |a - b| / max |a|`` for a reference a; for an integer, or where all of a is zero, ``max |a - b|``.
        absolute: ``max |a - b|``.
        problem: why there is no number: another shape, NaN, or an infinity in only one of the two. Both errors are then infinite.
    """

    where: str
    error: float
    absolute: float
    problem: str | None = None


def differences(reference: object, value: object) -> list[Difference]:
    """Compare output by output. If the two are not built alike, return one `Difference` with a problem.

    Tuples and lists count as the same, and so do all mappings. NaN equals nothing; an infinity equals itself.
    Integers must be equal.

    Raises:
        InvalidInput: an output is of a type that can't be compared.

    >>> differences(torch.tensor([2.0, 4.0]), torch.tensor([2.0, 4.5]))
    [Difference(where='output 0', error=0.125, absolute=0.5, problem=None)]
    """
    expected, given = dict(leaves(reference)), dict(leaves(value))
    unmatched = [(where, "reference") for where in expected if where not in given]
    unmatched += [(where, "model") for where in given if where not in expected]
    if unmatched:
        where, owner = unmatched[0]
        return [_unlike(where, f"only the {owner} gives {where}")]
    return [_difference(where, leaf, given[where]) for where, leaf in expected.items()]


def worst(found: list[Difference]) -> Difference:
    """Return the largest of at least one difference."""
    return max(found, key=lambda difference: difference.error)


def leaves(value: object) -> Iterator[tuple[str, object]]:
    """Yield every value that a nested output holds, with its name."""
    children = _children(value)
    for key, child in [(0, value)] if children is None else children:
        yield from _nested(f"output {key!r}", child)


def count_numbers(value: object) -> int:
    """Count the numbers that a nested output holds."""
    return sum(
        leaf.numel() if isinstance(leaf, Tensor) else isinstance(leaf, (int, float)) for _, leaf in leaves(value)
    )


def _nested(where: str, value: object) -> Iterator[tuple[str, object]]:
    children = _children(value)
    if children is None:
        yield where, value
        return
    for key, child in children:
        yield from _nested(f"{where}[{key!r}]", child)


def _children(value: Any) -> list[tuple[object, object]] | None:
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, (tuple, list)):
        return list(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    return None


def _difference(where: str, reference: object, value: object) -> Difference:
    a, b = _as_tensor(reference), _as_tensor(value)
    if a is None and b is None:
        return _difference_of_constants(where, reference, value)
    if a is None or b is None:
        return _unlike(where, f"{where} is of type {_type(reference)} in the reference and {_type(value)} in the model")
    if a.shape != b.shape:
        return _unlike(where, f"{where} has shape {list(a.shape)} in the reference and {list(b.shape)} in the model")
    if _is_exact(a) != _is_exact(b):
        return _unlike(where, f"{where} is of {a.dtype} in the reference and of {b.dtype} in the model")
    if a.numel() == 0:
        return Difference(where, 0.0, 0.0)
    return _difference_of_integers(where, a, b) if _is_exact(a) else _difference_of_floats(where, a, b)


def _difference_of_floats(where: str, a: Tensor, b: Tensor) -> Difference:
    dtype = torch.complex128 if a.is_complex() or b.is_complex() else torch.float64
    a, b = a.to(dtype), b.to(dtype)
    without_number = [name for name, tensor in (("reference", a), ("model", b)) if tensor.isnan().any()]
    if without_number:
        return _unlike(where, f"{where} holds NaN in the {' and the '.join(without_number)}")
    apart = a != b
    for name, tensor in (("reference", a), ("model", b)):
        if not tensor[apart].isfinite().all():
            return _unlike(where, f"{where} holds an infinity in the {name} where the other gives something else")
    absolute = float((a - b)[apart].abs().max()) if apart.any() else 0.0
    finite = a[a.isfinite()].abs()
    scale = float(finite.max()) if finite.numel() else 0.0
    return Difference(where, absolute / scale if scale else absolute, absolute)


def _difference_of_integers(where: str, a: Tensor, b: Tensor) -> Difference:
    # Past 2^53 float64 can't tell neighbours apart, so equality is asked of the integers themselves.
    absolute = 0.0 if torch.equal(a, b) else max(1.0, float((a.double() - b.double()).abs().max()))
    return Difference(where, absolute, absolute)


def _difference_of_constants(where: str, reference: object, value: object) -> Difference:
    if not isinstance(reference, (str, bytes, type(None))):
        raise InvalidInput(
            f"{where} is of type {_type(reference)}, which can't be compared: return tensors or numbers."
        )
    if type(reference) is not type(value) or reference != value:
        return _unlike(where, f"{where} is {reference!r} in the reference and {value!r} in the model")
    return Difference(where, 0.0, 0.0)


def _as_tensor(value: object) -> Tensor | None:
    if isinstance(value, Tensor):
        tensor = value.detach()
        return (tensor.to_dense() if tensor.layout != torch.strided else tensor).cpu()
    if isinstance(value, (int, float, complex)):
        return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None, device="cpu")
    return None


def _is_exact(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex())


def _unlike(where: str, problem: str) -> Difference:
    return Difference(where, math.inf, math.inf, problem)


def _type(value: object) -> str:
    return type(value).__name__
