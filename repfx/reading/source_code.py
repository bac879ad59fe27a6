"""Code that isn't traced, read from its text: what it takes from inside its children, and whether it writes in place.

Such code runs as it is. So a layer that it takes from inside a child, as in ``self.stem.conv(x)``, has to stay what it is.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import sys
import textwrap
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from types import CodeType, ModuleType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from repfx.algebra.layers import is_batch_norm, is_conv_or_linear, is_plain_sequence, own_classes
from repfx.reading.function_source import all_names, reads_global
from repfx.reading.further_arguments import only_passed_on
from repfx.reading.module_uses import Uses, uses_in
from repfx.records.module_tree import module_at


@dataclass(frozen=True)
class Around:
    """Facts about untraceable code around a module: what it reads of the module, or of the modules inside it.

    Args:
        names: names of attributes that the code reads from anything but `self`.
        classes: names of classes that the code asks for with `isinstance`, or compares a `type` with.
        taken_apart: names of attributes of `self` that the code does more with than call them; it may index them or iterate over them.
        indexes: whether the code calls the result of an index, as in ``layers[0](x)``.
        lists_children: whether the code goes through children by their order.
        sets_modes: names of attributes of `self` that its `train` mentions, for example a BatchNorm that stays frozen.
        passes_more: whether the code gives something that may be a module more than one argument, or an argument by keyword.
        passes_nothing: whether the code calls something that may be a module without an argument.
        uses: what the code does with children of the module around, where that isn't known to be harmless.
        closed: why nothing inside a module may be changed, or None.
        asks_for_bias: whether the code asks if a layer has a bias.
        reads_weights: whether the code reads a weight, and its text doesn't say of which layer.
        weights_of: the layers, by id, whose weights the code reads by their paths, as in ``self.embed.proj.weight``.
    """

    names: frozenset[str] = frozenset()
    classes: frozenset[str] = frozenset()
    taken_apart: frozenset[str] = frozenset()
    indexes: bool = False
    lists_children: bool = False
    passes_more: bool = False
    passes_nothing: bool = False
    sets_modes: frozenset[str] = frozenset()
    uses: Uses = field(default_factory=Uses)
    closed: str | None = None
    asks_for_bias: bool = False
    reads_weights: bool = False
    weights_of: frozenset[int] = frozenset()

    def toward(self, child: str, ran: Container[CodeType] | None = None) -> Around:
        """Return the facts for one child of the module whose code was read last. `ran` is the code that ran if it was traced."""
        use = self.uses.of(child, ran)
        reason = f"code around it uses it in a way that repfx doesn't know: {use}"
        return self if use is None else replace(self, closed=self.closed or reason)

    def inside(self, module: nn.Module) -> Around:
        """Return the facts for the modules inside `module`: these, and those about the code of `module` itself.

        `taken_apart` and `sets_modes` name attributes of `module` alone.
        """
        code = list(_code_of(type(module), ("forward", "train", *self._members(module)), helpers=True))
        calls = [node for node in code if isinstance(node, ast.Call)]
        attributes = [node for node in code if isinstance(node, ast.Attribute)]
        named = [
            _named_by(node.value, module) for node in attributes if node.attr == "weight" and not _is_self(node.value)
        ]
        no_modules = _results(code, module) | _classes_read(code, type(module))
        used_whole = {id(call.func) for call in calls} | {id(node.value) for node in attributes}
        return Around(
            self.names | _names_read(attributes, no_modules) | _names_by_text(calls),
            self.classes | _classes_asked_for(calls) | _classes_compared(code),
            frozenset(node.attr for node in attributes if _is_self(node.value) and id(node) not in used_whole),
            self.indexes or any(isinstance(call.func, ast.Subscript) for call in calls),
            self.lists_children or any(node.attr in _LISTS and not _is_self(node.value) for node in attributes),
            self.passes_more or any(_passes_more(call) and _may_be_of_a_module(call, type(module)) for call in calls),
            self.passes_nothing
            or any(_passes_nothing(call) and _may_be_of_a_module(call, type(module)) for call in calls),
            frozenset(
                node.attr
                for node in _code_of(type(module), ("train",), helpers=False)
                if isinstance(node, ast.Attribute) and _is_self(node.value)
            ),
            uses_in(module, ("forward", *self._members(module))),
            self.closed,
            self.asks_for_bias or any(map(_asks_for_bias, code)),
            self.reads_weights or None in named or "weight" in _names_by_text(calls),
            self.weights_of | {id(layer) for layer in named if layer is not None},
        )

    def reads_weight_of(self, layer: nn.Module) -> bool:
        """Whether the code may read the weight of a layer."""
        return self.reads_weights or id(layer) in self.weights_of

    def reason(self, module: nn.Module) -> str | None:
        """Why a module can't become a graph, or None."""
        what = "code around it, which can't be traced,"
        part = next((path for path, each in module.named_modules() if self._reads(path, each)), None)
        if part is not None:
            return f"{what} reaches for its {part!r}"
        if is_plain_sequence(module):
            return None
        asked = asked_for(module, self.classes)
        if asked is not None:
            return f"{what} asks whether it is a {asked}"
        return next((f"{what} reads its {member!r}" for member in self._members(module)), None)

    def _members(self, module: nn.Module) -> list[str]:
        """The module's own methods that the code calls instead of its forward, and the properties that it reads.

        Classes of repfx don't count, because the code knows nothing of a block: a `squeeze` in it is a tensor's, a `train` any module's.
        """
        classes = [cls for cls in own_classes(type(module)) if not cls.__module__.startswith("repfx.")]
        own = {name for cls in classes for name in vars(cls)}
        return sorted(name for name in own & self.names if not _is_value(module, name))

    @property
    def order_of_children(self) -> str | None:
        """Why nothing inside the module may be changed, or None."""
        listed = "code around it, which can't be traced, goes through children by their order"
        return listed if self.lists_children else self.closed

    def other_arguments(self, module: nn.Module) -> str | None:
        """Why tracing can't assume that a module is given its first argument, and that others have their defaults, or None."""
        parameters = list(inspect.signature(module.forward).parameters.values())
        first, others = (
            next((each.name for each in some if each.default is not inspect.Parameter.empty), None)
            for some in (parameters[:1], parameters[1:])
        )
        if others is None and self.passes_more:
            others = min(only_passed_on(type(module).forward, type(module)), default=None)
        if self.passes_more and others is not None:
            return f"code around it, which can't be traced, may give it {others!r}"
        if self.passes_nothing and first is not None:
            return f"code around it, which can't be traced, may call it without {first!r}"
        return None

    def takes_apart(self, path: str) -> bool:
        """Whether the code may run a plain sequence at a path in parts."""
        return self.indexes or path.rpartition(".")[2] in self.taken_apart

    def _reads(self, path: str, part: nn.Module) -> bool:
        """Whether the code reads a part of a module by its name, and the part is or holds a layer that may be merged."""
        named = path.rpartition(".")[2] in self.names
        return named and any(is_conv_or_linear(inner) or is_batch_norm(inner) for inner in part.modules())


