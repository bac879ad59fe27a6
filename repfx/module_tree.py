"""Modules by their paths in a model."""

from __future__ import annotations

from typing import Any

from torch import nn


def attribute(root: nn.Module, path: str) -> Any:
    """What a module holds at a path, module, parameter or anything else.

    Raises:
        AttributeError: nothing.
    """
    found: Any = root
    for part in path.split("."):
        found = getattr(found, part)
    return found


def has(root: nn.Module, path: str) -> bool:
    """Whether a module holds anything at a path."""
    try:
        attribute(root, path)
    except AttributeError:
        return False
    return True


def module_paths(model: nn.Module) -> dict[int, list[str]]:
    """Every path under which each module is registered, by the module's id."""
    paths: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(path)
    return paths


def set_submodule(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at a path whose parent exists; a path that doesn't gets empty modules on the way."""
    parent_path, _, name = path.rpartition(".")
    parent = model
    for part in parent_path.split(".") if parent_path else []:
        if not hasattr(parent, part):
            parent.add_module(part, nn.Module())
        parent = parent.get_submodule(part)
    setattr(parent, name, module)
