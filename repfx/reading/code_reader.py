"""Uses that a function makes of modules from attributes of `self`: attributes that it reads, and calls."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from types import FunctionType
from typing import Any, Protocol

from torch import nn

from repfx.algebra.layers import own_classes
from repfx.reading.value_flow import ANY_CHILD, ITSELF, NONE, Origins, ValueFlow, attribute_or_none, each_of
from repfx.records.module_tree import modules_in

PASSING = (enumerate, zip, reversed, list, tuple, set, frozenset, dict, iter, next, sorted, min, max)
# functions that call the modules that they are given
_CHECKPOINTS = frozenset({"checkpoint", "checkpoint_seq", "checkpoint_sequential"})
_OF_DICTS = frozenset({"values", "items", "get", "pop"})
_CHILDREN = frozenset({"children", "named_children", "_modules", "__dict__"}) | _OF_DICTS
HARMLESS = frozenset({"forward", "__call__", "training", "keys", "extra_repr", "_get_name"})
OF_LAYERS = frozenset(
    {"weight", "bias", "running_mean", "running_var", "num_batches_tracked", "eps", "momentum", "affine"}
)
OF_MODULES = frozenset(dir(nn.Module())) - HARMLESS | {"append", "extend", "insert", "update", "clear", "popitem"}
_FORMS = frozenset({"dtype", "device", "is_cuda"})
_GROWING = frozenset({"append", "extend", "insert", "add", "appendleft", "update", "setdefault"})
_VALUES = (int, float, bool, str, bytes, list, tuple, dict, set, frozenset, type(None), complex)


class Reading(Protocol):
    """The reading of one module's code, of which a function is a part."""

    module: nn.Module

    def note(self, origins: Origins, text: str) -> None:
        """Note a use of what comes from these attributes."""

    def note_given(self, origins: Origins, text: str) -> None:
        """Note that what comes from these attributes is given to a function that isn't known."""

    def note_type(self, text: str) -> None:
        """Note a question for the exact class of a value that is no module."""

    def method(self, name: str, arguments: tuple[Origins, ...], named: Mapping[str, Origins]) -> Origins:
        """Read a method of the module."""

    def function(
        self, function: Any, arguments: tuple[Origins, ...], named: Mapping[str, Origins], *, strict: bool = False
    ) -> Origins:
        """Read a function."""