_LISTS = frozenset({"children", "named_children", "_modules"})


def _is_value(module: nn.Module, name: str) -> bool:
    """Whether an attribute has a special name (``__name__``) or is a plain value; a graph that replaces the module has these, too."""
    return name.startswith("__") or isinstance(getattr(module, name, None), (bool, int, float, str, tuple))


def asked_for(module: nn.Module, classes: frozenset[str]) -> str | None:
    """Return the name of the first of a module's classes before `nn.Module` that is in `classes`, or None."""
    return next((cls.__name__ for cls in own_classes(type(module)) if cls.__name__ in classes), None)


def _names_read(attributes: list[ast.Attribute], no_modules: frozenset[str]) -> frozenset[str]:
    """The names of attributes that code reads, except from `self` and from what has a name in `no_modules`."""
    return frozenset(
        node.attr
        for node in attributes
        if not (_is_self(node.value) or (isinstance(node.value, ast.Name) and node.value.id in no_modules))
    )


def _named_by(value: ast.expr, module: nn.Module) -> nn.Module | None:
    """Return the part of a module that code names by a path from `self`, as in ``self.embed.proj``, or None."""
    names: list[str] = []
    while isinstance(value, ast.Attribute):
        names.append(value.attr)
        value = value.value
    return module_at(module, ".".join(reversed(names))) if names and _is_self(value) else None


