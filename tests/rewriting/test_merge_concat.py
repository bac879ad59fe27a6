"""Concatenated branches and the conv that reads them become one conv, wherever together they are one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import repfx
from tests.inline_net import Net, convs, error_of, fused_exactly, image, norms, reasons


def conv_norm(out_channels: int, size: int = 1, **options: Any) -> nn.Sequential:
    conv = nn.Conv2d(4, out_channels, size, padding=size // 2, bias=False, **options)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))


def concat_net(mix: nn.Module, *branches: nn.Module, dim: int = 1, function: Callable[..., Any] = torch.cat) -> Net:
    def forward(m: Any, x: Tensor) -> Any:
        return m.mix(function([branch(x) for branch in m.branches], dim))

    return Net(forward, branches=nn.ModuleList(branches), mix=mix)


def raw_and_normed(dimensions: int, **options: Any) -> Net:
    """MobileIE's block: each conv is concatenated as it is and behind a BatchNorm."""
    conv: Any = [nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d][dimensions]
    norm: Any = [nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d][dimensions]

    def forward(m: Any, x: Tensor) -> Any:
        x = x if dimensions else x.flatten(1)
        a, b = m.a(x), m.b(x)
        return m.mix(torch.cat([a, b, m.na(a), m.nb(b)], 1))

    a = conv(4, 5, 3, padding=1, **options) if dimensions else conv(4, 5)
    b, mix = (conv(*sizes, *((1,) if dimensions else ()), **options) for sizes in ((4, 5), (20, 6)))
    return Net(forward, a=a, b=b, na=norm(5), nb=norm(5), mix=mix)


MERGED: dict[str, tuple[Callable[[], Net], tuple[int, ...]]] = {  # with the shape of the input
    "three windows": (lambda: concat_net(nn.Conv2d(12, 3, 1), conv_norm(3, 3), conv_norm(7), conv_norm(2, 5)), ()),
    "the input itself": (lambda: concat_net(nn.Conv2d(9, 6, 1), nn.Identity(), conv_norm(5, 3)), ()),
    "pooling": (lambda: concat_net(nn.Conv2d(9, 6, 1), nn.AvgPool2d(3, 1, 1), conv_norm(5, 3)), ()),
    "a chain": (
        lambda: concat_net(nn.Conv2d(9, 6, 1), nn.Sequential(conv_norm(4), nn.Conv2d(4, 4, 3)), nn.Conv2d(4, 5, 3)),
        (),
    ),
    "a norm behind": (
        lambda: concat_net(nn.Sequential(nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6)), conv_norm(3, 3), conv_norm(5, 3)),
        (),
    ),
    "a wide window behind": (
        lambda: concat_net(nn.Conv2d(8, 6, 3), nn.Conv2d(4, 3, 1), nn.Conv2d(4, 5, 1)),
        (),
    ),
    "counted from the end": (lambda: concat_net(nn.Conv2d(8, 6, 1), conv_norm(3, 3), conv_norm(5, 3), dim=-3), ()),
    "by its other name": (
        lambda: concat_net(nn.Conv2d(8, 6, 1), conv_norm(3, 3), conv_norm(5, 3), function=torch.concatenate),
        (),
    ),
    "by keywords": (
        lambda: concat_net(
            nn.Conv2d(8, 6, 1),
            conv_norm(3, 3),
            conv_norm(5, 3),
            function=lambda parts, dim: torch.cat(tensors=parts, dim=dim),
        ),
        (),
    ),
    "one part twice": (
        lambda: Net(lambda m, x: m.mix(torch.cat([m.a(x)] * 2, 1)), a=nn.Conv2d(4, 3, 3), mix=nn.Conv2d(6, 3, 1)),
        (),
    ),
    "raw and normed": (lambda: raw_and_normed(2), ()),
    "raw and normed, without bias": (lambda: raw_and_normed(2, bias=False), ()),
    "raw and normed, one axis": (lambda: raw_and_normed(1), (2, 4, 11)),
    "raw and normed, three axes": (lambda: raw_and_normed(3), (2, 4, 4, 5, 6)),
    "raw and normed, linear": (lambda: raw_and_normed(0), (7, 4)),
    "a part inside another part": (
        lambda: Net(
            lambda m, x: (lambda y: m.mix(torch.cat([y, x, m.b(y)], 1)))(m.a(x)),
            a=nn.Conv2d(4, 4, 1, bias=False),
            b=nn.Conv2d(4, 3, 3, padding=1),
            mix=nn.Conv2d(11, 3, 1),
        ),
        (),
    ),
    "groups": (
        lambda: concat_net(nn.Conv2d(12, 6, 1), nn.Conv2d(4, 8, 3, groups=4, padding=1), nn.Conv2d(4, 4, 3, padding=1)),
        (),
    ),
    "one axis": (
        lambda: concat_net(
            nn.Conv1d(9, 6, 1, bias=False), nn.Conv1d(4, 4, 3, stride=2), nn.Conv1d(4, 5, 3, stride=2, padding=0)
        ),
        (2, 4, 11),
    ),
    "linear layers of sequences": (
        lambda: concat_net(nn.Linear(8, 3), nn.Linear(4, 3), nn.Linear(4, 5), dim=-1),
        (2, 7, 4),
    ),
}


