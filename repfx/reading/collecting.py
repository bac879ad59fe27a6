"""Code that may read what hooks collect: a trace runs no hooks, so it would find nothing there.

A hook may write into what it is bound to, what it closes over, its fixed arguments, and lists and dicts among the globals that it names.
Where a module holds one of these, too, the code of this module and of all modules around it may read it.
"""

from __future__ import annotations

import dis
import enum
import functools
from collections import deque
from collections.abc import Iterator
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

from repfx.algebra.layers import own_classes
from repfx.reading.source_code import globals_of
from repfx.records.module_tree import outer_paths

_CONTAINERS = (list, dict, set, deque)
_NEVER_WRITTEN = (
    type,
    ModuleType,
    FunctionType,
    MethodType,
    enum.Enum,
    str,
    bytes,
    int,
    float,
    complex,
    type(None),
    Tensor,
)
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_DEPTH = 3  # how far objects are followed into what they hold


def read_by_code(model: nn.Module) -> dict[str, str]:
    """Return why modules can't be traced whose code may read what hooks collect, by their paths."""
    hooks = [(path, hook) for path, module in model.named_modules() for hook in _hooks_of(module)]
    written = {id(each) for _, hook in hooks for each in _written_by(hook)}
    holders = {path for path, module in model.named_modules() if written and _holds(module, written)}
    holders |= {path for path, hook in hooks if _sets_attributes(hook)}
    reason = "it may read what a hook inside it writes, and hooks don't run while code is traced"
    return {outer: reason for path in holders for outer in (*outer_paths(path), path)}


def _hooks_of(module: nn.Module) -> Iterator[Any]:
    """Yield a module's forward hooks and pre-hooks, except torch's own, such as those of its old `weight_norm`."""
    for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
        if not (getattr(hook, "__module__", None) or "").startswith("torch."):
            yield hook


def _written_by(hook: Any) -> Iterator[object]:
    """Yield what a hook may write into."""
    for value in _held_by(hook):
        if isinstance(value, nn.Module):
            yield value
        yield from _inside(value, _DEPTH)


def _held_by(hook: Any) -> Iterator[Any]:
    if isinstance(hook, MethodType):
        yield hook.__self__
        yield from _held_by(hook.__func__)
    elif isinstance(hook, functools.partial):
        yield from (*hook.args, *hook.keywords.values())
        yield from _held_by(hook.func)
    elif isinstance(hook, FunctionType):
        yield from _closed_over(hook)
        yield from (*(hook.__defaults__ or ()), *(hook.__kwdefaults__ or {}).values())
        named = (hook.__globals__.get(name) for name in hook.__code__.co_names)
        yield from (value for value in named if isinstance(value, _CONTAINERS))
    else:
        yield hook


def _closed_over(function: FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # it is still empty
            continue


def _inside(value: Any, depth: int) -> Iterator[object]:
    """Yield an object that can be written into, and those that it holds. Modules are left out."""
    if isinstance(value, (nn.Module, *_NEVER_WRITTEN)):
        return
    if not isinstance(value, tuple):
        yield value
    held = value if isinstance(value, (list, tuple, set, deque)) else getattr(value, "__dict__", {}).values()
    for each in value.values() if isinstance(value, dict) else held:
        if depth:
            yield from _inside(each, depth - 1)


def _holds(module: nn.Module, written: set[int]) -> bool:
    """Whether hooks write into a module, into what it holds as an attribute, or into a list or dict among the globals of its code."""
    if id(module) in written:
        return True
    values = [value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE]
    for cls in own_classes(type(module)):
        if not cls.__module__.startswith("torch."):
            values += [value for value in globals_of(cls).values() if type(value) in _CONTAINERS]
    return any(id(each) in written for value in values for each in _inside(value, _DEPTH))


def _sets_attributes(hook: Any) -> bool:
    """Whether a hook may keep values as attributes of the module that it is given."""
    while isinstance(hook, (MethodType, functools.partial)):
        hook = hook.__func__ if isinstance(hook, MethodType) else hook.func
    code = getattr(hook, "__code__", None)
    return code is not None and any(
        step.opname == "STORE_ATTR" or step.argval == "setattr" for step in dis.get_instructions(code)
    )
