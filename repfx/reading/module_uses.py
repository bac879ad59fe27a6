"""Uses of modules by the code that holds them, read from its text: each one that isn't known to be harmless.

Untraced code runs as it is, on layers that may have changed. It may call them, index them, go through them and ask whether they are there.
Whatever else it does with a module, such as ``type(layer)``, ``layer.eval()`` or ``measure(layer)``, might have another result afterwards.
So the code's values are followed from the attributes of `self`: through variables, loops, methods, and functions whose source can be read.
"""

from __future__ import annotations

import builtins
import inspect
import math
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repfx.algebra.layers import own_classes
from repfx.reading.code_reader import HARMLESS, OF_LAYERS, OF_MODULES, PASSING, CodeReader, written_classes
from repfx.reading.function_source import all_names, function_node, names_beside
from repfx.reading.value_flow import ITSELF, NONE, Origins

# what a function whose source can't be read may name
_PLAIN_CALLS = (*PASSING, len, bool, range, int, float, sum, abs, super, torch, F, torch.nn, math)


@dataclass
class Uses:
    """The uses of a module's children in its code that aren't known to be harmless, each as text, by the child's name.

    The name "*" stands for any child. `given` holds each call that gives a child to a function that isn't known, by the code that makes the
    call. `unread` holds what is given to functions whose source can't be read, although they name nothing but
    layers and what is done to tensors. `types` holds each question for the exact class of a value that is no module.
    """

    of_children: dict[str, str] = field(default_factory=dict)
    given: dict[str, dict[CodeType | None, str]] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)
    types: list[str] = field(default_factory=list)

    def of(self, name: str, ran: Container[CodeType] | None) -> str | None:
        """Return the first use of a child, or None.

        Args:
            name: the child's.
            ran: the code that ran while the module was traced; None if it can't be traced. Code that was traced does no more than call a
                child, if its names say nothing else; and code that did not run then gives no child away in a usual call.
        """
        found = {**self.unread, **self.of_children} if ran is None else self.of_children
        use = found.get(name, found.get("*"))
        away = {**self.given.get("*", {}), **self.given.get(name, {})}
        return use or next((text for code, text in away.items() if ran is None or code is None or code in ran), None)


def uses_in(module: nn.Module, methods: Iterable[str] = ("forward",)) -> Uses:
    """Read methods of a module, with everything they call whose source can be read, and return what they do with its children."""
    reading = _Reading(module)
    for name in methods:
        reading.method(name, (), {})
    return reading.uses


@dataclass
class _Reading:
    """One module's code as far as it has been read."""

    module: nn.Module
    uses: Uses = field(default_factory=Uses)
    results: dict[Any, Origins] = field(default_factory=dict)
    code: CodeType | None = None  # of the function that is read now

    def note(self, origins: Origins, text: str) -> None:
        for name in origins:
            self.uses.of_children.setdefault(name or "*", text)

    def note_given(self, origins: Origins, text: str) -> None:
        for name in origins:
            self.uses.given.setdefault(name or "*", {}).setdefault(self.code, text)

    def note_type(self, text: str) -> None:
        self.uses.types.append(text)

    def _note_unread(self, function: Any, given: Origins) -> None:
        """Note a function whose source can't be read. The functions of the module that it names are read, if that can be done."""
        names = frozenset(all_names(inspect.unwrap(function).__code__))
        text = f"{function.__qualname__}, whose source can't be read"
        found = self.uses.unread if self._are_plain(names, function) else self.uses.of_children
        for name in given:
            found.setdefault(name or "*", text)
        if "type" in names:
            self.note_type(text)
        for name in sorted(names) if given else ():
            self.method(name, (), {})
            held = vars(self.module).get(name)
            if inspect.isfunction(held):
                self.function(held, (given,) * held.__code__.co_argcount, {}, strict=True)

    def _are_plain(self, names: frozenset[str], function: Any) -> bool:
        """Whether all names in a function's bytecode are those of attributes of `self`, of what tensors do, or of torch's functions."""
        module, beside = self.module, names_beside(function)
        known = {*vars(module), *module._modules, *module._parameters, *module._buffers, *HARMLESS}
        known |= {name for base in own_classes(type(module)) for name in vars(base)}
        return all(
            name in known
            or (
                name not in OF_MODULES | OF_LAYERS
                and not name.startswith("__")
                and (hasattr(Tensor, name) or hasattr(F, name))
            )
            or any(beside.get(name, getattr(builtins, name, None)) is each for each in _PLAIN_CALLS)
            for name in names
        )

    def method(self, name: str, arguments: tuple[Origins, ...], named: Mapping[str, Origins]) -> Origins:
        """Read a method or property in the class of the module and in each base, and return where its results come from."""
        found = NONE
        for base in written_classes(type(self.module)):
            value = vars(base).get(name)
            is_static = isinstance(value, staticmethod)
            function = getattr(value, "fget", None) or getattr(value, "func", None) or getattr(value, "__func__", value)
            if inspect.isfunction(function):
                found |= self.function(function, arguments if is_static else (ITSELF, *arguments), named)
        return found

    def function(
        self, function: Any, arguments: tuple[Origins, ...], named: Mapping[str, Origins], *, strict: bool = False
    ) -> Origins:
        """Read a function, given where its arguments come from, and return where its results come from."""
        key = (function, arguments, tuple(sorted(named.items())), strict)
        if key not in self.results:
            self.results[key] = NONE  # for calls of itself
            node = function_node(function)
            if node is None:
                self._note_unread(function, NONE.union(*arguments, *named.values()))
                return NONE
            around, self.code = self.code, inspect.unwrap(function).__code__
            self.results[key] = CodeReader(self, function, strict=strict).read(node, arguments, named)
            self.code = around
        return self.results[key]
