"""Sums in a graph: additions and subtractions of two nodes, and sums, means and weighted sums of a stack of nodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from repfx.graphs.constants import Constants
from repfx.graphs.vocabulary import ADDITIONS, SUBTRACTIONS, listed

_STACKS = frozenset({torch.stack})
_TOTALS = {torch.sum, "sum"}
_MEANS = {torch.mean, "mean"}


@dataclass(frozen=True)
class SumOf:
    """A node as ``Σ factor · term``.

    Args:
        terms: factors, each with a node.
        inner: nodes that belong to the sum, such as the stack that it adds up. Nothing else uses them.
        fixed: whether each factor is a number of the code. Otherwise it was computed from parameters, which training may change.
    """

    terms: tuple[tuple[float, fx.Node], ...]
    inner: tuple[fx.Node, ...] = ()
    fixed: bool = True


def read_sum(node: fx.Node, constants: Constants) -> SumOf | None:
    """Read a node as a sum of nodes, none of which is a constant, or return None."""
    if node.op not in ("call_function", "call_method"):
        return None
    if node.target in ADDITIONS | SUBTRACTIONS:
        found = _of_two(node)
    elif node.target is torch.einsum:
        found = _weighted(node, constants)
    else:
        found = _of_stack(node)
    if found is None or any(constants.number(term) is not None for _, term in found.terms):
        return None
    return found


def adds_up(node: fx.Node) -> bool:
    """Whether a node only holds terms for a sum, such as a stack."""
    return node.target in _STACKS


def plus(graph: fx.Graph, total: fx.Node | None, factor: float, term: fx.Node) -> fx.Node:
    """Add ``total + factor · term`` to a graph; without a total, ``factor · term``."""
    if total is None:
        if factor in (1, -1):
            return term if factor == 1 else graph.call_function(torch.neg, (term,))
        return graph.call_function(torch.mul, (term, factor))
    if factor in (1, -1):
        return graph.call_function(torch.add if factor == 1 else torch.sub, (total, term))
    return graph.call_function(torch.add, (total, term), {"alpha": factor})


def _of_two(node: fx.Node) -> SumOf | None:
    both = node.args
    alpha: Any = node.kwargs.get("alpha", 1)
    if len(both) != 2 or node.kwargs.keys() - {"alpha"} or not _is_number(alpha):
        return None
    first, second = both
    if not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
        return None
    return SumOf(((1, first), (-alpha if node.target in SUBTRACTIONS else alpha, second)))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# ---- stacks


def _of_stack(node: fx.Node) -> SumOf | None:
    """Read the sum or the mean of a stack along the axis of the stack."""
    if node.target not in _TOTALS | _MEANS:
        return None
    call: dict[str, Any] = {"dim": None, **dict(zip(("input", "dim"), node.args)), **node.kwargs}
    stack, dim = call.pop("input", None), call.pop("dim")
    dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else call.pop("axis", dim)
    terms = _stacked(stack, dim)
    if call or len(node.args) > 2 or terms is None:
        return None
    factor = 1 / len(terms) if node.target in _MEANS else 1
    return SumOf(tuple((factor, term) for term in terms), (stack,))


def _stacked(stack: Any, axis: Any) -> list[fx.Node] | None:
    """Return the nodes that a stack along this axis holds, or None if there is no such stack, or another node reads it."""
    if not isinstance(stack, fx.Node) or stack.target not in _STACKS or len(stack.users) != 1:
        return None
    terms, dim = listed(stack)
    if not terms or not all(isinstance(term, fx.Node) for term in terms) or not isinstance(axis, int) or axis != dim:
        return None
    return terms


def _weighted(node: fx.Node, constants: Constants) -> SumOf | None:
    """Read ``einsum("k,kbchw->bchw", weights, stack)``, in any letters and either order of the two."""
    if len(node.args) != 3 or node.kwargs or not isinstance(node.args[0], str):
        return None
    equation = node.args[0].replace(" ", "")
    operands: list[Any] = list(node.args[1:])
    inputs, arrow, output = equation.partition("->")
    letters = inputs.split(",")
    if not arrow or len(letters) != 2 or "." in equation:
        return None
    vectors = [place for place in (0, 1) if len(letters[place]) == 1]
    if len(vectors) != 1:
        return None
    weights, stack, whole = operands[vectors[0]], operands[1 - vectors[0]], letters[1 - vectors[0]]
    axis = whole.find(letters[vectors[0]])
    terms = _stacked(stack, axis)
    known = constants.tensor(weights)
    if terms is None or known is None or len(set(whole)) != len(whole) or output != whole[:axis] + whole[axis + 1 :]:
        return None
    if tuple(known.shape) != (len(terms),) or known.is_meta:
        return None
    return SumOf(tuple(zip(known.tolist(), terms)), (stack,), fixed=False)