class CodeReader(ValueFlow):
    """Reads one function of a module.

    Args:
        strict: reading any attribute of a child that may hold modules is a use, because nothing else reads this function.
    """

    def __init__(self, reading: Reading, function: Any, *, strict: bool) -> None:
        super().__init__(function)
        self.reading = reading
        self.strict = strict
        self._in_text = False

    def note(self, origins: Origins, node: ast.AST) -> None:
        if origins:
            self.reading.note(origins, _shortened(node))

    # ---- attributes

    def visit_Attribute(self, node: ast.Attribute, *, called: bool = False) -> Origins:
        if node.attr in _FORMS and self._is_first_parameter(node.value):
            return NONE
        owner = self.of(node.value)
        if node.attr == "type" and not called:  # a text or the like, which a cast would have been without
            return NONE
        others = owner - ITSELF
        if not self._holds_modules(others, node.attr):
            others = others if node.attr in OF_MODULES | OF_LAYERS else NONE
        if node.attr not in HARMLESS | _OF_DICTS and (self.strict or node.attr in OF_MODULES | OF_LAYERS):
            self.note(others, node)
        return (self._own(node) if "" in owner else NONE) | others

    def _own(self, node: ast.Attribute) -> Origins:
        """Read an attribute of `self`."""
        module = self.reading.module
        if node.attr in OF_MODULES - _CHILDREN - {"__class__"} - {*vars(module)} - self._own_names():
            self.note(ITSELF, node)
        return self.of_own(node.attr)

    def _holds_modules(self, origins: Origins, name: str) -> bool:
        """Whether an attribute of a child, or of a module inside it, may be a module or hold some."""
        inner = (each for child in self._children(origins) for each in child.modules())
        return name in _CHILDREN | {"forward", "__call__"} or any(_gives_more(each, name) for each in inner)

    def _children(self, origins: Origins) -> Iterable[nn.Module]:
        if "*" in origins:
            return (self.reading.module,)
        held = {**vars(self.reading.module), **self.reading.module._modules}
        return (each for name in origins for each in modules_in(held.get(name)))

    def _own_names(self) -> set[str]:
        return {name for base in written_classes(type(self.reading.module)) for name in vars(base)}

    def of_own(self, name: str) -> Origins:
        """Return where the value of an attribute of `self` comes from."""
        module = self.reading.module
        if name in _CHILDREN and name not in module._modules:
            return ANY_CHILD
        if module._modules.get(name) is not None:
            return frozenset({name})
        if name in vars(module):
            return frozenset({name}) if any(True for _ in modules_in(vars(module)[name])) else NONE
        return self.reading.method(name, (), {}) if name in self._own_names() else NONE

    def _is_first_parameter(self, node: ast.expr) -> bool:
        """Whether an expression is ``next(….parameters())``, whose dtype and device stay."""
        while isinstance(node, ast.Call) and node.args and _is_one_of(self.resolved(node.func), (next, iter)):
            node = node.args[0]
        return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "parameters"

    # ---- questions for classes

    def visit_JoinedStr(self, node: ast.JoinedStr) -> Origins:
        """Read a text. It may name the class of a value that is no module, as messages do."""
        before, self._in_text = self._in_text, True
        self.generic_visit(node)
        self._in_text = before
        return NONE

    def visit_Compare(self, node: ast.Compare) -> Origins:
        """Read a comparison. Whether two modules are the same one is no question for what they are."""
        operands = (node.left, *node.comparators)
        of_values = any(map(self._is_type, operands)) and all(
            self._is_type(each) or self._names_values(each) for each in operands
        )
        if not of_values and not self._asks_like_isinstance(operands):
            for operand in operands:
                self.of(operand)
        return NONE

    def _ask_type(self, node: ast.Call) -> Origins:
        origins = self.of(node.args[0])
        self.note(origins - ITSELF, node)
        if not origins and not self._in_text and not isinstance(node.args[0], ast.Constant):
            self.reading.note_type(ast.unparse(node))
        return NONE

    def _is_type(self, node: ast.expr) -> bool:
        return (
            isinstance(node, ast.Call)
            and self.resolved(node.func) is type
            and len(node.args) == 1
            and not self.of(node.args[0])
        )

    def _asks_like_isinstance(self, operands: tuple[ast.expr, ...]) -> bool:
        """Whether a comparison is one such as ``type(self.head) is Head``. A module of a class that is asked for stays of this class."""
        asked = [each for each in operands if isinstance(each, ast.Call)]
        named = [each for each in operands if not isinstance(each, ast.Call)]
        return (
            not self.strict
            and bool(asked and named)
            and all(
                isinstance(each.func, ast.Name) and each.func.id == "type" and len(each.args) == 1 for each in asked
            )
            and all(self.of(each.args[0]) - ITSELF for each in asked)
            and all(_is_written_class(each, self.resolved(each)) for each in named)
        )

    def _names_values(self, node: ast.expr) -> bool:
        """Whether an expression names classes of plain values, none of which a tensor has."""
        if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
            return all(self._names_values(each) for each in node.elts)
        return _is_one_of(self.resolved(node), _VALUES)

    # ---- calls

    def visit_Call(self, node: ast.Call) -> Origins:
        called = self.resolved(node.func)
        if called is super:
            return ITSELF
        if called is type and len(node.args) == 1:
            return self._ask_type(node)
        arguments = tuple(self.of(argument) for argument in node.args)
        named = {keyword.arg or "": self.of(keyword.value) for keyword in node.keywords}
        given = NONE.union(*arguments, *named.values())
        if self._grows(node.func, given):
            return NONE
        if isinstance(node.func, ast.Attribute):
            owner = self.of(node.func.value)
            if "" in owner:
                return self._call_own(node, arguments, named, given) | (owner - ITSELF)
            if owner:
                found = self.visit_Attribute(node.func, called=True)
                self.note(given, node)
                return found if node.func.attr in _OF_DICTS else NONE
        return self._call_other(node, called, arguments, named, given)

    def _call_own(
        self, node: ast.Call, arguments: tuple[Origins, ...], named: Mapping[str, Origins], given: Origins
    ) -> Origins:
        """Read a call of an attribute of `self`."""
        name = node.func.attr  # type: ignore[attr-defined]
        module = self.reading.module
        held = vars(module).get(name)
        if name in self._own_names() and name not in module._modules:
            return self.reading.method(name, arguments, named)
        if inspect.ismethod(held) or inspect.isfunction(held):
            bound = (ITSELF,) if getattr(held, "__self__", None) is module else ()
            return self.reading.function(getattr(held, "__func__", held), (*bound, *arguments), named, strict=True)
        origins = self.visit_Attribute(node.func, called=True)  # type: ignore[arg-type]
        self.note(given, node)
        return origins if name in _CHILDREN else NONE

    def _call_other(
        self,
        node: ast.Call,
        called: Any,
        arguments: tuple[Origins, ...],
        named: Mapping[str, Origins],
        given: Origins,
    ) -> Origins:
        """Read a call of anything but an attribute of a module."""
        if isinstance(node.func, ast.Name) and node.func.id in self.inner:
            self.bind_parameters(self.inner[node.func.id].args, arguments, named)
            return self.returned
        if not isinstance(node.func, (ast.Name, ast.Attribute)):
            self.of(node.func)
        if inspect.isfunction(called) and not given and self._is_read(node, called):
            # it may ask for the class of a value
            return self.reading.function(called, arguments, named, strict=self.strict)
        if not given or called is len or called is bool or getattr(called, "__name__", "") in _CHECKPOINTS:
            return NONE
        if called is isinstance and not self.strict and _is_plain_question(node, self.resolved):
            return NONE
        if _is_one_of(called, PASSING):
            return NONE.union(*(each_of(origins) for origins in (*arguments, *named.values())))
        if called is getattr:
            return self._get(node, arguments)
        if called is vars and given == ITSELF:
            return ANY_CHILD
        if called is hasattr and given == ITSELF:
            return NONE
        if inspect.isfunction(called) and "" not in named and not _is_torchs(called):
            return self.reading.function(
                called, arguments, named, strict=self.strict or not self._is_read(node, called)
            )
        if given:
            self.reading.note_given(given, _shortened(node))
        return NONE

    def _is_read(self, node: ast.Call, called: FunctionType) -> bool:
        """Whether the names that a function reads are seen by the rest of the reader, too, which can't read every lambda."""
        cls = type(self.reading.module)
        beside = getattr(sys.modules.get(cls.__module__), getattr(node.func, "id", ""), None)
        if beside is not called or called.__name__ == "<lambda>":
            return False
        return (called.__module__ or "").split(".")[0] == cls.__module__.split(".")[0]

    def _grows(self, function: ast.expr, given: Origins) -> bool:
        """Let a list or the like, which a variable holds, take what its method is given. Tell whether the call is such a method's."""
        if not (
            isinstance(function, ast.Attribute) and function.attr in _GROWING and isinstance(function.value, ast.Name)
        ):
            return False
        self.let(function.value.id, given)
        return True

    def _get(self, node: ast.Call, arguments: tuple[Origins, ...]) -> Origins:
        """Read a call of `getattr`."""
        name = node.args[1] if len(node.args) > 1 else None
        if isinstance(name, ast.Constant):
            return self.visit_Attribute(ast.Attribute(node.args[0], str(name.value), ast.Load())) | NONE.union(
                *arguments[2:]
            )
        self.note(arguments[0] - ITSELF, node)
        return ANY_CHILD if "" in arguments[0] else NONE


