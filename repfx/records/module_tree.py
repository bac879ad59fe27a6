"""Modules by their paths in a model."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from functools import partial
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from repfx.errors import InvalidInput, UnknownName


def require_module(model: object) -> None:
    """Raise `InvalidInput` if `model` is not a module."""
    if not isinstance(model, nn.Module):
        raise InvalidInput(f"model is of type {type(model).__name__}, not a torch.nn.Module.")


def require_sizes(model: nn.Module) -> None:
    """Raise InvalidInput if a parameter or buffer of a model has no size, as in a lazy layer that hasn't run yet."""
    lazy = next((name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if is_lazy(tensor)), None)
    if lazy is not None:
        raise InvalidInput(
            f"{lazy!r} has no size yet: run the model once, so that its lazy layers take the sizes of their inputs."
        )


def attribute(root: nn.Module, path: str) -> Any:
    """Return what a module holds at a path: a module, a parameter or anything else.

    Raises:
        AttributeError: the module holds nothing at the path.
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


def module_at(root: nn.Module, path: str) -> nn.Module | None:
    """Return the module at a path, or None."""
    found = attribute(root, path) if has(root, path) else None
    return found if isinstance(found, nn.Module) else None


def called_by(root: nn.Module, node: fx.Node) -> Any:
    """Return the module that a `call_module` node of a graph calls, one of `root`'s modules.

    `get_submodule` takes several times as long. It is asked for what isn't registered, such as a module that a property returns.
    """
    found: Any = root
    path = str(node.target)
    for name in path.split("."):
        held = vars(found).get("_modules", {})
        if name not in held:
            return root.get_submodule(path)
        found = held[name]
    return found


def outer_paths(path: str) -> list[str]:
    """Return the paths of all modules around `path`, outermost first.

    >>> outer_paths("layer1.0.conv1")
    ['', 'layer1', 'layer1.0']
    """
    parts = path.split(".")
    return [".".join(parts[:length]) for length in range(len(parts))]


def fits(path: str, pattern: str) -> bool:
    """Whether a path equals or matches a pattern; `*` also matches dots.

    >>> fits("layer1.0.conv1", "layer1.*"), fits("a[0]", "a[0]")
    (True, True)
    """
    return path == pattern or fnmatchcase(path, pattern)


def patterns_of(sites: str | Sequence[str]) -> Sequence[str]:
    """Return one pattern, or several, as several."""
    return [sites] if isinstance(sites, str) else sites


def chosen(sites: str | Sequence[str], paths: Collection[str], what: str) -> set[str]:
    """Return the paths that a pattern, or one of several, fits. The pattern `*` may fit none.

    Args:
        what: names the things at these paths in an error.

    Raises:
        UnknownName: another pattern fits none.

    >>> sorted(chosen(["a*", "c"], ["a1", "a2", "b", "c"], "block at"))
    ['a1', 'a2', 'c']
    """
    patterns = patterns_of(sites)
    for pattern in patterns:
        if pattern != "*" and not any(fits(path, pattern) for path in paths):
            raise UnknownName(what, pattern, paths)
    return {path for path in paths if any(fits(path, pattern) for pattern in patterns)}


def same_class(a: nn.Module, b: nn.Module) -> bool:
    """Whether two modules are of one class. Each GraphModule has a class of its own; all of these count as one."""
    return type(a) is type(b) or (isinstance(a, fx.GraphModule) and isinstance(b, fx.GraphModule))


def module_paths(model: nn.Module) -> dict[int, list[str]]:
    """Map each module's id to every path at which the module is registered or kept in a plain attribute."""
    paths: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(path)
    for path, name, other in kept_plainly(model):
        paths.setdefault(id(other), []).append(f"{path}.{name}".lstrip("."))
    return paths


def keepers(model: nn.Module) -> dict[str, list[tuple[str, str]]]:
    """Map the path of each module that plain attributes of other modules keep, to the paths of these modules and the attributes' names.

    >>> model = nn.Sequential(nn.Sequential(nn.ReLU()))
    >>> model.stages = [model[0]]
    >>> keepers(model)
    {'0': [('', 'stages')]}
    """
    registered = {id(module): path for path, module in model.named_modules()}
    found: dict[str, list[tuple[str, str]]] = {}
    for path, name, other in kept_plainly(model):
        if id(other) in registered:
            found.setdefault(registered[id(other)], []).append((path, name))
    return found


_TORCHS_OWN = frozenset(vars(nn.Module()))
_ATOMS = frozenset({bool, int, float, str, type(None)})  # most of what modules hold


def kept_plainly(model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """Yield the path of each module, the name of a plain attribute of it, and a module that this attribute keeps."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name not in _TORCHS_OWN and type(value) not in _ATOMS:
                yield from (
                    (path, name, other) for other in modules_in(value) if other is not module or not _is_bound(value)
                )


def _is_bound(value: object) -> bool:
    return isinstance(value, (MethodType, nn.Module))


def modules_in(value: Any, depth: int = 4) -> Iterator[nn.Module]:
    """Yield the modules that a value holds: in lists, tuples, sets and dicts, bound methods, closures and partial functions.

    >>> layer = nn.ReLU()
    >>> list(modules_in([(layer.forward, 1)])) == list(modules_in(lambda x, inner=layer: inner(x))) == [layer]
    True
    """
    if isinstance(value, nn.Module):
        yield value
    elif depth:
        for part in _parts_of(value):
            yield from modules_in(part, depth - 1)


def _parts_of(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return value
    if isinstance(value, partial):
        return (value.func, *value.args, *value.keywords.values())
    if isinstance(value, MethodType):
        return (value.__self__,)
    if isinstance(value, FunctionType):
        return (*enclosed_by(value).values(), *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
    return ()


def enclosed_by(function: FunctionType) -> dict[str, Any]:
    """Return the variables around a function that it reads, by name, as far as they have a value."""
    found = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
        with suppress(ValueError):  # the cell is still empty
            found[name] = cell.cell_contents
    return found


def set_part(model: nn.Module, path: str, source: nn.Module) -> None:
    """Give a model the module, parameter or buffer that another module holds at a path. A buffer is saved if it is saved there."""
    inner, _, name = path.rpartition(".")
    part, owner = attribute(source, path), source.get_submodule(inner)
    if isinstance(part, nn.Module):
        set_submodule(model, path, part)
    else:
        place_tensor(model, inner, name, part, saved=name not in owner._non_persistent_buffers_set)


def set_submodule(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at a path, and make an empty module for each parent that doesn't exist."""
    parent_path, _, name = path.rpartition(".")
    parent = model
    for part in parent_path.split(".") if parent_path else []:
        if not hasattr(parent, part):
            parent.add_module(part, nn.Module())
        parent = parent.get_submodule(part)
    setattr(parent, name, module)


def place_tensor(model: nn.Module, path: str, name: str, tensor: Tensor, *, saved: bool) -> None:
    """Give the module at a path a parameter or a buffer. A module is made if there is none.

    Args:
        saved: whether the state dict holds a buffer.
    """
    if path and not has(model, path):
        set_submodule(model, path, nn.Module())
    owner = model.get_submodule(path)
    if isinstance(tensor, nn.Parameter):
        owner.register_parameter(name, tensor)
    else:
        owner.register_buffer(name, tensor, persistent=saved)
