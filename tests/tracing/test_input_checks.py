"""Code that checks its input is traced, and its graph checks the same. Code that does more with the answer isn't.

pytest would write the assertions of such code anew: PYTEST_DONT_REWRITE.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, _assert, nn

import repfx
from repfx.errors import InvalidInput
from tests.inline_net import Net, error_of, fused_exactly, image, norms, ready, reasons

SIZES = {1: (2, 4, 12), 2: (2, 4, 12, 8), 3: (2, 4, 6, 8, 10)}
CONVS: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS: dict[int, type[nn.Module]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def net(check: Callable[[Any, Tensor], None], dimensions: int = 2) -> Net:
    """A net whose forward begins with a check of its input."""

    def forward(m: Any, x: Tensor) -> Any:
        check(m, x)
        return m.norm(m.conv(x))

    layers = {"conv": CONVS[dimensions](4, 4, 3), "norm": NORMS[dimensions](4)}
    return Net(forward, **layers, axes=dimensions + 2, channels=4, dtype=torch.float64)


def by_if(m: Any, x: Tensor) -> None:
    if x.dim() != m.axes:
        raise ValueError("wrong axes")


def by_either(m: Any, x: Tensor) -> None:
    if x.shape[1] != m.channels or x.shape[-1] % 2 != 0:
        nearest = x.shape[-1] // 2 * 2
        raise RuntimeError(f"use {nearest}")


def by_not(m: Any, x: Tensor) -> None:
    if not (x.size(1) == m.channels and x.shape[-1] % 2 == 0):
        raise RuntimeError


def by_mode(m: Any, x: Tensor) -> None:
    if m.channels > 3 and x.shape[-1] % 2:
        raise RuntimeError


def by_elif(m: Any, x: Tensor) -> None:
    if m.channels < 3:
        raise TypeError
    elif x.ndim == m.axes - 1:
        raise ValueError
    if x.shape[1] == m.channels:
        pass
    else:
        raise ValueError


def by_nested_ifs(m: Any, x: Tensor) -> None:
    if x.shape[1] != m.channels:
        if m.training:
            raise ValueError
        else:
            raise RuntimeError


def by_assert(m: Any, x: Tensor) -> None:
    assert x.shape[1] == m.channels and x.dim() == m.axes, f"{tuple(x.shape)}"  # noqa: PT018
    assert x.shape[-1] % 2 == 0
    assert not x.shape[-1] % 2


def by_torch_assert(m: Any, x: Tensor) -> None:
    _assert(x.shape[1] == m.channels, f"{x.shape[1]} channels, not {m.channels}")
    torch._assert(
        x.shape[-1] % 2 == 0,
        f"odd: {x.shape[-1]:d}",
    )


def by_dtype(m: Any, x: Tensor) -> None:
    if x.dtype != m.dtype or x.device != torch.device("cpu"):
        raise TypeError


def in_a_helper(m: Any, x: Tensor) -> None:
    by_if(m, x)
    by_assert(m, x)


CHECKS = (by_if, by_either, by_not, by_elif, by_nested_ifs, by_assert, by_torch_assert, by_dtype, in_a_helper)
EXACT = (by_mode,) if sys.version_info >= (3, 12) else ()  # before, Python doesn't tell which operand of `and` it asks


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("check", [*CHECKS, *EXACT])
def test_a_net_that_checks_its_input_is_traced_whole(check: Callable[..., None], dimensions: int) -> None:
    fused = fused_exactly(net(check, dimensions), image(*SIZES[dimensions]))
    assert isinstance(fused, torch.fx.GraphModule), reasons(fused)
    assert norms(fused) == []


REFUSED: Sequence[tuple[Callable[..., None], tuple[int, ...]]] = (
    (by_if, (4, 12, 8)),
    (by_either, (2, 4, 12, 7)),
    (by_not, (2, 4, 12, 7)),
    (by_elif, (4, 12, 8)),
    (by_assert, (2, 4, 12, 7)),
    *((check, (2, 4, 12, 7)) for check in EXACT),
)


@pytest.mark.parametrize(("check", "sizes"), REFUSED)
def test_what_the_code_refuses_its_graph_refuses(check: Callable[..., None], sizes: tuple[int, ...]) -> None:
    model = ready(net(check))
    with pytest.raises((ValueError, RuntimeError, AssertionError)):
        model(image(*sizes))
    with pytest.raises(InvalidInput, match=r"doesn't pass a check in the code .*(raise|assert)"):
        repfx.fuse(model)(image(*sizes))


def test_expanded_and_exported_it_is_the_same(tmp_path: Any) -> None:
    model = ready(net(by_either))
    expanded = repfx.expand(model, "dbb", example=image(*SIZES[2]))
    assert error_of(expanded, model, image(*SIZES[2])) < 1e-9
    repfx.export_onnx(model.float(), tmp_path / "net.onnx", image(*SIZES[2]).float())
    fused, free = repfx.fuse(model), {0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO}
    for strict in (False, True):
        program = torch.export.export(fused, (image(*SIZES[2]).float(),), dynamic_shapes=(free,), strict=strict)
        assert program.module()(torch.ones(5, 4, 14, 8)).shape == (5, 4, 12, 6)


# --- What isn't a check ----------------------------------------------------------------------------------------------


def caught(m: Any, x: Tensor) -> Any:
    try:
        by_if(m, x)
    except ValueError:
        return x
    return x + 1


def suppressed(m: Any, x: Tensor) -> Any:
    with contextlib.suppress(ValueError):
        by_if(m, x)
    return x


def decided(m: Any, x: Tensor) -> Any:
    return x + 1 if x.shape[1] == m.channels else x


def decided_by_if(m: Any, x: Tensor) -> Any:
    if x.shape[-1] == 12:
        x = x + 1
    elif x.shape[-1] == 13:
        raise ValueError
    return x


def one_of_two(m: Any, x: Tensor) -> Any:
    if x.shape[-1] == 8 and x.shape[-2] == 8:
        raise ValueError
    return x


def returned(m: Any, x: Tensor) -> Any:
    if x.shape[-1] == 8:
        if m.channels == 4:
            return x + 1
        raise ValueError
    return x


def inside(m: Any, x: Tensor) -> Any:
    if x.shape[1] != (m.channels if x.shape[-1] == 8 else 4):
        raise ValueError
    return x


def lists(m: Any, x: Tensor) -> Any:
    h, w = x.shape[-2:]
    if [h, w] == [m.channels, m.channels]:
        raise ValueError
    return x


def any_of(m: Any, x: Tensor) -> Any:
    if all(size == m.channels for size in x.shape[1:2]):
        return x
    raise ValueError


def chained(m: Any, x: Tensor) -> Any:
    assert 1 < x.shape[1] < 5
    return x


def by_numbers(m: Any, x: Tensor) -> Any:
    if x.mean() > 100:
        raise ValueError
    return x


def as_text(m: Any, x: Tensor) -> Any:
    return x * len(f"{x.shape[1]}")


@pytest.mark.parametrize(
    "function",
    [
        caught,
        suppressed,
        decided,
        decided_by_if,
        one_of_two,
        returned,
        inside,
        lists,
        any_of,
        chained,
        by_numbers,
        as_text,
    ],
)
def test_other_decisions_are_not_traced(function: Callable[[Any, Tensor], Any]) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        return m.norm(m.conv(function(m, x)))

    model = Net(forward, conv=nn.Conv2d(4, 4, 3), norm=nn.BatchNorm2d(4), axes=4, channels=4)
    for sizes in ((2, 4, 12, 8), (2, 4, 7, 12)):
        fused = fused_exactly(model, image(*sizes))
        assert not isinstance(fused, torch.fx.GraphModule)
    assert norms(fused) == ["norm"]
