"""Parts of the channels, convolved and concatenated with the others, become one conv with the conv that reads them, if that is cheaper."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import repfx
from tests.inline_net import Net, convs, error_of, fused_exactly, image, norms, ready, reasons

SIZES = (9, 10, 7)
CONVS: dict[int, Any] = {0: nn.Linear, 1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}

SPELLINGS: dict[str, Callable[[Any, int], Any]] = {
    "split": lambda x, n: torch.split(x, [3, 5], dim=1),
    "split, counted from the end": lambda x, n: x.split((3, 5), dim=-n - 1),
    "split with sizes": lambda x, n: torch.split_with_sizes(x, [3, 5], 1),
    "tensor_split": lambda x, n: x.tensor_split((3,), dim=1),
    "slices": lambda x, n: (x[:, :3], x[:, 3:]),
    "slices of all axes": lambda x, n: (
        x[(slice(None), slice(3))],
        x[(slice(None), slice(-5, None), *[slice(None)] * n)],
    ),
    "narrow": lambda x, n: (x.narrow(1, 0, 3), torch.narrow(x, 1, 3, 5)),
    "mixed": lambda x, n: (x[:, 0:3, ...], x.split([3, 5], 1)[1]),
}


def partial_net(parts: Callable[[Any, int], Any], n: int, size: int = 1, out: int = 2, **options: Any) -> Net:
    """A partial conv with a BatchNorm on some channels, and a 1×1 on all, behind a conv with an activation (FasterNet)."""

    def forward(m: Any, x: Tensor) -> Any:
        first, rest = parts(m.before(x), n)
        return m.mix(torch.cat([m.norm(m.partial(first)), rest], 1))

    norm = getattr(nn, f"BatchNorm{n}d")(4)
    before = nn.Sequential(CONVS[n](4, 8, 1), nn.SiLU())
    return Net(
        forward,
        before=before,
        partial=CONVS[n](3, 4, size, padding=size // 2, **{"bias": False, **options}),
        norm=norm,
        mix=CONVS[n](9, out, 1),
    )


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_partial_conv_becomes_one_with_the_conv_behind_it(spelling: str, dimensions: int) -> None:
    net = partial_net(SPELLINGS[spelling], dimensions)
    fused = fused_exactly(net, image(2, 4, *SIZES[:dimensions]))
    assert (convs(fused), norms(fused)) == (["before.0", "partial"], [])
    assert fused.get_submodule("partial").in_channels == 8
    assert "getitem" not in fused.code
    assert "narrow" not in fused.code


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_a_window_on_a_part_of_the_channels(dimensions: int) -> None:
    net = partial_net(SPELLINGS["slices"], dimensions, 3, out=1)
    fused = fused_exactly(net, image(2, 4, *SIZES[:dimensions]))
    assert (convs(fused), norms(fused)) == (["before.0", "partial"], [])


def chunks(m: Any, x: Tensor) -> Any:
    """Iterate over chunks: the graph checks how many there are."""
    one, other = m.before(x).chunk(2, 1)
    return m.mix(torch.cat((other, m.partial(one), other), 1))


def test_chunks() -> None:
    before = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 1, groups=2), nn.ReLU())
    net = Net(chunks, before=before, partial=nn.Conv2d(4, 4, 1), mix=nn.Conv2d(12, 3, 1))
    fused = fused_exactly(net, image())
    assert [path for path in convs(fused) if not path.startswith("before")] == ["mix"]
    assert "chunk" not in fused.code


def test_a_sum_says_how_many_channels_there_are() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        y = torch.relu(m.a(x) * 2 + m.b(x).relu())
        return m.mix(torch.cat([m.partial(y[:, 2:]), y], 1))

    net = Net(forward, a=nn.Conv2d(4, 8, 1), b=nn.Conv2d(4, 8, 1), partial=nn.Conv2d(6, 4, 1), mix=nn.Conv2d(12, 3, 1))
    assert convs(fused_exactly(net, image())) == ["a", "b", "partial"]


def test_linear_layers_on_channels_that_come_last() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        first, rest = m.before(x).relu().split([3, 5], -1)
        return m.mix(torch.cat([m.partial(first), rest], -1))

    net = Net(forward, before=nn.Linear(4, 8), partial=nn.Linear(3, 4), mix=nn.Linear(9, 2))
    for size in ((7, 4), (2, 7, 4), (2, 3, 5, 4)):
        assert convs(fused_exactly(net, image(*size))) == ["before", "partial"]


def test_it_is_found_through_blocks() -> None:
    net = ready(partial_net(SPELLINGS["split"], 2, 3, out=1))
    expanded = ready(repfx.expand(net, "acb"), seed=1)
    fused = repfx.fuse(expanded)
    assert error_of(fused, expanded, image()) < 1e-9
    assert convs(fused) == ["before.0", "partial"]


def ghost(n: int, *, bias: bool) -> Net:
    """Half of the channels by a conv, the others from these by a depthwise conv (GhostNet), and a 1×1 that reads both."""

    def forward(m: Any, x: Tensor) -> Any:
        first = m.primary(x)
        return m.mix(torch.cat([first, m.cheap(first)], dim=1))

    primary, cheap = CONVS[n](4, 6, 1, bias=bias), CONVS[n](6, 6, 3, padding=1, groups=6)
    return Net(forward, primary=primary, cheap=cheap, mix=CONVS[n](12, 1, 1))


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_a_ghost_module_becomes_one_conv(dimensions: int) -> None:
    """The conv reads a channel of ones as well where a bias stands in front of the border."""
    x = image(2, 4, *SIZES[:dimensions])
    for bias in (False, True):
        fused: Any = fused_exactly(ghost(dimensions, bias=bias), x)
        assert convs(fused) == ["cheap"]
        assert fused.cheap.in_channels == 4 + bias


# ---- where it stays


def permuted(m: Any, x: Tensor) -> Any:
    y = m.before(x).relu()
    return m.mix(torch.cat([y[:, 3:], y[:, :3]], 1))


def read_twice(m: Any, x: Tensor) -> Any:
    first, rest = m.before(x).relu().split([3, 5], 1)
    return m.mix(torch.cat([m.partial(first), rest], 1)).sum() + first.sum()


def stepped(m: Any, x: Tensor) -> Any:
    y = m.before(x).relu()
    return m.mix(torch.cat([m.partial(y[:, :6:2]), y[:, 3:]], 1))


def input_alone(m: Any, x: Tensor) -> Any:
    first, rest = x.split([1, 3], 1)
    return m.mix(torch.cat([m.partial(first), rest], 1))


def bordered(m: Any, x: Tensor) -> Any:
    """The bias of the partial conv doesn't reach the padding of the conv behind it."""
    y = m.before(x).relu()
    return m.mix(torch.cat([m.partial(y[:, :3]), y[:, 3:]], 1))


