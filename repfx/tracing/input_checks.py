"""Conditions by which code checks its input: for one answer it raises an error, for the other one it goes on.

Tracing goes on with that other answer, and the graph checks at each call that it still is the answer. ``torch._assert`` is such a check
by itself; only its message is none of the graph.
"""

from __future__ import annotations

import ast
import dis
import linecache
import sys
from collections.abc import Iterator
from functools import cache
from types import FrameType
from typing import NamedTuple

from torch import fx

_DECIDES = ("POP_JUMP", "JUMP_IF", "TO_BOOL")  # bytecode that asks a value for its truth
_EXACT = sys.version_info >= (3, 12)  # whether Python tells which operand of `and` and `or` it asks
_NUMBERS = (ast.Mod, ast.FloorDiv, ast.Div, ast.Sub, ast.Pow)  # arithmetic that lists don't have


class Check(NamedTuple):
    """The answer with which code goes on, and the check as code."""

    answer: bool
    code: str


def check_at(frame: FrameType) -> Check | None:
    """Return the check for which code asks a truth value now, or None if it does more with the answer, or may catch the error."""
    asked = dis.opname[frame.f_code.co_code[frame.f_lasti]]
    if not asked.startswith((*_DECIDES, "COMPARE_OP")):
        return None
    for statement in _decisions(frame.f_code.co_filename):
        if not _spans(statement.test, frame.f_lineno):
            continue
        found = [
            (each, answer) for each, answer in _operands(statement.test, _goes_on(statement)) if _is_at(each, frame)
        ]
        answers = {answer for _, answer in found}
        answer = answers.pop() if len(answers) == 1 else None
        directly = asked != "COMPARE_OP" or all(_is_asked_directly(each, frame) for each, _ in found)
        if answer is None or not directly or _may_be_caught(frame):
            return None
        return Check(answer, _text(statement))
    return None


def is_in_message(frame: FrameType) -> bool:
    """Whether code makes a value a part of the message of ``torch._assert`` now. Only a failed check would show it."""
    return any(_spans(message, frame.f_lineno) for message in _messages(frame.f_code.co_filename))


@cache
def _nodes(filename: str) -> tuple[ast.AST, ...]:
    """All nodes of a file; none if its source can't be had."""
    try:
        return tuple(ast.walk(ast.parse("".join(linecache.getlines(filename)))))
    except SyntaxError:
        return ()


@cache
def _decisions(filename: str) -> tuple[ast.If | ast.Assert, ...]:
    return tuple(node for node in _nodes(filename) if isinstance(node, (ast.If, ast.Assert)))


@cache
def _messages(filename: str) -> tuple[ast.expr, ...]:
    """The messages of the calls of ``torch._assert`` in a file."""
    calls = [node for node in _nodes(filename) if isinstance(node, ast.Call) and len(node.args) > 1]
    return tuple(call.args[1] for call in calls if ast.unparse(call.func).rpartition(".")[2] == "_assert")


def _spans(node: ast.expr | ast.stmt, line: int) -> bool:
    return node.lineno <= line <= (node.end_lineno or node.lineno)


def _goes_on(statement: ast.If | ast.Assert) -> bool | None:
    """Return the value of a statement's test with which code goes on, or None if it goes on with both."""
    if isinstance(statement, ast.Assert):
        return True
    refused = (_raises(statement.body), _raises(statement.orelse))
    return {(True, False): False, (False, True): True}.get(refused)


def _text(statement: ast.If | ast.Assert) -> str:
    test = ast.unparse(statement.test)
    if isinstance(statement, ast.Assert):
        return f"assert {test}"
    return f"if {test}: raise" if _raises(statement.body) else f"if {test}: ... else: raise"


def _raises(block: list[ast.stmt]) -> bool:
    """Whether a block of code always ends in an error."""
    leaves = (
        isinstance(node, (ast.Return, ast.Break, ast.Continue, ast.Yield)) for each in block for node in ast.walk(each)
    )
    return _ends_in_raise(block) and not any(leaves)


def _ends_in_raise(block: list[ast.stmt]) -> bool:
    last = block[-1] if block else None
    if isinstance(last, ast.If):
        return _ends_in_raise(last.body) and _ends_in_raise(last.orelse)
    return isinstance(last, ast.Raise)


def _operands(test: ast.expr, answer: bool | None) -> Iterator[tuple[ast.expr, bool | None]]:
    """Yield the values that are asked for their truth in a test, each with the one answer that the test needs; None if either may do."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        yield from _operands(test.operand, None if answer is None else not answer)
    elif isinstance(test, ast.BoolOp):
        one_is_enough = isinstance(test.op, ast.Or) is answer
        *first, last = test.values
        for each in first:
            yield from _operands(each, None if one_is_enough else answer)
        yield from _operands(last, answer)  # if one is enough, no other was
    else:
        chained = isinstance(test, ast.Compare) and len(test.ops) > 1
        inside = not _EXACT and any(isinstance(node, _DECISIONS) for node in ast.walk(test))
        yield test, None if chained or inside else answer


_DECISIONS = (
    ast.BoolOp,
    ast.IfExp,
    ast.comprehension,
    ast.Lambda,
)  # parts of an expression that ask for a truth themselves


def _is_at(operand: ast.expr, frame: FrameType) -> bool:
    """Whether a frame may be asking for the truth of an operand."""
    if not _EXACT:
        return True
    line, end_line, column, end_column = [*frame.f_code.co_positions()][frame.f_lasti // 2]
    return (operand.lineno, operand.end_lineno, operand.col_offset, operand.end_col_offset) == (
        line,
        end_line,
        column,
        end_column,
    )


def _is_asked_directly(operand: ast.expr, frame: FrameType) -> bool:
    """Whether a comparison can't be one of lists, which asks for the truth of each pair of their items."""
    if not isinstance(operand, ast.Compare):
        return True
    return any(_is_no_list(side, frame) for side in (operand.left, *operand.comparators))


def _is_no_list(side: ast.expr, frame: FrameType) -> bool:
    """Whether the value of an expression certainly isn't a list or a tuple."""
    if isinstance(side, ast.Constant) or (isinstance(side, ast.BinOp) and isinstance(side.op, _NUMBERS)):
        return True
    root: ast.expr = side
    while isinstance(root, (ast.Attribute, ast.Subscript, ast.Call)):
        root = root.func if isinstance(root, ast.Call) else root.value
    if not isinstance(root, ast.Name):
        return False
    value = frame.f_locals.get(root.id, frame.f_globals.get(root.id))
    return issubclass(type(value), fx.Proxy) or (root is side and isinstance(value, (int, float)))


def _may_be_caught(frame: FrameType | None) -> bool:
    """Whether code from a frame outwards, up to the tracer, may catch an error."""
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if name == "repfx.tracing.tracer" and frame.f_code.co_name == "trace":
            return False
        line, inside = frame.f_lineno, name.startswith(("torch.", "repfx."))
        guarded = () if inside else _guarded(frame.f_code.co_filename)
        if any(_spans(each, line) for each in guarded):
            return True
        frame = frame.f_back
    return False


@cache
def _guarded(filename: str) -> tuple[ast.stmt, ...]:
    """The statements of a file whose errors are caught around them."""
    catching = (
        node
        for node in _nodes(filename)
        if (isinstance(node, ast.Try) and node.handlers) or (isinstance(node, ast.With) and _suppresses(node))
    )
    return tuple(each for node in catching for each in node.body)


def _suppresses(node: ast.With) -> bool:
    return any("suppress" in ast.unparse(item.context_expr) for item in node.items)