def _results(code: list[ast.AST], module: nn.Module) -> frozenset[str]:
    """The names of variables that only ever hold outputs of children, or new objects that are no modules."""
    assigned: Counter[str] = Counter()
    for node in code:
        if isinstance(node, ast.Assign) and _gives_no_module(node.value, module):
            assigned.update(target.id for target in node.targets if isinstance(target, ast.Name))
    bound = Counter(map(_bound, code))
    return frozenset(name for name, times in assigned.items() if bound[name] == times)


def _classes_read(code: list[ast.AST], cls: type[nn.Module]) -> frozenset[str]:
    """The names of classes and of Python's modules that code of a class reads, as in ``Base.forward(self, x)``, and never binds itself."""
    beside = (function.__globals__ for function in _functions_beside(cls).values())
    scopes = list({id(scope): scope for scope in (*map(globals_of, own_classes(cls)), *beside)}.values())
    names = {node.id for node in code if isinstance(node, ast.Name)} - set(map(_bound, code))
    values = {name: [scope[name] for scope in scopes if name in scope] for name in names}
    return frozenset(name for name, found in values.items() if found and all(map(_is_class, found)))


def _is_class(value: object) -> bool:
    return isinstance(value, (type, ModuleType))


def _bound(node: ast.AST) -> str | None:
    """The name that a node binds as a variable, an import or an argument, or None."""
    if isinstance(node, ast.Name):
        return node.id if isinstance(node.ctx, ast.Store) else None
    if isinstance(node, ast.alias):
        return node.asname or node.name
    return node.arg if isinstance(node, ast.arg) else None


def _gives_no_module(value: ast.expr, module: nn.Module) -> bool:
    if not isinstance(value, ast.Call):
        return False
    if isinstance(value.func, ast.Attribute) and _is_self(value.func.value):
        return isinstance(getattr(module, value.func.attr, None), nn.Module)
    name = value.func.id if isinstance(value.func, ast.Name) else ""
    made = globals_of(type(module)).get(name, getattr(builtins, name, None))
    return isinstance(made, type) and not issubclass(made, nn.Module)


def _classes_asked_for(calls: list[ast.Call]) -> frozenset[str]:
    """The names of the classes in calls of `isinstance`."""
    return _class_names(call.args[1] for call in calls if _calls_by_name(call, "isinstance") and len(call.args) == 2)


def _classes_compared(code: list[ast.AST]) -> frozenset[str]:
    """The names of the classes in comparisons such as ``type(module) is Class``."""
    compared = [(node.left, *node.comparators) for node in code if isinstance(node, ast.Compare)]
    return _class_names(
        each
        for operands in compared
        if any(isinstance(each, ast.Call) and _calls_by_name(each, "type") for each in operands)
        for each in operands
        if not isinstance(each, ast.Call)
    )


def _class_names(expressions: Iterable[ast.expr]) -> frozenset[str]:
    nodes = (node for each in expressions for node in ast.walk(each))
    return frozenset(
        node.attr if isinstance(node, ast.Attribute) else node.id
        for node in nodes
        if isinstance(node, (ast.Attribute, ast.Name))
    )


def _asks_for_bias(node: ast.AST) -> bool:
    """Whether a node asks if a layer other than `self` has a bias, as in ``conv.bias is None`` or ``getattr(conv, "bias", None)``."""
    if isinstance(node, ast.Call):
        return "bias" in _names_by_text([node])
    asked: list[ast.expr] = []
    if isinstance(node, ast.Compare):
        asked = [node.left, *node.comparators]
    elif isinstance(node, (ast.If, ast.IfExp, ast.While, ast.Assert)):
        asked = [node.test]
    elif isinstance(node, ast.BoolOp):
        asked = node.values
    elif isinstance(node, ast.UnaryOp):
        asked = [node.operand]
    return any(isinstance(each, ast.Attribute) and each.attr == "bias" and not _is_self(each.value) for each in asked)


