"""Reading the source of modules: which of them write in place, and what code around a module asks of it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repfx.reading import source_code
from repfx.reading.module_uses import Uses, uses_in
from repfx.reading.source_code import Around, writes_in_place
from tests.inline_net import fused_exactly, image, norms, reasons

Forward = Callable[[Any, Any], Any]


def add(self: Any, x: Any) -> Any:
    x += 1
    return x


def at_an_index(self: Any, x: Any) -> Any:
    x[:, 0] = 0
    return x


def method(self: Any, x: Any) -> Any:
    return x.mul_(2)


def function(self: Any, x: Any) -> Any:
    return torch.relu_(x)


def by_name(self: Any, x: Any) -> Any:
    return F.relu(x, inplace=True)


def by_position(self: Any, x: Any) -> Any:
    return F.leaky_relu(x, 0.1, True)


def by_an_attribute(self: Any, x: Any) -> Any:
    return F.relu(x, inplace=self.changes)


def in_a_helper(self: Any, x: Any) -> Any:
    return clamped(x)


def clamped(x: Any) -> Any:
    return x.clamp_(0)


def added(self: Any, x: Any) -> Any:
    y = x + 1
    return F.relu(y)


def said_not_to(self: Any, x: Any) -> Any:
    return F.relu(x, inplace=False) + F.leaky_relu(x, 0.1, False)


def special(self: Any, x: Any) -> Any:
    return x.__add__(1)


def unpacked(self: Any, x: Any) -> Any:
    _, y = x, x.clone()
    return y


WRITES = (add, at_an_index, method, function, by_name, by_position, by_an_attribute, in_a_helper)
READS = (added, said_not_to, special, unpacked)


def module_with(forward: Forward) -> nn.Module:
    """A module whose forward is this function, with some layers that it may ask."""
    cls: Any = type("Made", (nn.Module,), {"forward": forward, "__module__": __name__})
    module: nn.Module = cls()
    module.conv, module.block = nn.Conv2d(4, 4, 3), nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    return module


@pytest.mark.parametrize("forward", WRITES)
def test_what_writes_in_place_is_seen(forward: Forward) -> None:
    assert writes_in_place(type(module_with(forward)))  # type: ignore[arg-type]


@pytest.mark.parametrize("forward", READS)
def test_what_only_reads_is_not_taken_for_it(forward: Forward) -> None:
    assert not writes_in_place(type(module_with(forward)))  # type: ignore[arg-type]


# ---- what code around a module asks


def reads_a_name(self: Any, x: Any) -> Any:
    return x * self.conv.stride


def reads_a_name_by_text(self: Any, x: Any) -> Any:
    return x * getattr(self.conv, "stride", 1)


@pytest.mark.parametrize("forward", [reads_a_name, reads_a_name_by_text])
def test_a_name_that_is_read_is_known(forward: Forward) -> None:
    assert "stride" in Around().inside(module_with(forward)).names


def test_a_part_whose_name_is_read_by_text_is_not_traced() -> None:
    def reads_a_part(self: Any, x: Any) -> Any:
        return self.block(x) + getattr(self.block, "inner", None)

    outer: Any = module_with(reads_a_part)
    part: Any = module_with(added)
    part.inner = nn.Conv2d(4, 4, 1)
    reason = Around().inside(outer).reason(part)
    assert reason == "code around it, which can't be traced, reaches for its 'inner'"


def by_if(self: Any, x: Any) -> Any:
    if self.conv.bias:
        return x
    return -x


def by_an_expression(self: Any, x: Any) -> Any:
    return x if self.conv.bias else -x


def by_a_comparison(self: Any, x: Any) -> Any:
    return x * (self.conv.bias is None)


def by_not(self: Any, x: Any) -> Any:
    return x * (not self.conv.bias)


def by_and(self: Any, x: Any) -> Any:
    return self.conv.bias and x


def by_while(self: Any, x: Any) -> Any:
    while self.conv.bias:
        x = x + 1
    return x


def by_assert(self: Any, x: Any) -> Any:
    assert self.conv.bias
    return x


def by_text(self: Any, x: Any) -> Any:
    return x * getattr(self.conv, "bias", 1)


@pytest.mark.parametrize(
    "forward", [by_if, by_an_expression, by_a_comparison, by_not, by_and, by_while, by_assert, by_text]
)
def test_a_question_for_a_bias_is_seen(forward: Forward) -> None:
    assert Around().inside(module_with(forward)).asks_for_bias


def its_own(self: Any, x: Any) -> Any:
    return x if self.bias is None else x + self.bias


@pytest.mark.parametrize("forward", [its_own, added])
def test_no_question_for_a_bias_is_none(forward: Forward) -> None:
    assert not Around().inside(module_with(forward)).asks_for_bias


def by_an_index(self: Any, x: Any) -> Any:
    return self.block[0](x)


def by_children(self: Any, x: Any) -> Any:
    for layer in self.block.children():
        x = layer(x)
    return x


def with_more(self: Any, x: Any) -> Any:
    return self.block(x, 2)


def with_nothing(self: Any, x: Any) -> Any:
    return x + self.block()


def asking_for_a_class(self: Any, x: Any) -> Any:
    return x * isinstance(self.conv, nn.Conv2d)


@pytest.mark.parametrize(
    ("forward", "found"),
    [
        (by_an_index, ["indexes"]),
        (by_children, ["lists_children", "passes_nothing"]),
        (with_more, ["passes_more"]),
        (with_nothing, ["passes_nothing"]),
        (added, []),
    ],
)
def test_each_use_of_a_part_is_told_apart(forward: Forward, found: list[str]) -> None:
    uses = ("indexes", "lists_children", "passes_more", "passes_nothing")
    around = Around().inside(module_with(forward))
    assert [each for each in uses if getattr(around, each)] == found
    assert around.takes_apart("conv") is ("indexes" in found)


def test_classes_that_are_asked_for_are_known() -> None:
    assert "Conv2d" in Around().inside(module_with(asking_for_a_class)).classes


# --- Questions for an exact class ------------------------------------------------------------------------------------


def doubled_unless_a_parameter(x: Tensor) -> Tensor:
    return x if type(x) is nn.Parameter else 2 * x


def through_another(x: Tensor) -> Tensor:
    return doubled_unless_a_parameter(x)


class AsksInAFunction(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return through_another(x)


class HasAType(nn.Module):
    """Has an attribute of that name, is made by code that asks, and stands beside a function that asks."""

    def __init__(self) -> None:
        super().__init__()
        self.options = SimpleNamespace(type=type(self).__name__)

    def forward(self, x: Tensor) -> Tensor:
        return x if self.options.type == "" else 3 * x


def test_only_code_that_may_ask_for_an_exact_class_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[nn.Module] = []

    def noting(module: nn.Module) -> Uses:
        read.append(module)
        return uses_in(module)

    monkeypatch.setattr(source_code, "uses_in", noting)
    asks, has_one = AsksInAFunction(), HasAType()
    assert "it asks for the exact class of a value" in (source_code.asks_for_exact_class(asks) or "")
    assert source_code.asks_for_exact_class(has_one) is None
    assert read == [asks]


# --- Classes and Python's modules hold no layers ---------------------------------------------------------------------


class Head(nn.Module):
    """A head whose code can't be traced: what it returns depends on the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.block = TwoMaps(4)

    def forward(self, x: Tensor) -> Any:
        """``(batch, 4, height, width)``."""
        y = self.block(x)
        return {"y": y} if self.training else y


