"""The terms of a sum become convs so that these cost least, in whatever order the terms are added."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import repfx
from repfx.algebra.conv_spec import ConvSpec
from repfx.algebra.cost import Shape
from repfx.rewriting.squeezed_regions import regions_of
from tests.inline_net import convs, error_of, fused_exactly, image, norms, ready, reasons

CONVS: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS: dict[int, type[nn.Module]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
SIZES = {1: (2, 8, 11), 2: (2, 8, 9, 10), 3: (2, 8, 4, 5, 6)}
WIDTH = 8


class Sum(nn.Module):
    """The sum of branches, added from the left; every second one is subtracted."""

    def __init__(self, branches: Sequence[nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, channels, *axes)``."""
        first, *others = self.branches
        out: Tensor = first(x)
        for index, branch in enumerate(others):
            out = out + branch(x) if index % 2 else out - branch(x)
        return out


def conv(size: int | tuple[int, ...], dimensions: int = 2, *, depthwise: bool = False) -> nn.Module:
    sizes = size if isinstance(size, tuple) else (size,) * dimensions
    padding, groups = tuple(each // 2 for each in sizes), WIDTH if depthwise else 1
    made: nn.Module = CONVS[dimensions](WIDTH, WIDTH, sizes, padding=padding, groups=groups)
    return made


def weights_of(model: nn.Module) -> list[int]:
    """How many weights each conv has, the most first."""
    found: list[Any] = [model.get_submodule(path) for path in convs(model)]
    return sorted((layer.weight.numel() for layer in found), reverse=True)


KINDS: dict[str, Callable[[int], nn.Module]] = {
    "dense": lambda n: nn.Sequential(conv(3, n), NORMS[n](WIDTH)),
    "pointwise": lambda n: conv(1, n),
    "depthwise": lambda n: nn.Sequential(conv(7 if n < 3 else 5, n, depthwise=True), NORMS[n](WIDTH)),
    "norm": lambda n: NORMS[n](WIDTH),
}


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("order", [*itertools.permutations(KINDS)], ids=", ".join)
def test_a_large_depthwise_conv_stays_beside_what_is_dense(order: tuple[str, ...], dimensions: int) -> None:
    model = Sum([KINDS[kind](dimensions) for kind in order])
    fused = fused_exactly(model, image(*SIZES[dimensions]))
    window = (7 if dimensions < 3 else 5) ** dimensions
    assert weights_of(fused) == sorted([3**dimensions * WIDTH**2, window * WIDTH], reverse=True), reasons(fused)
    assert norms(fused) == []


def test_the_cheapest_groups_are_taken_even_where_the_whole_is_no_dearer() -> None:
    dense = [conv(3) for _ in range(6)]
    model = Sum([*dense[:3], conv(7, depthwise=True), *dense[3:]])
    assert sum(weights_of(model)) > 49 * WIDTH**2  # so all of them could be one conv of this size
    assert weights_of(fused_exactly(model, image(*SIZES[2]))) == [9 * WIDTH**2, 49 * WIDTH]


def test_terms_with_a_foreign_one_between_them_are_grouped() -> None:
    model = Sum([conv(3), nn.Sequential(conv(1), nn.ReLU()), conv(7, depthwise=True), conv(1), nn.Identity()])
    assert weights_of(fused_exactly(model, image(*SIZES[2]))) == [9 * WIDTH**2, 49 * WIDTH, WIDTH**2]


def test_an_input_that_is_added_twice_goes_into_one_group() -> None:
    class Twice(Sum):
        def forward(self, x: Tensor) -> Tensor:
            return x + super().forward(x) + x

    model = Twice([conv(3), conv(7, depthwise=True), conv(1)])
    assert weights_of(fused_exactly(model, image(*SIZES[2]))) == [9 * WIDTH**2, 49 * WIDTH]


def test_another_cost_groups_otherwise() -> None:
    def count(spec: ConvSpec, shape: Shape | None) -> float:
        return 1

    model = ready(Sum([conv(3), conv(7, depthwise=True), conv(1)]))
    fused = repfx.fuse(model, cost=count)
    assert weights_of(fused) == [49 * WIDTH**2]
    assert error_of(fused, model, image(*SIZES[2])) < 1e-9


def test_what_squeezes_is_what_fuses() -> None:
    model = ready(Sum([conv(3), conv(7, depthwise=True), conv(1)]))
    squeezed = repfx.squeeze(model.train(), statistics="frozen")
    assert regions_of(squeezed) == {"branches.0": ("branches.0", "branches.2")}
    assert error_of(squeezed, model, image(*SIZES[2])) < 1e-9


def test_a_group_is_restored() -> None:
    model = ready(Sum([KINDS[kind](2) for kind in ("norm", "depthwise", "dense", "pointwise")]))
    restored = repfx.restore(repfx.fuse(model))
    assert norms(restored)
    assert error_of(restored, model, image(*SIZES[2])) < 1e-9


# ---- against all ways to group


WINDOWS = st.sampled_from([(1, 1), (3, 3), (5, 5), (1, 3), (3, 1), (1, 5), (5, 1)])
TERMS = st.lists(st.tuples(WINDOWS, st.booleans()), min_size=2, max_size=4)
Terms = list[tuple[tuple[int, int], bool]]


def partitions(terms: Terms) -> Iterator[list[Terms]]:
    """All ways to divide terms into groups."""
    if not terms:
        yield []
        return
    first, *others = terms
    for partition in partitions(others):
        yield [[first], *partition]
        for index, group in enumerate(partition):
            yield [*partition[:index], [first, *group], *partition[index + 1 :]]


def cost(group: Terms) -> int:
    """The weights of one conv that does what all terms of a group do together."""
    height, width = (max(window[axis] for window, _ in group) for axis in (0, 1))
    return height * width * WIDTH * (1 if all(depthwise for _, depthwise in group) else WIDTH)


@given(TERMS)
def test_no_other_way_to_group_costs_less(terms: Terms) -> None:
    model = Sum([conv(window, depthwise=depthwise) for window, depthwise in terms])
    fused = fused_exactly(model, image(*SIZES[2]))
    assert sum(weights_of(fused)) == min(sum(map(cost, partition)) for partition in partitions(terms))