def _names_by_text(calls: list[ast.Call]) -> frozenset[str]:
    """The names of attributes that code reads by text, as in ``getattr(module, "name")``."""
    named = [call.args[1] for call in calls if _calls_by_name(call, "getattr") and len(call.args) > 1]
    return frozenset(str(each.value) for each in named if isinstance(each, ast.Constant))


def _passes_more(call: ast.Call) -> bool:
    """Whether a call has more than one argument, or an argument by keyword."""
    return len(call.args) > 1 or bool(call.keywords) or any(isinstance(each, ast.Starred) for each in call.args)


def _passes_nothing(call: ast.Call) -> bool:
    """Whether a call may have no argument at all."""
    certain = [each for each in call.args if not isinstance(each, ast.Starred)]
    return not certain and all(each.arg is None for each in call.keywords)


def _may_be_of_a_module(call: ast.Call, cls: type[nn.Module]) -> bool:
    """Whether something that is called in the code of a class may be a module."""
    if isinstance(call.func, ast.Attribute):
        own = _is_self(call.func.value)
        if hasattr(cls if own else Tensor, call.func.attr):
            return False  # a tensor's method, or one of the class, whose code is read, too
    root: ast.expr = call.func
    while isinstance(root, (ast.Attribute, ast.Subscript, ast.Call)):
        root = root.func if isinstance(root, ast.Call) else root.value
    return not (isinstance(root, ast.Name) and (root.id in globals_of(cls) or hasattr(builtins, root.id)))


def _calls_by_name(call: ast.Call, name: str) -> bool:
    return isinstance(call.func, ast.Name) and call.func.id == name


@cache
def writes_in_place(cls: Any) -> bool:
    """Whether a class's forward, or a method or function of its package that it uses, may write into a tensor.

    Such writes are ``x.mul_(…)``, ``relu_(x)``, ``F.relu(x, inplace=True)``, ``x += …``, ``x[…] = …``.

    >>> writes_in_place(nn.Conv2d)
    False
    """
    for node in _code_of(cls, ("forward",), helpers=True):
        if isinstance(node, ast.AugAssign):
            return True
        if isinstance(node, ast.Assign) and any(isinstance(target, ast.Subscript) for target in node.targets):
            return True
        if isinstance(node, ast.Call) and _is_call_in_place(node):
            return True
    return False


# the position of the argument `inplace` in torch's functions
_INPLACE = {
    name: list(inspect.signature(function).parameters).index("inplace")
    for name, function in vars(F).items()
    if inspect.isfunction(function) and "inplace" in inspect.signature(function).parameters
}


def _is_call_in_place(call: ast.Call) -> bool:
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    if name.endswith("_") and name.strip("_") and not name.endswith("__"):
        return True
    if name not in _INPLACE:
        return False
    asked = [*call.args[_INPLACE[name] :], *(each.value for each in call.keywords if each.arg == "inplace")]
    return not all(isinstance(each, ast.Constant) and each.value is False for each in asked)


@cache
def calls(cls: Any, names: frozenset[str]) -> bool:
    """Whether a class's forward, or a method or property of its own that it uses, calls a function by one of these names.

    >>> calls(nn.Conv2d, frozenset({"conv2d"})), calls(nn.ReLU, frozenset({"conv2d"}))
    (True, False)
    """
    functions = (node.func for node in _forward(cls) if isinstance(node, ast.Call))
    return any(
        (isinstance(function, ast.Name) and function.id in names)
        or (isinstance(function, ast.Attribute) and not _is_self(function.value) and function.attr in names)
        for function in functions
    )


@cache
def reads_attribute(cls: Any, name: str) -> bool:
    """Whether a class's forward, or a method or property of its own that it uses, reads an attribute of this name.

    >>> reads_attribute(nn.BatchNorm2d, "training"), reads_attribute(nn.ReLU, "training")
    (True, False)
    """
    return any(isinstance(node, ast.Attribute) and node.attr == name for node in _forward(cls))


