"""Padding in front of a conv and a crop, or padding, behind it become the conv's own padding, where both sides of that are alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor, nn

import repfx
from tests.inline_net import Net, convs, error_of, fused_exactly, image, norms, ready, reasons

SIZES = (9, 10, 8)
CONVS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS: dict[int, Any] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def around(before: Callable[..., Any], after: Callable[..., Any], n: int, size: int = 3, **options: Any) -> Net:
    """A conv with something around it, a BatchNorm behind and an activation."""

    def forward(m: Any, x: Tensor) -> Any:
        return m.norm(after(m.conv(before(x, n)), n)).relu()

    return Net(forward, conv=CONVS[n](4, 5, size, **options), norm=NORMS[n](5))


def nothing(x: Any, n: int) -> Any:
    return x


def pad(*sides: int, **options: Any) -> Callable[[Any, int], Any]:
    return lambda x, n: F.pad(x, sides * n, **options)


def each(*slices: slice) -> Callable[[Any, int], Any]:
    """Crop all axes alike, one index after another."""

    def crop(x: Any, n: int) -> Any:
        for one in slices:
            x = x[(slice(None), slice(None), *(one,) * n)]
        return x

    return crop


# what stands in front of the conv and behind it, the settings of the conv, and its padding in the end
ABSORBED: dict[str, tuple[Callable[..., Any], Callable[..., Any], dict[str, Any], int]] = {
    "a crop by an index": (nothing, each(slice(1, -1)), {"padding": 2}, 1),
    "a crop by negative padding": (nothing, pad(-2, -2), {"padding": 2}, 0),
    "a crop of one axis after the other": (nothing, each(slice(1, None), slice(None, -1)), {"padding": 1}, 0),
    "with a stride": (nothing, each(slice(1, -1)), {"padding": 2, "stride": 2}, 0),
    "two borders, and a crop of one side": (pad(0, 1), each(slice(None, -1)), {"padding": 1}, 1),
    "two borders, the other side": (pad(2, 1, value=0.0), pad(-1, 0), {}, 1),
    "two borders, both paddings": (pad(0, 1), pad(1, 0), {"size": 1, "bias": False}, 1),
    "two borders of a wide conv": (pad(3, 4), each(slice(1, -2)), {"size": 5, "dilation": 2}, 2),
    "padding by reflection": (nothing, lambda x, n: pad(-1, -1)(pad(3, 3, mode="reflect")(x, n), n), {"size": 1}, 2),
    "padding and a crop": (nothing, lambda x, n: pad(-2, -2)(pad(2, 2)(x, n), n), {"size": 1, "bias": False}, 0),
}


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("case", ABSORBED)
def test_the_conv_pads_and_crops_by_itself(case: str, dimensions: int) -> None:
    before, after, options, padding = ABSORBED[case]
    if dimensions == 3 and options.get("dilation"):
        options = {**options, "size": 3}
        padding = 2
    net = around(before, after, dimensions, **options)
    fused: Any = fused_exactly(net, image(2, 4, *SIZES[:dimensions]))
    assert (convs(fused), norms(fused)) == (["conv"], [])
    assert fused.conv.padding == (padding,) * dimensions
    assert "pad" not in fused.code
    assert "getitem" not in fused.code


@pytest.mark.parametrize("dimensions", [1, 2])
def test_a_border_of_the_convs_own_bias_and_padding_in_front(dimensions: int) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        y = m.first(F.pad(x, (0, 1) * dimensions))
        bordered = F.pad(y, (1, 0) * dimensions, value=0.5)
        return m.second(bordered).relu()

    first = CONVS[dimensions](4, 6, 1)
    nn.init.constant_(first.bias, 0.5)
    net = Net(forward, first=first, second=CONVS[dimensions](6, 4, 3))
    fused = fused_exactly(net, image(2, 4, *SIZES[:dimensions]))
    assert "F.pad" not in fused.code
    assert "functional.pad" not in fused.code


def test_a_crop_goes_into_a_chain() -> None:
    net = nn.Sequential(
        nn.Conv2d(4, 8, 1, bias=False), nn.Conv2d(8, 3, 3, padding=2), nn.ZeroPad2d(-1), nn.BatchNorm2d(3)
    )
    fused = fused_exactly(net, image())
    assert (convs(fused), norms(fused)) == (["1"], [])


def test_restore_puts_the_norm_back() -> None:
    net = ready(around(nothing, each(slice(1, -1)), 2, padding=2))
    restored = repfx.restore(repfx.fuse(net)).eval()
    assert error_of(restored, net, image()) < 1e-9
    other = ready(around(nothing, each(slice(1, -1)), 2, padding=2), seed=1)
    other.load_state_dict(restored.state_dict())
    assert error_of(other, net, image()) < 1e-9


STAYS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "one side": (lambda: around(nothing, each(slice(1, None)), 2, padding=1), ""),
    "more than is padded": (lambda: around(nothing, each(slice(2, -2)), 2, padding=1), ""),
    "padding behind alone": (lambda: around(nothing, pad(1, 1), 2, size=1, bias=False), ""),
    "a bias in front of zeros": (
        lambda: around(pad(0, 1), pad(1, 0), 2, size=1),
        "",
    ),
    "a window that sees the image": (
        lambda: around(pad(0, 1), pad(1, 0), 2, bias=False),
        "",
    ),
    "a transposed conv": (
        lambda: Net(lambda m, x: m.conv(x)[:, :, 1:-1, 1:-1].relu(), conv=nn.ConvTranspose2d(4, 5, 4, 2)),
        "",
    ),
    "another reader": (
        lambda: Net(
            lambda m, x: ((y := m.conv(x))[:, :, 1:-1, 1:-1].relu(), y.sum()), conv=nn.Conv2d(4, 5, 3, padding=1)
        ),
        "has a second user",
    ),
    "a write into the crop": (
        lambda: Net(lambda m, x: m.conv(x)[:, :, 1:-1, 1:-1].add_(1).relu(), conv=nn.Conv2d(4, 5, 3, padding=1)),
        "",
    ),
}


@pytest.mark.parametrize("case", STAYS)
def test_what_stays(case: str) -> None:
    build, reason = STAYS[case]
    net = ready(build())
    fused = repfx.fuse(net)
    x = image()
    for found, expected in zip(*(each if isinstance(each, tuple) else (each,) for each in (fused(x), net(x)))):
        assert float((found - expected).abs().max()) < 1e-9
    assert reason in reasons(fused)
    repfx.fuse(net, strict=not norms(net))
