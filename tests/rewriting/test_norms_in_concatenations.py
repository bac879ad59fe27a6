"""BatchNorms on parts of a concatenation are folded into the conv that reads it, if no zero padding comes between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.inline_net import Net, fused_exactly, image, reasons

SIZES = (9, 10, 7)
CONVS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS: dict[int, Any] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
Join = Callable[[Any, Any, Any], Tensor]


def net(join: Join, n: int = 2, channels: int = 11, *, size: int = 1, **options: Any) -> Net:
    """Activated convs of 6 and of 5 channels, each with a BatchNorm behind its activation, and a conv that reads what is joined of them."""

    def forward(m: Any, x: Tensor) -> Any:
        return m.last(join(m, m.a(x).relu(), torch.tanh(m.b(x)))).relu()

    norms = {"na": NORMS[n](6), "nb": NORMS[n](5)}
    return Net(
        forward,
        a=CONVS[n](4, 6, 1),
        b=CONVS[n](4, 5, 3, padding=1),
        **norms,
        last=CONVS[n](channels, 3, size, **options),
    )


def called(fused: Any) -> list[str]:
    """The layers that a fused net calls. A net may have a BatchNorm that it never calls."""
    return [str(node.target) for node in fused.graph.nodes if node.op == "call_module"]


FOLDED: dict[str, tuple[Join, int]] = {
    "both": (lambda m, a, b: torch.cat([m.na(a), m.nb(b)], 1), 11),
    "the first": (lambda m, a, b: torch.cat((m.na(a), b), dim=1), 11),
    "the second": (lambda m, a, b: torch.concat(tensors=[a, m.nb(b)], axis=1), 11),  # type: ignore[call-arg]
    "with the input of one": (lambda m, a, b: torch.concatenate([m.na(a), m.nb(b), a], m.axis), 17),
    "raw and normed": (lambda m, a, b: torch.cat([a, m.na(a), b], 1), 17),
    "in another one": (lambda m, a, b: torch.cat([b, torch.cat([m.na(a), m.nb(b)], 1)], 1), 16),
}


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("case", FOLDED)
def test_norms_are_folded_into_the_conv_behind(case: str, dimensions: int) -> None:
    join, channels = FOLDED[case]
    model: Any = net(join, dimensions, channels, size=3, stride=2)
    model.axis = -dimensions - 1
    fused = fused_exactly(model, image(2, 4, *SIZES[:dimensions]))
    assert called(fused) == ["a", "b", "last"]


def test_an_average_stands_behind_the_concatenation() -> None:
    model = net(lambda m, a, b: nn.functional.avg_pool2d(torch.cat([m.na(a), m.nb(b)], 1), 2), size=3)
    fused = fused_exactly(model, image())
    assert called(fused) == ["a", "b", "last"]


STAYS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "zero padding": (
        lambda: net(lambda m, a, b: torch.cat([m.na(a), m.nb(b)], 1), size=3, padding=1),
        "the first map's bias does not reach the border",
    ),
    "a norm twice": (
        lambda: net(lambda m, a, b: torch.cat([(y := m.na(a)), b, y], 1), channels=17, size=3),
        "no rule",
    ),
    "another reader": (
        lambda: net(lambda m, a, b: torch.cat([(y := m.na(a)), b + y[:, :5]], 1), channels=11),
        "has a second user",
    ),
    "another axis": (lambda: net(lambda m, a, b: torch.cat([m.na(a), a], 2), channels=6), "no rule"),
    "an unknown number of channels": (
        lambda: net(lambda m, a, b: torch.cat([torch.sort(b)[0], m.na(a)], 1)),
        "no rule",
    ),
    "a write in place": (
        lambda: net(lambda m, a, b: torch.cat([m.na(a), a.mul_(2)], 1), channels=12),
        "changes",
    ),
}


@pytest.mark.parametrize("case", STAYS)
def test_what_stays(case: str) -> None:
    build, reason = STAYS[case]
    model = build()
    fused = fused_exactly(model, image())
    assert "na" in called(fused)
    assert reason in reasons(fused)
