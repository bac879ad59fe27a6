"""The source of functions, lambdas among them, and the names that they read."""

from __future__ import annotations

import ast
import dis
import inspect
import linecache
import textwrap
from collections.abc import Iterator, Mapping
from functools import cache
from types import CodeType
from typing import Any

from repfx.records.module_tree import enclosed_by

_READS_GLOBAL = frozenset({"LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"})


@cache
def function_node(function: Any) -> ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | None:
    """Return a function as Python's parser reads it, or None if its source can't be had or isn't certainly its own."""
    function = inspect.unwrap(function)
    if function.__name__ == "<lambda>":
        return _lambda_of(function)
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None
    found = tree.body[0] if tree.body else None
    return found if isinstance(found, (ast.FunctionDef, ast.AsyncFunctionDef)) else None


def _lambda_of(function: Any) -> ast.Lambda | None:
    """Return the lambda at a function's first line that names the same things, or None. All that do must be one and the same."""
    code = function.__code__
    lambdas = [node for node in _lambdas_in(code.co_filename) if node.lineno == code.co_firstlineno]
    found = {ast.unparse(node): node for node in lambdas if _named_in(_code_of(node)) == _named_in(code)}
    return next(iter(found.values())) if len(found) == 1 else None


@cache
def _lambdas_in(filename: str) -> tuple[ast.Lambda, ...]:
    try:
        tree = ast.parse("".join(linecache.getlines(filename)))
    except SyntaxError:
        return ()
    return tuple(node for node in ast.walk(tree) if isinstance(node, ast.Lambda))


def _code_of(node: ast.Lambda) -> CodeType:
    code: CodeType = eval(compile(ast.Expression(node), "", "eval")).__code__
    return code


def _named_in(code: CodeType) -> tuple[tuple[str, ...], frozenset[str], frozenset[str]]:
    """Return the arguments of a function, the names that it reads, and its plain constants."""
    names = {*code.co_names, *code.co_freevars}
    constants = {repr(each) for each in code.co_consts if not isinstance(each, CodeType) and each is not None}
    return code.co_varnames[: code.co_argcount], frozenset(names), frozenset(constants)


def names_beside(function: Any) -> Mapping[str, Any]:
    """Return the globals and the variables around it that a function can read."""
    function = inspect.unwrap(function)
    return {**function.__globals__, **enclosed_by(function)}


def all_names(code: CodeType) -> Iterator[str]:
    """Yield the names of globals and attributes in a function's bytecode, and in that of the functions inside it."""
    yield from code.co_names
    for each in code.co_consts:
        if isinstance(each, CodeType):
            yield from all_names(each)


def reads_global(code: CodeType, name: str) -> bool:
    """Whether a function's bytecode, or that of the functions inside it, reads a global or a builtin function of this name.

    >>> reads_global((lambda x: type(x)).__code__, "type"), reads_global((lambda x: x.type).__code__, "type")
    (True, False)
    """
    if name not in all_names(code):
        return False
    read = any(each.argval == name and each.opname in _READS_GLOBAL for each in dis.get_instructions(code))
    return read or any(reads_global(each, name) for each in code.co_consts if isinstance(each, CodeType))