@pytest.mark.parametrize("name", MERGED)
def test_it_becomes_one_conv(name: str) -> None:
    make, size = MERGED[name]
    fused = fused_exactly(make(), image(*size))
    assert (len(convs(fused)), norms(fused)) == (1, []), str(repfx.report(fused))
    assert "merge_concat" in {edit.rule for edit in repfx.report(fused).applied}


def two_users(m: Any, x: Tensor) -> Any:
    y = torch.cat([m.a(x), m.b(x)], 1)
    return m.mix(y).sum() + y


def read_outside(m: Any, x: Tensor) -> Any:
    a = m.a(x)
    return m.mix(torch.cat([a, m.b(x), m.n(a)], 1)) + a.sum()


def changed_between(m: Any, x: Tensor) -> Any:
    a = m.a(x)
    b = a.add_(1)
    return m.mix(torch.cat([b, m.n(a)], 1))


KEPT: dict[str, tuple[Callable[[], Net], tuple[int, ...], int]] = {  # with how many convs stay
    "along the height": (lambda: concat_net(nn.Conv2d(5, 6, 1), conv_norm(5, 3), conv_norm(5), dim=2), (), 3),
    "along the batch": (lambda: concat_net(nn.Conv2d(5, 6, 1), conv_norm(5, 3), conv_norm(5), dim=0), (), 3),
    "along the time of a sequence": (
        lambda: concat_net(nn.Linear(5, 6), nn.Linear(4, 5), nn.Linear(4, 5), dim=1),
        (2, 7, 4),
        3,
    ),
    "an activation": (
        lambda: concat_net(nn.Conv2d(8, 6, 1), nn.Sequential(conv_norm(3, 3), nn.ReLU()), conv_norm(5)),
        (),
        3,
    ),
    "two users": (
        lambda: Net(two_users, a=nn.Conv2d(4, 3, 1), b=nn.Conv2d(4, 5, 1), mix=nn.Conv2d(8, 6, 1)),
        (),
        3,
    ),
    "raw and normed and read": (
        lambda: Net(
            read_outside, a=nn.Conv2d(4, 3, 1), b=nn.Conv2d(4, 5, 1), n=nn.BatchNorm2d(3), mix=nn.Conv2d(11, 6, 1)
        ),
        (),
        3,
    ),
    "raw and normed, changed in between": (
        lambda: Net(changed_between, a=nn.Conv2d(4, 3, 1), n=nn.BatchNorm2d(3), mix=nn.Conv2d(6, 6, 1)),
        (),
        2,
    ),
    "another input": (
        lambda: Net(
            lambda m, x: m.mix(torch.cat([m.a(x), m.b(torch.relu(x))], 1)),
            a=nn.Conv2d(4, 3, 1),
            b=nn.Conv2d(4, 5, 1),
            mix=nn.Conv2d(8, 6, 1),
        ),
        (),
        3,
    ),
    "biases behind a border": (
        lambda: concat_net(nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(4, 3, 1), nn.Conv2d(4, 5, 1)),
        (),
        3,
    ),
    "more weights": (lambda: concat_net(nn.Conv2d(3, 40, 1), nn.Conv2d(4, 2, 5), nn.Conv2d(4, 1, 5)), (), 3),
    "one part": (lambda: concat_net(nn.Conv2d(3, 6, 1, groups=3), conv_norm(3, 3)), (), 2),
    "groups that would be one": (
        lambda: concat_net(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)),
        (),
        3,
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_it_stays(name: str) -> None:
    make, size, left = KEPT[name]
    fused = fused_exactly(make(), image(*size))
    assert len(convs(fused)) == left, str(repfx.report(fused))


def test_one_image_without_a_batch() -> None:
    """Channels are the first axis if there is no batch axis; a concatenation along the second one is along the height."""
    channels = fused_exactly(
        concat_net(nn.Conv2d(8, 6, 1), nn.Conv2d(4, 3, 1), nn.Conv2d(4, 5, 1), dim=0), image(4, 9, 10)
    )
    height = fused_exactly(
        concat_net(nn.Conv2d(5, 6, 1), nn.Conv2d(4, 5, 1), nn.Conv2d(4, 5, 1), dim=1), image(4, 9, 10)
    )
    assert (len(convs(channels)), len(convs(height))) == (1, 3)


def test_blocks_among_the_parts_are_merged_too() -> None:
    model = concat_net(nn.Conv2d(8, 6, 1), conv_norm(3, 3), conv_norm(5, 3)).double().eval()
    expanded = repfx.expand(model, "dbb")
    fused = repfx.fuse(expanded)
    assert len(convs(fused)) == 1, reasons(fused)
    assert error_of(fused, expanded, image()) < 1e-9
