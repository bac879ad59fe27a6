"""Recorded operations: run together they give what they give one by one, in a number of operations that grows with the shapes alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from repfx.algebra import program as programs
from repfx.algebra.deferred import Deferred, NotDeferred, Recording
from repfx.algebra.program import Program
from tests.random_numbers import numbers_from

Function = Callable[..., Any]


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = numbers_from(7)
    return [torch.randn(shape, dtype=torch.float64, generator=generator).abs() + 0.1 for shape in shapes]


def recorded(function: Function, given: list[Tensor]) -> Program:
    """Record a function of lists of tensors."""
    recording = Recording()
    outputs: list[Deferred] = function([recording.input(each) for each in given])
    return Program(outputs)


def check(function: Function, *shapes: tuple[int, ...]) -> None:
    """Compare outputs and gradients of a function of a list with those of what is recorded of it."""
    given = [each.requires_grad_() for each in tensors(*shapes)]
    expected, found = function(given), recorded(function, given)(given)
    assert all(torch.allclose(one, other, rtol=1e-12) for one, other in zip(expected, found, strict=True))
    weights = [torch.linspace(-1, 1, each.numel(), dtype=each.dtype).reshape(each.shape) for each in expected]
    for one, other in zip(torch.autograd.grad(expected, given, weights), torch.autograd.grad(found, given, weights)):
        assert torch.allclose(one, other, rtol=1e-11)


OPERATIONS: dict[str, Function] = {
    "scale": lambda x: x * x[:, :1],
    "number": lambda x: x * 0.5 + 2,
    "negative": lambda x: -torch.rsqrt(x + 1e-3),
    "sum": lambda x: x.sum(2),
    "sum of rows": lambda x: x.sum(0),
    "reshape": lambda x: x.reshape(x.shape[0], -1).reshape(1, -1, 5),
    "rows anew": lambda x: x.reshape(2, -1, *x.shape[1:]).flatten(0, 1),
    "turned": lambda x: x.transpose(1, 2),
    "turned from behind": lambda x: x.permute(-1, 0, 1),
    "turned rows": lambda x: x.transpose(0, 1).movedim(2, 0),
    "product": lambda x: torch.einsum("goi,gij->goj", x, x.permute(0, 2, 1)),
    "product of rows": lambda x: torch.einsum("oij,kij->okj", x, x),
    "pad": lambda x: F.pad(x, (1, 2)),
    "pad of rows": lambda x: F.pad(x, (0, 0, 0, 1, 2, 0)),
    "part": lambda x: x[..., 1:3],
    "some rows": lambda x: x[1:],
    "diagonal": lambda x: torch.diag_embed(x, dim1=1, dim2=3),
    "diagonal from behind": lambda x: torch.diag_embed(x, -1, dim1=-3, dim2=-1).flatten(1),
    "expand": lambda x: x[:, :1].expand(*x.shape),
    "expand with sizes that stay": lambda x: x[:, :1].expand(-1, 7, -1).flatten(1),
    "expand with further axes": lambda x: x.sum(2).sum(1).expand(x.shape[0], x.shape[0]),
    "constant": lambda x: x * x.new_full(x.shape, 3.0) + x * x.new_ones(x.shape[0], 1, 1),
    "constants alone": lambda x: (
        x + x.new_zeros(x.shape) + torch.diag_embed(x.new_ones(x.shape[:2]), dim1=1, dim2=2)[..., :1]
    ),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_together_give_what_each_gives_alone(name: str) -> None:
    """Two operands have equal shapes, two differ in the number of rows, and two in what is behind them."""
    check(
        lambda given: [OPERATIONS[name](x) for x in given],
        (4, 3, 5),
        (4, 3, 5),
        (6, 3, 5),
        (4, 5, 3) if "new" in name else (4, 2, 5),
    )


def test_operands_in_another_order_and_twice() -> None:
    """What is used by several operations isn't always side by side, and ranges of rows overlap."""

    def function(given: list[Any]) -> list[Any]:
        a, b, c, d = (2 * x for x in given)
        return [a + b, b + a, c + d, d + b, (a + a).sum(1), b.sum(1), c.sum(1), a * c, c]

    check(function, *[(3, 4)] * 4)


def test_large_operands_stay_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "_MOST_NUMBERS", 30)
    check(lambda given: [(x * 2).sum(1) for x in given], *[(3, 4)] * 5)
    given = tensors(*[(3, 4)] * 5)
    program = recorded(lambda given: [x * 2 for x in given], given)
    assert [len(value.nodes) for value in program._values] == [2, 2, 1]


def test_only_what_is_needed_is_computed_and_constants_once() -> None:
    def function(given: list[Any]) -> list[Any]:
        x = given[0]
        x.sum(1)
        return [torch.diag_embed(x.new_ones(2, 3), dim1=1, dim2=2) + x.reshape(2, 3, 1)]

    program = recorded(function, tensors((2, 3)))
    assert [value.nodes[0].name for value in program._values] == ["reshape", "add"]
    assert program.needs == [frozenset({0})]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.norm(),
        lambda x: x.to(torch.float32),
        lambda x: x[0],
        lambda x: F.pad(x, (1, 1), mode="reflect"),
        lambda x: torch.stack([x, x]),
        lambda x: torch.einsum("o...,om->m...", x, x),
        lambda x: x + torch.ones(3, 4),
        lambda x: torch.einsum("oo->o", x[..., :3]),
        lambda x: torch.einsum("om,on->omn", x, x[:1]),
    ],
)
def test_what_is_not_known_is_not_recorded(function: Function) -> None:
    with pytest.raises((NotDeferred, AttributeError)):
        function(Recording().input(torch.ones(3, 4, dtype=torch.float64)))


def test_another_dtype() -> None:
    narrow, wide = torch.rand(2, 3), torch.rand(2, 3, dtype=torch.float64)
    recording = Recording()
    like = recording.input(wide)
    (found,) = Program([narrow.to(like) * like])([wide, narrow])  # type: ignore[call-overload]
    assert torch.equal(found, narrow.double() * wide)
    with pytest.raises(NotDeferred):
        recording.input(narrow) * like.new_ones(2, 3)
