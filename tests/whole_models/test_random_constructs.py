"""Random rows of constructs from people's blocks, in one, two and three dimensions, through the verbs."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import repfx
from repfx.errors import RepfxError
from repfx.testing import TOLERANCE, randomize_batch_norm, relative_error
from tests.inline_net import Net
from tests.random_numbers import numbers_from

CONVS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
UPS: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORMS: dict[int, Any] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
CHANNELS = 4


def bordered(m: Any, x: Tensor, dimensions: int) -> Tensor:
    """Pad with what the conv gives for zeros, strip by strip."""
    value = m.first.bias.view(1, -1, *(1,) * dimensions)
    y = F.pad(m.first(x), (1, 1) * dimensions)
    for axis in range(dimensions):
        for strip in (slice(0, 1), slice(-1, None)):
            y[(slice(None),) * (2 + axis) + (strip,) + (slice(None),) * (dimensions - axis - 1)] = value
    result: Tensor = m.second(y) + x
    return result


Construct = Callable[[int, bool], nn.Module]


def construct(code: Callable[..., Any], **layers: Callable[[int, bool], nn.Module]) -> Construct:
    """Return a function that makes a module of some dimensions, whose convs have a bias or not."""
    return lambda dimensions, bias: Net(
        lambda m, x: code(m, x, dimensions), **{name: make(dimensions, bias) for name, make in layers.items()}
    )


def conv(size: int, outs: int = 1, ins: int = 1, *, bias: bool | None = None, **options: Any) -> Construct:
    options = {"padding": size // 2, **options}
    return lambda d, own: CONVS[d](ins * CHANNELS, outs * CHANNELS, size, bias=own if bias is None else bias, **options)


def norm(dimensions: int, bias: bool) -> nn.Module:
    module: nn.Module = NORMS[dimensions](CHANNELS)
    return module


def up(size: int, padding: int) -> Construct:
    return lambda d, bias: UPS[d](CHANNELS, CHANNELS, size, 2, padding, bias=bias)


CONSTRUCTS: dict[str, Construct] = {
    "weighted sum": construct(
        lambda m, x, d: m.n(torch.add(m.a(x), m.b(x), alpha=-2)) + x, a=conv(3), b=conv(1), n=norm
    ),
    "raw and normed": construct(lambda m, x, d: m.n(y := m.a(x)) + y, a=conv(3), n=norm),
    "stack": construct(lambda m, x, d: torch.stack([m.a(x), m.b(x), x]).mean(0), a=conv(3), b=conv(1)),
    "concatenation": construct(
        lambda m, x, d: m.b(torch.cat([m.n(y := m.a(x)), y], 1)), a=conv(1), n=norm, b=conv(1, ins=2)
    ),
    "partial": construct(
        lambda m, x, d: m.b(torch.cat([m.a((y := m.c(x))[:, :1]), y[:, 1:]], 1)) + x,
        a=lambda d, bias: CONVS[d](1, 2, 1, bias=bias),
        b=lambda d, bias: CONVS[d](CHANNELS + 1, CHANNELS, 1, bias=bias),
        c=lambda d, bias: nn.Sequential(conv(3)(d, bias), nn.Tanh()),
    ),
    "chunks": construct(
        lambda m, x, d: m.b(torch.cat([*reversed(y := m.a(x).chunk(2, 1)), m.n(torch.cat(y, 1))], 1)),
        a=conv(3),
        b=conv(1, ins=2),
        n=norm,
    ),
    "normed parts": construct(
        lambda m, x, d: m.b(torch.cat([m.n(torch.tanh(m.a(x))), torch.tanh(m.c(x))], 1)),
        a=conv(3),
        b=conv(1, ins=2),
        c=conv(1),
        n=norm,
    ),
    "cropped": construct(
        lambda m, x, d: m.n(m.a(F.pad(x, (0, 1) * d))[(slice(None), slice(None), *(slice(None, -1),) * d)]),
        a=conv(3),
        n=norm,
    ),
    "crop": construct(lambda m, x, d: m.a(x) + m.b(x[(..., *(slice(1, -1),) * d)]), a=conv(3, padding=0), b=conv(1)),
    "border": construct(bordered, first=conv(1, bias=True), second=conv(3, padding=0)),
    "triple": construct(
        lambda m, x, d: m.c(m.b(m.a(x))),
        a=conv(1, outs=4, bias=False),
        b=conv(3, ins=4, outs=4, groups=4 * CHANNELS),
        c=conv(1, ins=4),
    ),
    "upsampling": construct(
        lambda m, x, d: m.c(m.n(m.a(x) + m.b(x))), a=up(4, 1), b=up(2, 0), n=norm, c=conv(3, stride=2)
    ),
    "linear": construct(
        lambda m, x, d: m.n(m.a(x.movedim(1, -1)).movedim(-1, 1)),
        a=lambda d, b: nn.Linear(CHANNELS, CHANNELS, b),
        n=norm,
    ),
    "slope": lambda d, bias: nn.LeakyReLU(1.0 if bias else 0.5),
    "activation": lambda d, bias: nn.ReLU(),
}
VERBS: dict[str, Callable[[nn.Module, Tensor], nn.Module]] = {
    "fuse": lambda model, x: repfx.fuse(model),
    "fuse, proved": lambda model, x: repfx.fuse(model, example=x),
    "expand, fuse": lambda model, x: repfx.fuse(repfx.expand(model, "acb")),
    "restore": lambda model, x: repfx.restore(repfx.fuse(model)),
    "squeeze": lambda model, x: repfx.squeeze(copy.deepcopy(model)),
}


@pytest.mark.slow
@given(
    st.sampled_from([1, 2, 3]),
    st.lists(st.tuples(st.sampled_from(sorted(CONSTRUCTS)), st.booleans()), min_size=1, max_size=4),
)
def test_every_verb_keeps_what_they_compute(dimensions: int, row: list[tuple[str, bool]]) -> None:
    torch.manual_seed(0)
    layers = [CONSTRUCTS[name](dimensions, bias) for name, bias in row]
    model = randomize_batch_norm(nn.Sequential(CONVS[dimensions](CHANNELS, CHANNELS, 1), *layers).double()).eval()
    x = torch.randn(2, CHANNELS, *(13, 10, 11)[:dimensions], dtype=torch.float64, generator=numbers_from(0))
    expected = model(x)
    for name, verb in VERBS.items():
        with contextlib.suppress(*([RepfxError] if name in ("restore", "squeeze") else [])):
            found = verb(model, x)
            assert relative_error(found(x), expected) < TOLERANCE, name