def asks_for_exact_class(module: nn.Module) -> str | None:
    """Why a module can't be traced: its code asks for the exact class of a value, and a proxy has one of its own. Else None.

    Questions for the classes of modules don't count, nor whether a value is of a plain class such as `list`. repfx's own modules ask for
    none, and there may be many of them.
    """
    if type(module).__module__.startswith("repfx.") or not _names_type(type(module)):  # type: ignore[arg-type]
        return None
    asked = uses_in(module).types
    return f"it asks for the exact class of a value, which tracing can't know: {asked[0]}" if asked else None


@cache
def _names_type(cls: Any) -> bool:
    """Whether a function of a class, or one beside it that it names, names Python's own `type`. An attribute of that name is none.

    What makes the module doesn't count.
    """
    own = ((name, value) for base in own_classes(cls) for name, value in vars(base).items())
    pending = [getattr(value, "fget", value) for name, value in own if name != "__init__"]
    beside, seen = _functions_beside(cls), set()
    while pending:
        function = pending.pop()
        code = inspect.unwrap(function).__code__ if inspect.isfunction(function) else None
        if code is None or code in seen:
            continue
        seen.add(code)
        if reads_global(code, "type") or reads_global(code, "builtins"):
            return True
        pending += [beside[name] for name in all_names(code) if name in beside]
    return False


def _forward(cls: type[nn.Module]) -> Iterator[ast.AST]:
    """All AST nodes of a class's forward, and of every own method or property it uses."""
    return _code_of(cls, ("forward",), helpers=False)


def _code_of(cls: type[nn.Module], names: Iterable[str], *, helpers: bool) -> Iterator[ast.AST]:
    """All AST nodes of the methods `names` and of every own method or property they use.

    With `helpers`, also those of the functions of the same package that they call by name.
    """
    pending: list[Any] = list(names)
    seen = set(pending)
    functions = _functions_beside(cls) if helpers else {}
    while pending:
        each = pending.pop()
        for node in _code(cls, each) if isinstance(each, str) else _source(each):
            yield node
            found: Any = None
            if isinstance(node, ast.Attribute) and _is_self(node.value):
                found = node.attr
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                found = functions.get(node.func.id)
            if found is not None and found not in seen:
                seen.add(found)
                pending.append(found)


def _functions_beside(cls: type[nn.Module]) -> dict[str, Any]:
    package = cls.__module__.split(".")[0]
    return {
        name: value
        for name, value in globals_of(cls).items()
        if inspect.isfunction(value) and (value.__module__ or "").split(".")[0] == package
    }


def globals_of(cls: type[nn.Module]) -> dict[str, Any]:
    """The globals that a class's code can read: those of the Python module that defines it."""
    return getattr(sys.modules.get(cls.__module__), "__dict__", {})


def _code(cls: type[nn.Module], name: str) -> Iterator[ast.AST]:
    """All AST nodes of a method or property, in the class and in each base that comes before `nn.Module`."""
    for base in own_classes(cls):
        found = vars(base).get(name)
        function = found.fget if isinstance(found, property) else found
        yield from _source(function, of_instance=True) if inspect.isfunction(function) else ()


@cache
def _source(function: Any, *, of_instance: bool = False) -> tuple[ast.AST, ...]:
    """All AST nodes of a function; none if its source can't be read.

    With `of_instance`, the nodes call the first parameter `self`, whatever the code calls it.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return ()
    nodes = tuple(ast.walk(tree))
    arguments = tree.body[0].args.args if isinstance(tree.body[0], ast.FunctionDef) else []
    if of_instance and arguments:
        for node in nodes:
            if isinstance(node, ast.Name) and node.id == arguments[0].arg:
                node.id = "self"
    return nodes


def _is_self(value: ast.expr) -> bool:
    """Whether an expression is ``self`` or ``super()``."""
    own_name = isinstance(value, ast.Name) and value.id == "self"
    return own_name or (isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "super")
