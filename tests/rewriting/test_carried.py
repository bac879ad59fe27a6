"""BatchNorms are folded into convs through what only moves or averages values, with the same outputs, or stay with the reason."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import repfx
from repfx.errors import InvalidInput
from repfx.testing import randomize_batch_norm
from tests.inline_net import Net, convs, error_of, fused_exactly, image, norms, reasons

Function = Callable[[Any, Any], Any]
Case = tuple[Function, dict[str, nn.Module]]


class ToNCHW(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return x.permute(0, 3, 1, 2)


class Pooled(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return x.mean([2, 3])


def case(function: Function, **layers: nn.Module) -> Case:
    return function, layers


def conv(out_channels: int = 6, **settings: Any) -> nn.Module:
    return nn.Conv2d(4, out_channels, 3, **settings)


norm, linear = nn.BatchNorm2d, nn.Linear

BEHIND: dict[str, Case] = {
    "permute": case(lambda m, x: m.n(m.a(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)), a=linear(4, 6), n=norm(6)),
    "permute in a module": case(
        lambda m, x: m.n(m.p(m.a(x.permute(0, 2, 3, 1)))), a=linear(4, 6), n=norm(6), p=ToNCHW()
    ),
    "transpose": case(lambda m, x: m.n(m.a(x.transpose(1, 3)).transpose(-1, 1)), a=linear(4, 6, bias=False), n=norm(6)),
    "movedim": case(lambda m, x: m.n(m.a(x.movedim(1, -1)).movedim(-1, 1)), a=linear(4, 6), n=norm(6)),
    "torch.moveaxis": case(
        lambda m, x: m.n(torch.moveaxis(m.a(x.movedim(1, -1)), (3,), (1,))), a=linear(4, 6), n=norm(6)
    ),
    "permute and copy": case(
        lambda m, x: m.n(torch.permute(m.a(x.permute(0, 2, 3, 1)).contiguous(), (0, -1, 1, 2)).clone()),
        a=linear(4, 6),
        n=norm(6),
    ),
    "positions swapped": case(lambda m, x: m.n(m.a(x).swapaxes(2, 3)), a=conv(groups=2), n=norm(6)),
    "F.avg_pool2d": case(lambda m, x: m.n(F.avg_pool2d(m.a(x), (2, 3), 1)), a=conv(), n=norm(6)),
    "AvgPool2d, padding not counted": case(
        lambda m, x: m.n(m.p(m.a(x))), a=conv(), n=norm(6), p=nn.AvgPool2d(3, 2, 1, count_include_pad=False)
    ),
    "AvgPool2d, ceil mode": case(
        lambda m, x: m.n(m.p(m.a(x))), a=conv(stride=2), n=norm(6), p=nn.AvgPool2d(3, 2, ceil_mode=True)
    ),
    "F.adaptive_avg_pool2d": case(lambda m, x: m.n(F.adaptive_avg_pool2d(m.a(x), (3, 2))), a=conv(), n=norm(6)),
    "pooled and flat": case(
        lambda m, x: m.n(m.f(m.p(m.a(x)))), a=conv(), n=nn.BatchNorm1d(6), p=nn.AdaptiveAvgPool2d(1), f=nn.Flatten()
    ),
    "mean and flat": case(
        lambda m, x: m.n(m.a(x).mean((-2, -1), keepdim=True).flatten(1)), a=conv(), n=nn.BatchNorm1d(6)
    ),
    "mean": case(lambda m, x: m.n(torch.mean(m.a(x), dim=(2, 3))), a=conv(bias=False), n=nn.BatchNorm1d(6)),
    "mean in a module": case(lambda m, x: m.n(m.p(m.a(x))), a=conv(), n=nn.BatchNorm1d(6), p=Pooled()),
    "F.interpolate": case(lambda m, x: m.n(F.interpolate(m.a(x), scale_factor=2)), a=conv(), n=norm(6)),
    "F.interpolate to a size of the input": case(
        lambda m, x: m.n(F.interpolate(m.a(x), size=x.shape[2:])), a=conv(), n=norm(6)
    ),
    "F.interpolate, the size first": case(
        lambda m, x: m.n(F.interpolate(size=m.b(x).shape[2:], input=m.a(x))), a=conv(), b=conv(), n=norm(6)
    ),
    "Upsample": case(
        lambda m, x: m.n(m.p(m.a(x))), a=conv(), n=norm(6), p=nn.Upsample(scale_factor=1.5, mode="bilinear")
    ),
    "PixelShuffle": case(lambda m, x: m.n(m.p(m.a(x))), a=conv(24), n=norm(6), p=nn.PixelShuffle(2)),
    "F.channel_shuffle": case(lambda m, x: m.n(F.channel_shuffle(m.a(x), 3)), a=conv(), n=norm(6)),
    "transposed conv, shuffled": case(
        lambda m, x: m.n(m.p(m.a(x))), a=nn.ConvTranspose2d(4, 6, 3, groups=2), n=norm(6), p=nn.ChannelShuffle(2)
    ),
    "cat": case(lambda m, x: m.n(torch.cat([m.a(x), m.b(x)], 1)), a=conv(4), b=conv(2), n=norm(6)),
    "cat of a cat, shuffled": case(
        lambda m, x: m.n(F.channel_shuffle(torch.cat((m.a(x), torch.cat((m.b(x), m.c(x)), dim=-3)), 1), 2)),
        a=conv(3),
        b=conv(2),
        c=conv(1),
        n=norm(6),
    ),
    "cat of poolings": case(
        lambda m, x: m.n(torch.cat([F.avg_pool2d(m.a(x), 2), F.avg_pool2d(m.b(x), 2)], dim=1)),
        a=conv(4),
        b=conv(2, bias=False),
        n=norm(6),
    ),
    "1d": case(lambda m, x: m.n(F.avg_pool1d(m.a(x.flatten(2)), 3)), a=nn.Conv1d(4, 6, 3), n=nn.BatchNorm1d(6)),
    "3d": case(
        lambda m, x: m.n(m.a(x.unsqueeze(2).permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)),
        a=linear(4, 6),
        n=nn.BatchNorm3d(6),
    ),
    "tokens": case(
        lambda m, x: m.n(m.b(m.a(x).relu().flatten(2).transpose(1, 2)).transpose(1, 2)),
        a=conv(),
        b=linear(6, 5),
        n=nn.BatchNorm1d(5),
    ),
}


@pytest.mark.parametrize("name", BEHIND)
def test_a_norm_behind_what_carries_it_is_folded(name: str) -> None:
    function, layers = BEHIND[name]
    fused = fused_exactly(Net(function, **layers), image())
    assert not norms(fused), reasons(fused)


IN_FRONT: dict[str, Case] = {
    "average": case(lambda m, x: m.a(F.avg_pool2d(m.n(x.relu()), 2)), n=norm(4), a=conv(3)),
    "padded average, not counted": case(
        lambda m, x: m.a(m.p(m.n(x.relu()))), n=norm(4), a=conv(3), p=nn.AvgPool2d(3, 2, 1, count_include_pad=False)
    ),
    "permute": case(lambda m, x: m.a(m.n(x.relu()).permute(0, 2, 3, 1)), n=norm(4), a=linear(4, 3)),
    "permute back": case(lambda m, x: m.a(m.p(m.n(x.relu()).transpose(1, 3))), n=norm(4), a=conv(3), p=ToNCHW()),
    "mean": case(lambda m, x: m.a(m.n(x.relu()).mean((2, 3))), n=norm(4), a=linear(4, 3)),
    "pooled and flat": case(
        lambda m, x: m.a(m.f(m.p(m.n(x.relu())))),
        n=norm(4),
        a=linear(4, 3),
        p=nn.AdaptiveAvgPool2d(1),
        f=nn.Flatten(),
    ),
    "upsampling": case(lambda m, x: m.a(F.interpolate(m.n(x.relu()), scale_factor=2)), n=norm(4), a=conv(3)),
    "pixel unshuffle": case(
        lambda m, x: m.a(F.pixel_unshuffle(m.n(x[:, :, :8].relu()), 2)), n=norm(4), a=nn.Conv2d(16, 4, 3, groups=2)
    ),
    "shuffled channels": case(lambda m, x: m.a(F.channel_shuffle(m.n(x.relu()), 2)), n=norm(4), a=conv(6, groups=2)),
    "1d": case(
        lambda m, x: m.a(F.avg_pool1d(m.n(x.flatten(2).relu()), 2)),
        n=nn.BatchNorm1d(4),
        a=nn.Conv1d(4, 3, 3, bias=False),
    ),
    "3d": case(
        lambda m, x: m.a(F.interpolate(m.n(x.unsqueeze(2).relu()), scale_factor=2)),
        n=nn.BatchNorm3d(4),
        a=nn.Conv3d(4, 3, 1),
    ),
}


@pytest.mark.parametrize("name", IN_FRONT)
def test_a_norm_in_front_of_what_carries_it_is_folded(name: str) -> None:
    function, layers = IN_FRONT[name]
    model = Net(lambda m, x: function(m, m.stem(x)), stem=nn.Conv2d(4, 4, 1), **layers)
    fused = fused_exactly(model, image())
    assert not norms(fused), reasons(fused)


def twice(m: Any, x: Any) -> Any:
    y = m.a(x)
    return m.n(torch.cat([y, y], 1))


def read_again(m: Any, x: Any) -> Any:
    y = m.a(x.permute(0, 2, 3, 1))
    return m.n(y.permute(0, 3, 1, 2)).sum() + y


def read_in_front(m: Any, x: Any) -> Any:
    y = m.n(x.relu())
    return m.a(y.mean((2, 3))).sum() + y


def written_on_the_way(m: Any, x: Any) -> Any:
    x = x.relu()
    y = m.n(x)
    x.add_(1)
    return m.a(y.permute(0, 2, 3, 1)).sum() + x


STAYS: dict[str, tuple[Function, dict[str, nn.Module], str]] = {
    "another axis": (lambda m, x: m.n(m.a(x).permute(0, 2, 1, 3)), {"a": conv(), "n": norm(7)}, "permute comes before"),
    "zeros that count": (
        lambda m, x: m.n(m.p(m.a(x))),
        {"a": conv(), "n": norm(6), "p": nn.AvgPool2d(3, 2, 1)},
        "AvgPool2d comes before",
    ),
    "another divisor": (
        lambda m, x: m.n(F.avg_pool2d(m.a(x), 2, divisor_override=3)),
        {"a": conv(), "n": norm(6)},
        "avg_pool2d comes before",
    ),
    "a mean that isn't over positions alone": (
        lambda m, x: m.n(m.a(x).mean((2,), keepdim=True).flatten(1)),
        {"a": conv(), "n": nn.BatchNorm1d(48)},
        "flatten comes before",
    ),
    "maximum": (lambda m, x: m.n(F.max_pool2d(m.a(x), 2)), {"a": conv(), "n": norm(6)}, "max_pool2d comes before"),
    "mean over channels": (
        lambda m, x: m.n(m.a(x).mean(1, keepdim=True).mean((2,), keepdim=True)),
        {"a": conv(), "n": norm(1)},
        "mean comes before",
    ),
    "positions made into channels": (
        lambda m, x: m.n(m.a(x).flatten(1)),
        {"a": conv(), "n": nn.BatchNorm1d(336)},
        "flatten comes before",
    ),
    "cat along a row": (
        lambda m, x: m.n(torch.cat([m.a(x), m.b(x)], 3)),
        {"a": conv(), "b": conv(), "n": norm(6)},
        "cat comes before",
    ),
    "a part of a cat that is activated": (
        lambda m, x: m.n(torch.cat([m.a(x), m.b(x).relu()], 1)),
        {"a": conv(4), "b": conv(2), "n": norm(6)},
        "cat comes before",
    ),
    "a part that is read twice": (twice, {"a": conv(3), "n": norm(6)}, "'a' is read twice"),
    "a second reader": (read_again, {"a": linear(4, 6), "n": norm(6)}, "'a' has a second user"),
    "a second reader of the norm": (read_in_front, {"n": norm(4), "a": linear(4, 3)}, "'n' has a second user"),
    "zero padding": (
        lambda m, x: m.a(F.avg_pool2d(m.n(x.relu()), 2)),
        {"n": norm(4), "a": conv(3, padding=1)},
        "does not reach the border",
    ),
    "channels made into positions": (
        lambda m, x: m.a(F.pixel_shuffle(m.n(x.relu()), 2)),
        {"n": norm(4), "a": nn.Conv2d(1, 3, 3)},
        "relu comes before",
    ),
    "written on the way": (written_on_the_way, {"n": norm(4), "a": linear(4, 3)}, "changes 'relu' in place"),
}


@pytest.mark.parametrize("name", STAYS)
def test_a_norm_that_cannot_pass_stays_with_the_reason(name: str) -> None:
    function, layers, reason = STAYS[name]
    fused = fused_exactly(Net(function, **layers), image())
    assert norms(fused) == ["n"]
    assert reason in reasons(fused)


def test_a_norm_that_was_carried_is_not_put_back_elsewhere() -> None:
    layers = {"b": nn.Conv2d(4, 4, 1), "k": norm(4), "a": linear(4, 6), "p": ToNCHW(), "n": norm(6)}
    model = Net(lambda m, x: m.n(m.p(m.a(m.k(m.b(x)).relu().permute(0, 2, 3, 1)))), **layers)
    fused = fused_exactly(model, image())
    restored = repfx.restore(fused)
    assert norms(restored) == ["k"]
    assert "'p' stands between it and its BatchNorm" in reasons(restored)
    assert restored.state_dict().keys() != model.state_dict().keys()
    assert error_of(restored.eval(), model, image()) < 1e-9


def test_restore_says_why_the_only_norm_is_not_put_back() -> None:
    model = Net(lambda m, x: m.n(m.p(m.a(x.permute(0, 2, 3, 1)))), a=linear(4, 6), p=ToNCHW(), n=norm(6))
    fused = fused_exactly(model, image())
    reason = (
        r"can be put back \(at 'a', 'p' stands between it and its BatchNorm\); name those to be restored in `sites`"
    )
    with pytest.raises(InvalidInput, match=reason):
        repfx.restore(fused)


def test_a_carried_norm_is_rounded_once() -> None:
    """The kernel of a conv stays in float64 until the BatchNorm behind a permutation is folded, too."""
    function, layers = BEHIND["permute in a module"]
    model: Any = randomize_batch_norm(Net(function, **layers))
    rounded = repfx.fuse(model).get_submodule("a").weight
    exact = fused_exactly(copy.deepcopy(model).double().eval(), image()).get_submodule("a").weight
    assert float((rounded.double() - exact).abs().max()) <= 2**-24 * float(exact.abs().max())
    assert convs(model) == ["a"]
