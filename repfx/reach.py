"""What the code of a module that can't be traced reaches for inside its children.

Such code runs as it is, so a layer that it takes from inside a child, as in ``self.stem.conv(x)``, has to stay what it is.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from typing import Any

from torch import nn

from repfx.meaning import is_batch_norm, is_conv


def layer_reached(module: nn.Module, names: frozenset[str]) -> str | None:
    """The path of a conv, BatchNorm or linear layer inside `module` that is called by one of these names, or None."""
    for path, layer in module.named_modules():
        if str(path).rpartition(".")[2] in names and (
            is_conv(layer) or is_batch_norm(layer) or isinstance(layer, nn.Linear)
        ):
            return str(path)
    return None


def names_reached(cls: type[nn.Module]) -> frozenset[str]:
    """The attributes that a class's forward, and what it calls of its own, reads from anything but `self`.

    None where there is no source to be read.

    >>> "conv2d" in names_reached(nn.Conv2d), "weight" in names_reached(nn.Conv2d)  # F.conv2d(…, self.weight)
    (True, False)
    """
    nodes = (node for node in _forward(cls) if isinstance(node, ast.Attribute))
    return frozenset(node.attr for node in nodes if not _is_self(node.value))


@cache
def calls(cls: Any, names: frozenset[str]) -> bool:
    """Whether a class's forward, or what it calls of its own, calls a function by one of these names.

    >>> calls(nn.Conv2d, frozenset({"conv2d"})), calls(nn.ReLU, frozenset({"conv2d"}))
    (True, False)
    """
    functions = (node.func for node in _forward(cls) if isinstance(node, ast.Call))
    return any(
        (isinstance(function, ast.Name) and function.id in names)
        or (isinstance(function, ast.Attribute) and not _is_self(function.value) and function.attr in names)
        for function in functions
    )


def _forward(cls: type[nn.Module]) -> Iterator[ast.AST]:
    """All that a class's forward is written of, and the methods and properties of its own that it reads."""
    pending, seen = ["forward"], {"forward"}
    while pending:
        for node in _code(cls, pending.pop()):
            yield node
            if isinstance(node, ast.Attribute) and _is_self(node.value) and node.attr not in seen:
                seen.add(node.attr)
                pending.append(node.attr)


def _code(cls: type[nn.Module], name: str) -> Iterator[ast.AST]:
    """All that a method or property is written of, in the class and those that it inherits from."""
    for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        found = vars(base).get(name)
        function = found.fget if isinstance(found, property) else found
        try:
            yield from ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function))))  # type: ignore[arg-type]
        except (OSError, TypeError, SyntaxError):
            continue


def _is_self(value: ast.expr) -> bool:
    """Whether the instance itself is meant, or what it inherits."""
    own_name = isinstance(value, ast.Name) and value.id == "self"
    return own_name or (isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "super")
