"""Parts of a model that plain attributes keep, too, such as a list of registered modules. Untraced code may call what they keep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from torch import fx, nn

from repfx.records.module_tree import keepers
from repfx.tracing.leaves import is_leaf

# for each part by its path: the paths of the modules that keep it, and the attributes' names
Kept: TypeAlias = Mapping[str, list[tuple[str, str]]]


def kept_in(model: nn.Module) -> Kept:
    """Return the parts that plain attributes keep, but for layers: rules leave alone a layer that is kept twice."""
    return {path: found for path, found in keepers(model).items() if not is_leaf(model.get_submodule(path))}


def kept_from_outside(path: str, kept: Kept) -> str | None:
    """Why a module has to stay the object that it is: code outside may call it, or a part of it, by a plain attribute. None if not."""
    inside = f"{path}." if path else ""
    return next(
        (
            f"{attribute_of(keeper)} keeps {'it' if part == path else repr(part)} as a plain attribute"
            for part, keepers_of_it in kept.items()
            if f"{part}.".startswith(inside)
            for keeper in keepers_of_it
            if not f"{keeper[0]}.".startswith(inside)
        ),
        None,
    )


def kept_by_a_leaf(path: str, graph: fx.Graph, kept: Kept) -> str | None:
    """Why a graph can't take a module's place: a leaf of it keeps another part of the module. None if no leaf does."""
    prefix = f"{path}." if path else ""
    called = [f"{prefix}{node.target}." for node in graph.nodes if node.op == "call_module"]
    return next(
        (
            f"{attribute_of(keeper)} keeps {part!r} as a plain attribute"
            for part, keepers_of_it in kept.items()
            for keeper in keepers_of_it
            for leaf in called
            if part.startswith(prefix) and f"{keeper[0]}.".startswith(leaf) and not f"{part}.".startswith(leaf)
        ),
        None,
    )


def attribute_of(keeper: tuple[str, str]) -> str:
    """Return the name of an attribute and of the module that has it, as text."""
    return f"{keeper[1]!r} of {keeper[0]!r}" if keeper[0] else f"{keeper[1]!r} of the model"