def small(forward: Callable[..., Any], ins: int = 3, outs: int = 4, mix: int = 9, **options: Any) -> Net:
    before, partial = nn.Conv2d(4, 8, 1), nn.Conv2d(ins, outs, 1)
    return Net(forward, before=before, partial=partial, mix=nn.Conv2d(mix, 2, 1, **options))


def tokens() -> Net:
    """Slices of the second axis in front of linear layers, which have their channels on the last."""

    def forward(m: Any, x: Tensor) -> Any:
        y = m.before(x).relu()
        return m.mix(torch.cat([m.partial(y[:, :2]), y[:, 2:]], -1))

    return Net(forward, before=nn.Linear(10, 8), partial=nn.Linear(8, 8), mix=nn.Linear(16, 2))


STAYS: dict[str, tuple[Callable[[], Net], str]] = {
    "dearer": (
        lambda: partial_net(SPELLINGS["split"], 2, 3),
        "the merged conv would have 144 weights, the convs it replaces have 126",
    ),
    "a border": (lambda: small(bordered, padding=1), "the first map's bias does not reach the border"),
    "in groups": (lambda: small(bordered, outs=5, mix=10, groups=2), ""),
    "tokens": (tokens, ""),
    "a permutation": (lambda: small(permuted, mix=8), "would slice another axis of an input without a batch"),
    "another reader": (lambda: small(read_twice), ""),
    "every second channel": (lambda: small(stepped), ""),
    "an input of any size": (lambda: small(input_alone, 1, 2, 5), ""),
}


@pytest.mark.parametrize("case", STAYS)
def test_what_stays(case: str) -> None:
    build, reason = STAYS[case]
    net = build()
    fused = fused_exactly(net, image())
    assert len(convs(fused)) == len(convs(net))
    assert reason in reasons(fused)
