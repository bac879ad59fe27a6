"""Nested values, such as `state_dict()` returns, split into JSON and named tensors. Nothing is pickled, and all comes back as it was."""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import Any

from torch import Tensor

from repfx.errors import InvalidInput

_PLAIN = (str, int, float, bool, type(None))
_DICTS: dict[type, str] = {dict: "dict", OrderedDict: "dict", Counter: "counter"}


def take_apart(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Return the value as JSON, and copy its tensors to the CPU into `tensors`, under names that begin with `name`.

    The value may hold numbers, text, None, lists, tuples, dicts and tensors. The types of containers and of keys are kept.

    Raises:
        InvalidInput: the value holds something else.

    >>> import torch
    >>> tensors = {}
    >>> take_apart({"step": torch.tensor(3), "betas": (0.9, 0.99)}, "adam", tensors)
    {'dict': [['step', {'tensor': 'adam.step'}], ['betas', {'tuple': [0.9, 0.99]}]]}
    >>> tensors
    {'adam.step': tensor(3)}
    """
    if isinstance(value, Tensor):
        if value.is_complex() or value.is_sparse or value.is_quantized:
            raise InvalidInput(f"{name} is a {value.dtype} tensor of layout {value.layout}, which can't be saved.")
        while name in tensors:  # the keys 1 and "1" of one dict
            name += "'"
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": name}
    if type(value) in _PLAIN:
        return value
    if isinstance(value, float):  # a subclass, such as numpy's float64
        return float(value)
    if type(value) in (list, tuple):
        kind = type(value).__name__
        return {kind: [take_apart(entry, f"{name}.{index}", tensors) for index, entry in enumerate(value)]}
    if type(value) in _DICTS and all(type(key) in _PLAIN for key in value):
        return {
            _DICTS[type(value)]: [[key, take_apart(entry, f"{name}.{key}", tensors)] for key, entry in value.items()]
        }
    raise InvalidInput(f"{name} is of type {type(value).__name__}, which can't be saved: use numbers, text or tensors.")


def put_together(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Rebuild the value that `take_apart` split into JSON and tensors.

    Raises:
        ValueError, LookupError, TypeError: the JSON is something else.
    """
    if not isinstance(value, dict):
        if isinstance(value, list):
            raise ValueError("a list stands where a value has to be")
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind in ("dict", "counter"):
        found = {key: put_together(entry, tensors) for key, entry in content}
        return Counter(found) if kind == "counter" else found
    entries = [put_together(entry, tensors) for entry in content]
    return {"list": list, "tuple": tuple}[kind](entries)
