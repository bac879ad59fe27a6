"""Legal graphs that break folding elsewhere: fused to the right result, or left alone with the reason."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import repfx
from repfx.algebra.layers import is_batch_norm, is_conv
from repfx.testing import TOLERANCE, randomize_batch_norm, relative_error
from tests.inline_net import Net


@dataclass(frozen=True)
class Case:
    """A net, how many convs and BatchNorms `fuse` leaves, and a part of the reason for those that stay."""

    build: Callable[[], nn.Module]
    convs: int
    norms: int
    reason: str = ""
    shape: tuple[int, ...] = (2, 4, 7, 9)


def conv(kernel_size: int = 3, padding: int = 1, **keywords: int | str | bool) -> nn.Conv2d:
    return nn.Conv2d(4, 4, kernel_size, padding=padding, **keywords)  # type: ignore[arg-type]


def norm(channels: int = 4) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels)


def hooked() -> nn.Conv2d:
    layer = conv()
    layer.register_forward_hook(lambda module, inputs, output: output * 2)
    return layer


def tied() -> nn.Module:
    first, second = conv(), conv()
    second.weight = first.weight
    return Net(lambda net, x: net.b(net.c(x)) + F.relu(net.d(x)), c=first, d=second, b=norm())


def two_names() -> nn.Module:
    layer = conv()
    return Net(lambda net, x: net.b(net.c(x)), c=layer, d=layer, b=norm())


def in_a_plain_list() -> nn.Module:
    layer = conv()
    return Net(lambda net, x: net.b(net.c(x)), c=layer, d=[layer], b=norm())


def read_before_and_after_relu(net: Any, x: Tensor) -> Tensor:
    x = torch.tanh(x)
    first: Tensor = net.c(x)
    x.relu_()
    second: Tensor = net.d(x)
    return first + second


def added_into_the_input(net: Any, x: Tensor) -> Tensor:
    x = torch.tanh(x)
    y = net.c(x)
    alias = x
    alias += y
    return alias + torch.sin(x)


def doubled_twice(net: Any, x: Tensor) -> Tensor:
    x = net.b(net.c(x))
    x = x + x
    return x + x


CASES: dict[str, Case] = {
    "a sum with itself, twice": Case(lambda: Net(doubled_twice, c=conv(), b=norm()), 1, 0),
    "conv called twice": Case(
        lambda: Net(lambda net, x: net.b(net.c(net.c(x))), c=conv(), b=norm()), 1, 1, "called 2 times"
    ),
    "conv and BatchNorm called twice": Case(
        lambda: Net(lambda net, x: net.b(net.c(F.relu(net.b(net.c(x))))), c=conv(), b=norm()), 1, 1, "called 2 times"
    ),
    "one call without BatchNorm": Case(
        lambda: Net(lambda net, x: net.b(net.c(x)) + F.relu(net.c(x)), c=conv(), b=norm()), 1, 1, "called 2 times"
    ),
    "weight read elsewhere": Case(
        lambda: Net(lambda net, x: net.b(net.c(x)) + net.c.weight.mean(), c=conv(), b=norm()), 1, 1, "read elsewhere"
    ),
    "two consumers": Case(
        lambda: Net(lambda net, x: (lambda y: net.b(y) + F.relu(y))(net.c(x)), c=conv(), b=norm()), 1, 1, "second user"
    ),
    "two outputs": Case(
        lambda: Net(lambda net, x: (lambda y: (net.b(y), y))(net.c(x)), c=conv(), b=norm()), 1, 1, "second user"
    ),
    "forward hook": Case(lambda: nn.Sequential(hooked(), norm()), 1, 1, "has hooks"),
    "weight norm": Case(lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(conv()), norm()), 1, 0),
    "spectral norm": Case(lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(conv()), norm()), 1, 0),
    "two convs of one parameter": Case(tied, 2, 0),
    "one conv under two names": Case(two_names, 1, 0),
    "a conv in a plain list, too": Case(in_a_plain_list, 1, 1, "registered under 2 names"),
    "transposed": Case(lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, stride=2), norm(6)), 1, 0),
    "transposed, grouped": Case(
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, output_padding=1), norm(6)), 1, 0
    ),
    "BatchNorm before a padded conv": Case(lambda: nn.Sequential(norm(), conv()), 1, 1, "zero padding"),
    "BatchNorm before an unpadded conv": Case(lambda: nn.Sequential(norm(), conv(padding=0)), 1, 0),
    "BatchNorm before a reflecting conv": Case(lambda: nn.Sequential(norm(), conv(padding_mode="reflect")), 1, 0),
    "RepVGG": Case(
        lambda: Net(
            lambda net, x: F.relu(net.b1(net.c(x)) + net.b2(net.d(x)) + net.b3(x)),
            c=conv(),
            d=conv(1, 0),
            b1=norm(),
            b2=norm(),
            b3=norm(),
        ),
        1,
        0,
    ),
    "YOLOv7's identity with two groups": Case(
        lambda: Net(lambda net, x: net.c(x) + net.b(x), c=conv(groups=2), b=norm()), 1, 0
    ),
    "RepMixer": Case(
        lambda: Net(
            lambda net, x: x + net.g * (net.m(x) - net.n(x)),
            g=nn.Parameter(torch.randn(4, 1, 1)),
            m=nn.Sequential(conv(groups=4), norm()),
            n=norm(),
        ),
        1,
        0,
    ),
    "sum of a list": Case(
        lambda: Net(lambda net, x: functools.reduce(torch.add, [net.c(x), net.d(x)]), c=conv(), d=conv(1, 0)), 1, 0
    ),
    "scalars and differences": Case(
        lambda: Net(lambda net, x: net.c(x) * 0.5 - net.d(x) / 3 + 1.5, c=conv(), d=conv(1, 0)), 1, 0
    ),
    "a foreign term inside the sum": Case(
        lambda: Net(lambda net, x: (net.c(x) + torch.sin(x)) + net.d(x), c=conv(), d=conv(1, 0)), 1, 0
    ),
    "the input twice": Case(lambda: Net(lambda net, x: net.c(x) + x + net.d(x) + x, c=conv(), d=conv(1, 0)), 1, 0),
    "input changed in place between the reads": Case(
        lambda: Net(read_before_and_after_relu, c=conv(), d=conv(1, 0)), 2, 0, "in place"
    ),
    "output added into an input that is used again": Case(
        lambda: Net(added_into_the_input, c=conv()), 1, 0, "in place"
    ),
    "padding before a conv": Case(
        lambda: Net(lambda net, x: net.b(net.c(F.pad(x, (1, 1, 2, 2)))), c=conv(), b=norm()), 1, 0
    ),
    "one-sided padding": Case(
        lambda: Net(lambda net, x: net.b(net.c(F.pad(x, (0, 1, 2, 2)))), c=conv(), b=norm()), 1, 0, "both sides alike"
    ),
    "one-sided padding in a sum": Case(
        lambda: Net(lambda net, x: net.c(F.pad(x, (0, 1, 0, 1))) + net.d(x), c=conv(2, 0), d=conv(1, 0)), 1, 0
    ),
    "average pooling in a sum": Case(lambda: Net(lambda net, x: net.c(x) + F.avg_pool2d(x, 3, 1, 1), c=conv()), 1, 0),
    "average pooling that doesn't count padding": Case(
        lambda: Net(lambda net, x: net.c(x) + F.avg_pool2d(x, 3, 1, 1, count_include_pad=False), c=conv()), 1, 0
    ),
    "bottleneck of two 1×1": Case(lambda: nn.Sequential(nn.Conv2d(4, 1, 1), nn.Conv2d(1, 4, 1)), 2, 0),
    "grouped and dense, dearer when merged": Case(
        lambda: Net(lambda net, x: net.c(x) + net.d(x), c=conv(groups=2), d=conv(1, 0)), 2, 0, "weights"
    ),
    "a grouped block and a dense one, dearer when merged": Case(
        lambda: Net(lambda net, x: (net.c(x) + net.d(x)) + net.e(x), c=conv(groups=4), d=conv(groups=4), e=conv(1, 0)),
        2,
        0,
        "weights",
    ),
    "blocks of two padding modes": Case(
        lambda: Net(
            lambda net, x: net.c(x) + net.d(x) + (net.e(x) + net.f(x)),
            c=conv(),
            d=conv(),
            e=conv(padding_mode="reflect"),
            f=conv(padding_mode="reflect"),
        ),
        2,
        0,
    ),
    "blocks of two padding modes, added to themselves": Case(
        lambda: Net(
            lambda net, x: (lambda y: F.relu(y + y))(net.c(x) + net.d(x) + (net.e(x) + net.f(x))),
            c=conv(),
            d=conv(),
            e=conv(padding_mode="reflect"),
            f=conv(padding_mode="reflect"),
        ),
        2,
        0,
    ),
    "1×1 without bias, then padded": Case(lambda: nn.Sequential(conv(1, 0, bias=False), conv()), 1, 0),
    "1×1 with bias, then padded": Case(lambda: nn.Sequential(conv(1, 0), conv()), 2, 0),
    "padded convs in a row": Case(lambda: nn.Sequential(conv(), conv()), 2, 0),
    "dropout between": Case(lambda: nn.Sequential(conv(), nn.Dropout(), norm()), 1, 1, "no rule"),
    "no running statistics": Case(
        lambda: nn.Sequential(conv(), nn.BatchNorm2d(4, track_running_stats=False)), 1, 1, "running statistics"
    ),
    "group norm": Case(lambda: nn.Sequential(conv(), nn.GroupNorm(2, 4)), 1, 0),
    "no affine, large eps": Case(lambda: nn.Sequential(conv(), nn.BatchNorm2d(4, eps=0.1, affine=False)), 1, 0),
    "synchronized": Case(lambda: nn.Sequential(conv(), nn.SyncBatchNorm(4)), 1, 0),
    "1d": Case(lambda: nn.Sequential(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6)), 1, 0, shape=(2, 4, 9)),
    "3d": Case(lambda: nn.Sequential(nn.Conv3d(4, 6, (1, 2, 3)), nn.BatchNorm3d(6)), 1, 0, shape=(2, 4, 3, 4, 5)),
    "a weight that two calls read": Case(
        lambda: Net(
            lambda net, x: net.b(F.conv2d(x, net.c.weight) + F.conv2d(x.relu(), net.c.weight)), c=conv(), b=norm()
        ),
        0,  # the model's own code makes the calls; the module only held the weight
        1,
        "its weight is read elsewhere",
    ),
    "linear on (batch, channels)": Case(
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.BatchNorm1d(5)), 0, 0, shape=(3, 4, 3)
    ),
    "linear on a sequence of equal sizes": Case(
        lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), 0, 1, "second axis", shape=(3, 4, 4)
    ),
    "BatchNorm before a linear layer": Case(
        lambda: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12), nn.Linear(12, 5)), 0, 0, shape=(3, 4, 3)
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_fused_right_or_left_alone_with_the_reason(name: str) -> None:
    case = CASES[name]
    model = randomize_batch_norm(case.build(), seed=3).double()
    x = torch.randn(case.shape, dtype=torch.float64)
    expected = model.eval()(x.clone())
    before = copy.deepcopy(model.train().state_dict())

    fused = repfx.fuse(model)
    assert fused.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())

    output = fused.eval()(x.clone())
    pairs = zip(output, expected) if isinstance(output, tuple) else [(output, expected)]
    assert max(relative_error(ours, theirs) for ours, theirs in pairs) < TOLERANCE
    counts = [sum(map(is_kind, fused.modules())) for is_kind in (is_conv, is_batch_norm)]
    assert counts == [case.convs, case.norms], str(repfx.report(fused))
    assert case.reason in str(repfx.report(fused))
    if case.norms:
        assert case.reason, "what stays has to say why"
