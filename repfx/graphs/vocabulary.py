"""The forms that addition, subtraction, multiplication, division, negation and concatenation take in a graph."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}
SUBTRACTIONS = {operator.sub, operator.isub, torch.sub, torch.subtract, "sub", "sub_", "subtract"}
PRODUCTS = {operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_", "multiply"}
QUOTIENTS = {operator.truediv, operator.itruediv, torch.div, torch.divide, torch.true_divide, "div", "div_", "divide"}
NEGATIONS = {operator.neg, torch.neg, torch.negative, "neg", "negative"}
CONCATENATIONS = frozenset({torch.cat, torch.concat, torch.concatenate})
SIZE_METHODS = frozenset({"size", "dim", "numel", "ndimension", "nelement"})  # of tensors
ARITHMETIC = ADDITIONS | SUBTRACTIONS | PRODUCTS | QUOTIENTS | NEGATIONS

# activations that change each number by itself, as layers, and as functions and methods
ELEMENTWISE_LAYERS: tuple[type[nn.Module], ...] = (
    nn.ReLU,
    nn.ReLU6,
    nn.GELU,
    nn.SiLU,
    nn.Hardswish,
    nn.Tanh,
    nn.Sigmoid,
    nn.LeakyReLU,
    nn.ELU,
)
_NAMES = ("relu", "relu6", "gelu", "silu", "hardswish", "tanh", "sigmoid", "leaky_relu", "elu")
ELEMENTWISE = {getattr(room, name) for room in (torch, F) for name in _NAMES if hasattr(room, name)} | {*_NAMES}


def listed(node: fx.Node) -> tuple[list[Any], Any]:
    """Return the tensors that a concatenation or a stack takes, and its axis. The list is empty if it isn't known."""
    call = {"dim": 0, **dict(zip(("tensors", "dim"), node.args)), **node.kwargs}
    parts = call.get("tensors")
    return (list(parts) if isinstance(parts, (list, tuple)) else []), call.get("axis", call["dim"])