def _is_written_class(node: ast.expr, value: Any) -> bool:
    """Whether an expression names a class of modules that isn't one of torch, by the class's own name."""
    named = getattr(node, "attr", getattr(node, "id", None))
    return (
        type(value) is type
        and value.__name__ == named
        and value in written_classes(value)
        and issubclass(value, nn.Module)
    )


def written_classes(cls: type) -> tuple[type, ...]:
    """Return the class of a module and its bases, but for those of torch, whose methods are known by name."""
    return tuple(base for base in own_classes(cls) if not base.__module__.startswith("torch."))


def _shortened(node: ast.AST) -> str:
    text = " ".join(ast.unparse(node).split())
    return text if len(text) <= 60 else f"{text[:57]}…"


def _gives_more(module: nn.Module, name: str) -> bool:
    """Whether a module has an attribute that is, or may give, more than a plain value."""
    if name in module._modules or any(True for _ in modules_in(vars(module).get(name))):
        return True
    own = any(name in vars(base) for base in own_classes(type(module)))
    return own and not isinstance(attribute_or_none(module, name), (bool, int, float, str, tuple))


def _is_one_of(value: object, others: Iterable[object]) -> bool:
    """Whether a value is one of others, without asking it: a tensor has no answer."""
    return any(value is each for each in others)


def _is_torchs(function: Any) -> bool:
    return (function.__module__ or "").split(".")[0] == "torch"


def _is_plain_question(call: ast.Call, resolved: Callable[[ast.expr], Any]) -> bool:
    """Whether a call of `isinstance` is written so that the rest of the reader knows the classes: by their own names."""
    classes = call.args[1] if len(call.args) == 2 else None
    parts = classes.elts if isinstance(classes, ast.Tuple) else [classes]
    named = [(getattr(part, "attr", getattr(part, "id", None)), resolved(part)) for part in parts if part is not None]
    by_name = isinstance(call.func, ast.Name) and call.func.id == "isinstance"
    return by_name and bool(named) and all(type(found) is type and found.__name__ == name for name, found in named)
