"""The forms that addition, subtraction, multiplication, division, negation and concatenation take in a graph."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}
SUBTRACTIONS = {operator.sub, operator.isub, torch.sub, torch.subtract, "sub", "sub_", "subtract"}
PRODUCTS = {operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_", "multiply"}
QUOTIENTS = {operator.truediv, operator.itruediv, torch.div, torch.divide, torch.true_divide, "div", "div_", "divide"}
NEGATIONS = {operator.neg, torch.neg, torch.negative, "neg", "negative"}
SIZE_METHODS = frozenset({"size", "dim", "numel", "ndimension", "nelement"})  # of tensors
ARITHMETIC = ADDITIONS | SUBTRACTIONS | PRODUCTS | QUOTIENTS | NEGATIONS
CONCATENATIONS = frozenset({torch.cat, torch.concat, torch.concatenate})


def listed(node: fx.Node) -> tuple[list[Any], Any]:
    """Return the tensors that a concatenation or a stack takes, and its axis. The list is empty if it isn't known."""
    call = {"dim": 0, **dict(zip(("tensors", "dim"), node.args)), **node.kwargs}
    parts = call.get("tensors")
    return (list(parts) if isinstance(parts, (list, tuple)) else []), call.get("axis", call["dim"])
