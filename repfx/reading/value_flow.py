"""Where the values of a function's variables and expressions come from, read from its source.

Modules are followed from the attributes of `self` through assignments, loops, collections and comprehensions, in any order of the
statements.
"""

from __future__ import annotations

import ast
import builtins
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, TypeAlias

from torch import Tensor, nn

from repfx.reading.function_source import names_beside

# the names of attributes of `self` that a value may come from: "" for `self`, "*" for any child
Origins: TypeAlias = frozenset[str]

NONE: Origins = frozenset()
ITSELF: Origins = frozenset({""})
ANY_CHILD: Origins = frozenset({"*"})


def each_of(origins: Origins) -> Origins:
    """Return where the items of a value come from. The items of `self` are its children."""
    return origins - ITSELF | (ANY_CHILD if "" in origins else NONE)


def attribute_or_none(owner: object, name: str) -> Any:
    """Return an attribute, or None if there is none or its code fails."""
    try:
        return getattr(owner, name, None)
    except Exception:
        return None


class ValueFlow(ABC, ast.NodeVisitor):
    """Reads one function. Visiting an expression returns where its value comes from."""

    def __init__(self, function: Any) -> None:
        self.names: Mapping[str, Any] = names_beside(function)
        self.variables: dict[str, Origins] = {}
        self.inner: dict[str, ast.FunctionDef] = {}
        self.returned = NONE

    @abstractmethod
    def note(self, origins: Origins, node: ast.AST) -> None:
        """Note a use of modules that isn't known to be harmless."""

    @abstractmethod
    def of_own(self, name: str) -> Origins:
        """Return where the value of an attribute of `self` comes from."""

    def read(self, node: Any, arguments: tuple[Origins, ...], named: Mapping[str, Origins]) -> Origins:
        self.bind_parameters(node.args, arguments, named)
        body = node.body if isinstance(node.body, list) else [ast.Return(node.body)]
        before = None
        while before != (self.variables, self.returned):
            before = (dict(self.variables), self.returned)
            for statement in body:
                self.visit(statement)
        return self.returned

    def bind_parameters(
        self, parameters: ast.arguments, arguments: tuple[Origins, ...], named: Mapping[str, Origins]
    ) -> None:
        names = [each.arg for each in (*parameters.posonlyargs, *parameters.args)]
        for name, origins in (*zip(names, arguments), *named.items()):
            self.let(name, origins)
        rest = NONE.union(*arguments[len(names) :])
        if parameters.vararg is not None:
            self.let(parameters.vararg.arg, rest)
        if parameters.kwarg is not None:
            self.let(parameters.kwarg.arg, NONE.union(*named.values()))

    def let(self, name: str, origins: Origins) -> None:
        self.variables[name] = self.variables.get(name, NONE) | origins

    # ---- statements

    def visit_Return(self, node: ast.Return) -> None:
        self.returned |= self.of(node.value)

    def visit_Raise(self, node: ast.Raise) -> None:
        """Leave out what is said about a module in an error."""

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            self._assign(target, node.value)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self._assign(node.target, node.value)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self._bind(node.target, self.of(node.value))

    def visit_For(self, node: ast.For) -> None:
        self._bind_each(node.target, node.iter)
        for statement in (*node.body, *node.orelse):
            self.visit(statement)

    def visit_Match(self, node: ast.Match) -> None:
        self.note(self.of(node.subject), node.subject)
        self.generic_visit(node)

    def visit_Delete(self, node: ast.Delete) -> None:
        for target in node.targets:
            self._bind(target, NONE)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.inner[node.name] = node
        for statement in node.body:
            self.visit(statement)

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        pair = (target, value)
        if all(isinstance(each, (ast.Tuple, ast.List)) for each in pair) and len(target.elts) == len(value.elts):  # type: ignore[attr-defined]
            for one, other in zip(target.elts, value.elts):  # type: ignore[attr-defined]
                self._assign(one, other)
        else:
            self._bind(target, self.of(value))

    def _bind(self, target: ast.expr, origins: Origins) -> None:
        """Let a target of an assignment take a value."""
        if isinstance(target, ast.Name):
            self.let(target.id, origins)
        elif isinstance(target, (ast.Tuple, ast.List)):
            for each in target.elts:
                self._bind(each, origins)
        elif isinstance(target, ast.Starred):
            self._bind(target.value, origins)
        elif isinstance(target, ast.Subscript) and isinstance(target.value, ast.Name):
            self.let(target.value.id, origins)
        elif isinstance(target, (ast.Attribute, ast.Subscript)):
            owner = self.of(target.value)
            changed = owner - ITSELF or (
                self.of_own(target.attr) if isinstance(target, ast.Attribute) and owner else NONE
            )
            self.note(changed | origins, target)

    def _bind_each(self, target: ast.expr, source: ast.expr) -> None:
        """Let the target of a loop take each item of a source."""
        parts = target.elts if isinstance(target, (ast.Tuple, ast.List)) else []
        called = self.resolved(source.func) if isinstance(source, ast.Call) else None
        arguments = source.args if isinstance(source, ast.Call) else []
        if called is enumerate and len(parts) == 2 and arguments:
            self._bind_each(parts[1], arguments[0])
        elif called is zip and len(parts) == len(arguments):
            for part, argument in zip(parts, arguments):
                self._bind_each(part, argument)
        elif len(parts) == 2 and isinstance(source, ast.Call) and isinstance(source.func, ast.Attribute):
            origins = self.of(source)
            self._bind(parts[1] if source.func.attr in ("items", "named_children") else target, origins)
        else:
            self._bind(target, each_of(self.of(source)))

    # ---- expressions

    def of(self, node: ast.expr | None) -> Origins:
        found: Origins = NONE if node is None else self.visit(node)
        return found

    def generic_visit(self, node: ast.AST) -> Origins:
        """Read the parts of a node; what an unknown kind of expression does with a module is a use."""
        for child in ast.iter_child_nodes(node):
            origins = self.visit(child) or NONE
            if isinstance(node, (ast.expr, ast.withitem)) and not isinstance(child, ast.expr_context):
                self.note(origins - ITSELF, node)
        return NONE

    def _union(self, node: Any) -> Origins:
        return NONE.union(*(self.of(each) for each in ast.iter_child_nodes(node) if isinstance(each, ast.expr)))

    visit_Tuple = visit_List = visit_Set = visit_Dict = visit_BoolOp = visit_BinOp = visit_Starred = visit_Await = (
        _union
    )

    def visit_IfExp(self, node: ast.IfExp) -> Origins:
        self.of(node.test)
        return self.of(node.body) | self.of(node.orelse)

    def visit_Name(self, node: ast.Name) -> Origins:
        return self.variables.get(node.id, NONE)

    def visit_NamedExpr(self, node: ast.NamedExpr) -> Origins:
        origins = self.of(node.value)
        self._bind(node.target, origins)
        return origins

    def visit_Lambda(self, node: ast.Lambda) -> Origins:
        return self.of(node.body)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> Origins:
        self.of(node.operand)
        return NONE

    def visit_Subscript(self, node: ast.Subscript) -> Origins:
        self.of(node.slice)
        return each_of(self.of(node.value))

    def _yielded(self, node: Any) -> Origins:
        self.returned |= self.of(node.value)
        return NONE

    visit_Yield = visit_YieldFrom = _yielded

    def _comprehension(self, node: Any) -> Origins:
        for each in node.generators:
            self._bind_each(each.target, each.iter)
            for condition in each.ifs:
                self.of(condition)
        return self.of(node.value if isinstance(node, ast.DictComp) else node.elt)

    visit_ListComp = visit_SetComp = visit_GeneratorExp = visit_DictComp = _comprehension

    def resolved(self, node: ast.expr) -> Any:
        """Return what an expression names in the function's globals, closure or builtins, or None."""
        if isinstance(node, ast.Attribute):
            owner = self.resolved(node.value)
            return (
                None if owner is None or isinstance(owner, (nn.Module, Tensor)) else attribute_or_none(owner, node.attr)
            )
        if not isinstance(node, ast.Name) or node.id in self.variables:
            return None
        return self.names.get(node.id, getattr(builtins, node.id, None))
