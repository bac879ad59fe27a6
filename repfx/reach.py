"""What the code of a module that can't be traced reaches for inside its children.

Such code runs as it is, so a layer that it takes from inside a child, as in ``self.stem.conv(x)``, has to stay what it is.
"""

from __future__ import annotations

import ast
import inspect
import textwrap

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
    """The attributes that the code of a class reads from anything but `self`; none where there is no source to be read.

    >>> "conv2d" in names_reached(nn.Conv2d), "weight" in names_reached(nn.Conv2d)  # F.conv2d(…, self.weight)
    (True, False)
    """
    names: set[str] = set()
    for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):
            continue
        names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and not _is_self(node.value)}
    return frozenset(names)


def _is_self(value: ast.expr) -> bool:
    return isinstance(value, ast.Name) and value.id == "self"
