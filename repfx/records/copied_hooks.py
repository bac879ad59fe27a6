"""Hooks of a copied model: they reach the copy where the originals reach the model.

`copy.deepcopy` copies no functions. So a hook such as ``lambda module, args, output: self.found.append(output)`` would go on writing into
the original. And the copy of a `torch.fx.GraphModule` has no hooks at all.
"""

from __future__ import annotations

import copy
from types import CellType, FunctionType
from typing import Any

from torch import nn

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_SETTINGS = (
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_is_full_backward_hook",
)


def copy_hooks(original: nn.Module, copied: nn.Module, memo: dict[int, Any]) -> None:
    """Give the copy of a module its hooks. `memo` is what `copy.deepcopy` has copied so far, by the originals' ids."""
    for name in _HOOKS:
        for key, hook in vars(original)[name].items():
            vars(copied)[name][key] = _of_copy(copy.deepcopy(hook, memo), memo)
    if any(vars(original)[name] for name in _HOOKS):
        for name in _SETTINGS:
            setattr(copied, name, copy.deepcopy(vars(original)[name], memo))


def _of_copy(hook: Any, memo: dict[int, Any]) -> Any:
    """Return a hook that holds copies where the given one holds originals, in its closure or its defaults."""
    if not isinstance(hook, FunctionType):
        return hook
    cells = tuple(_cell_of_copy(cell, memo) for cell in hook.__closure__ or ())
    defaults = tuple(memo.get(id(value), value) for value in hook.__defaults__ or ())
    own = FunctionType(hook.__code__, hook.__globals__, hook.__name__, defaults, cells)
    own.__kwdefaults__ = {name: memo.get(id(value), value) for name, value in (hook.__kwdefaults__ or {}).items()}
    return own


def _cell_of_copy(cell: CellType, memo: dict[int, Any]) -> CellType:
    try:
        held = cell.cell_contents
    except ValueError:  # it is still empty
        return cell
    found = memo.get(id(held), held)
    return cell if found is held else CellType(found)
