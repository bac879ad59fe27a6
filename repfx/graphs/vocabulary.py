"""The forms that addition, subtraction, multiplication, division and negation take in a graph."""

from __future__ import annotations

import operator

import torch

ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}
SUBTRACTIONS = {operator.sub, operator.isub, torch.sub, torch.subtract, "sub", "sub_", "subtract"}
PRODUCTS = {operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_", "multiply"}
QUOTIENTS = {operator.truediv, operator.itruediv, torch.div, torch.divide, torch.true_divide, "div", "div_", "divide"}
NEGATIONS = {operator.neg, torch.neg, torch.negative, "neg", "negative"}
SIZE_METHODS = frozenset({"size", "dim", "numel", "ndimension", "nelement"})  # of tensors
ARITHMETIC = ADDITIONS | SUBTRACTIONS | PRODUCTS | QUOTIENTS | NEGATIONS