class TwoMaps(nn.Module):
    """A conv and a BatchNorm, with code of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, channels, 3), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, channels, height, width)``."""
        y: Tensor = self.norm(self.conv(x))
        return y


class CallsItsBase(Head):
    """Calls the forward of its base by the name of the base."""

    def forward(self, x: Tensor) -> Any:
        """``(batch, 4, height, width)``."""
        return Head.forward(self, x)


class CallsForwardOfAPart(Head):
    """Calls the forward of its part, by a name that elsewhere is a class's."""

    def forward(self, x: Tensor) -> Any:
        """``(batch, 4, height, width)``."""
        Head = self.block
        return {"y": Head.forward(x)} if self.training else Head.forward(x)


GLOBAL = TwoMaps(4)


class CallsForwardOfAGlobal(Head):
    """Calls the forward of a part that is a global, too."""

    def __init__(self) -> None:
        super().__init__()
        self.block = GLOBAL

    def forward(self, x: Tensor) -> Any:
        """``(batch, 4, height, width)``."""
        return {"y": GLOBAL.forward(x)} if self.training else GLOBAL.forward(x)


@pytest.mark.parametrize(
    ("cls", "fuses"), [(CallsItsBase, True), (CallsForwardOfAPart, False), (CallsForwardOfAGlobal, False)]
)
def test_only_what_may_be_a_part_is_taken_for_one(cls: type[Head], fuses: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), cls())
    fused = fused_exactly(model, image(2, 3, 9, 10))
    assert bool(norms(fused)) is not fuses, reasons(fused)
