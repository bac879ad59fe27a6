"""Conversion of dataclasses to nested plain values, which a file can hold, and back, with errors that name the key; and their schema."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from repfx.errors import InvalidInput, UnknownName

T = TypeVar("T")
_NAMES: dict[Any, str] = {str: "text", int: "a whole number", float: "a number", bool: "true or false", Path: "a path"}


def to_plain(value: Any) -> Any:
    """Return a dataclass as a dict, without the fields that are None.

    >>> from repfx.data.dataset import DataSource
    >>> to_plain(DataSource("digits"))
    {'name': 'digits', 'root': 'data', 'download': False, 'crop': 1.0, 'strict': False, 'options': {}}
    """
    if is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: to_plain(each) for key, each in value.items() if each is not None}
    if isinstance(value, (list, tuple)):
        return [to_plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value


def from_plain(kind: type[T], values: Any, where: str = "") -> T:
    """Build a dataclass of type `kind` from the values that `to_plain` returns.

    Args:
        where: key of `values` as a whole, for error messages.

    Raises:
        InvalidInput: a key is unknown or missing, or a value is of another type.
    """
    return _read(kind, values, where)  # type: ignore[no-any-return]


def _read(kind: Any, value: Any, where: str) -> Any:
    if get_origin(kind) in (Union, UnionType):
        kinds = [each for each in get_args(kind) if each is not NoneType]
        return value if value is None else _read(kinds[0], value, where)
    if kind is Any:
        return value
    if is_dataclass(kind):
        return _read_dataclass(kind, value, where)
    if get_origin(kind) in (tuple, list, Sequence):
        _require(isinstance(value, (list, tuple)), where, value, "a list")
        return (list if get_origin(kind) is list else tuple)(_read(get_args(kind)[0], each, where) for each in value)
    if get_origin(kind) is Literal:
        _require(value in get_args(kind), where, value, f"one of {', '.join(map(str, get_args(kind)))}")
        return value
    if get_origin(kind) is not None:
        _require(isinstance(value, Mapping), where, value, "a table")
        return dict(value)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and type(value) is int:
        _require(abs(value) < 2**63, where, value, "a number of usual size")
        return float(value)
    if kind not in _NAMES:
        return value
    _require(type(value) is kind or (kind is Path and isinstance(value, Path)), where, value, _NAMES[kind])
    return value


def _read_dataclass(kind: Any, values: Any, where: str) -> Any:
    _require(isinstance(values, Mapping), where, values, "a table")
    hints = get_type_hints(kind)
    for key in values:
        if key not in hints:
            raise UnknownName(f"key in {where}" if where else "key", key, hints)
    try:
        return kind(**{key: _read(hints[key], value, f"{where}.{key}".lstrip(".")) for key, value in values.items()})
    except TypeError as error:
        raise InvalidInput(f"{where or 'the recipe'} lacks something: {error}.") from error


def _require(condition: bool, where: str, found: Any, needed: str) -> None:
    if not condition:
        raise InvalidInput(f"{where} is {repr(found)[:80]}; it must be {needed}.")


_TYPES: dict[Any, str] = {str: "string", int: "integer", float: "number", bool: "boolean", Path: "string"}


def schema_of(kind: Any) -> dict[str, Any]:
    """Return the JSON Schema of the values that `from_plain` reads as a `kind`, with the docstrings' descriptions.

    >>> from repfx.data.dataset import DataSource
    >>> schema_of(DataSource)["properties"]["crop"]["type"], schema_of(tuple[int, ...])
    ('number', {'type': 'array', 'items': {'type': 'integer'}})
    """
    if get_origin(kind) in (Union, UnionType):
        kinds = [each for each in get_args(kind) if each is not NoneType]
        return schema_of(kinds[0]) if len(kinds) == 1 else {}
    if is_dataclass(kind):
        return _schema_of_dataclass(kind)
    if get_origin(kind) in (tuple, list, Sequence):
        return {"type": "array", "items": schema_of(get_args(kind)[0])}
    if get_origin(kind) is Literal:
        return {"enum": list(get_args(kind))}
    if get_origin(kind) is not None:
        return {"type": "object"}
    return {"type": _TYPES[kind]} if kind in _TYPES else {}


def _schema_of_dataclass(kind: Any) -> dict[str, Any]:
    hints, told = get_type_hints(kind), descriptions(kind)
    found: dict[str, Any] = {"type": "object", "additionalProperties": False, "properties": {}}
    for each in fields(kind):
        entry = schema_of(hints[each.name])
        if each.name in told:
            entry["description"] = told[each.name]
        if each.default is not MISSING and not is_dataclass(each.default) and each.default is not None:
            entry["default"] = to_plain(each.default)
        found["properties"][each.name] = entry
    required = [each.name for each in fields(kind) if each.default is MISSING and each.default_factory is MISSING]
    return {**found, "required": required} if required else found


def descriptions(kind: Any) -> dict[str, str]:
    """Return the entries under `Args:` of a class's docstring, by name; `mixup, cutmix: …` counts for both names."""
    text = inspect.cleandoc(kind.__doc__ or "").partition("Args:\n")[2].split("\n\n")[0]
    entries = re.findall(r"^    (\w[\w, ]*): (.*(?:\n        .*)*)", text, re.MULTILINE)
    return {name: " ".join(told.split()) for names, told in entries for name in names.split(", ")}


def put(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key of nested values, in place. None removes the key.

    Raises:
        InvalidInput: what the key leads through is no table.

    >>> values = {"data": {"name": "digits"}}
    >>> put(values, "training.epochs", 2)
    >>> put(values, "data.name", None)
    >>> values
    {'data': {}, 'training': {'epochs': 2}}
    """
    *outer, last = key.split(".")
    for name in outer:
        values = values.setdefault(name, {})
        if not isinstance(values, dict):
            raise InvalidInput(f"{key} can't be set: {name} is not a table.")
    if value is None:
        values.pop(last, None)
    else:
        values[last] = value


def flat(values: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Return nested values as one flat dict with dotted keys.

    >>> flat({"data": {"name": "digits"}, "spec": "dbb"})
    {'data.name': 'digits', 'spec': 'dbb'}
    """
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{where}.{key}".lstrip(".")
        found |= flat(value, name) if isinstance(value, Mapping) else {name: value}
    return found
