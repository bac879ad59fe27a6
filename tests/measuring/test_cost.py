"""Parameters, multiply-adds and latency."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import repfx
from repfx.measuring.cost import count_macs, count_macs_in_batch, count_parameters, measure_latency
from tests.tiny import net


@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [
        (nn.Conv1d(4, 6, 3), (1, 4, 10), 6 * 8 * 4 * 3),
        (nn.Conv2d(4, 6, (3, 2), stride=2, groups=2), (1, 4, 9, 8), 6 * 4 * 4 * 2 * 6),
        (nn.Conv2d(4, 6, 3, padding=1), (5, 4, 9, 8), 5 * 6 * 9 * 8 * 4 * 9),
        (nn.Conv3d(2, 3, 2), (1, 2, 4, 4, 4), 3 * 27 * 2 * 8),
        (nn.ConvTranspose2d(4, 6, 2, stride=2), (1, 4, 5, 5), 4 * 25 * 6 * 4),
        (nn.Linear(7, 3), (2, 7), 2 * 7 * 3),
        (nn.BatchNorm2d(4), (1, 4, 5, 5), 0),
    ],
)
def test_multiply_adds_are_counted(layer: nn.Module, shape: tuple[int, ...], expected: int) -> None:
    assert count_macs(layer, torch.zeros(shape)) == expected


def test_a_fused_model_costs_what_the_plain_one_does() -> None:
    plain = net()
    expanded = repfx.expand(plain, "dbb")
    x = torch.zeros(1, 1, 8, 8)
    assert count_macs(repfx.fuse(expanded), x) == count_macs(plain, x) < count_macs(expanded, x)


def test_squeezed_blocks_share_their_kernels_among_a_batch() -> None:
    plain = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
    model = repfx.expand(plain, ["1x1-kxk"])
    x = torch.zeros(1, 8, 6, 5)
    assert count_macs_in_batch(model, x, 128) == count_macs(model, x)
    repfx.squeeze(model, statistics="frozen")
    product = 8 * 8 * 8 * 9 + 8 * 8  # the kernels' product, and the second conv applied to the first one's bias
    assert count_macs(model, x) == count_macs(plain, x) + product
    assert count_macs_in_batch(model, x, 64) == count_macs(plain, x) + product // 64


def test_counting_leaves_modes_and_statistics_as_they_were() -> None:
    model = net().train()
    model[1].eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    count_macs(model, torch.ones(2, 1, 8, 8))
    assert [module.training for module in model] == [True, False] + [True] * 7
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_shared_parameter_counts_once() -> None:
    layer = nn.Linear(3, 3)
    assert count_parameters(nn.Sequential(layer, layer)) == 12


def test_candidates_take_turns_in_turning_order_and_each_gets_a_median() -> None:
    calls: list[str] = []
    candidates = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    found = measure_latency(candidates, rounds=3, warm_up=2, limit=math.inf)
    assert calls == ["a", "b", "b", "a"] * 2 + ["a", "b"]
    assert all(seconds > 0 for seconds in found.values())


def test_no_time_left_still_gives_one_turn() -> None:
    calls: list[str] = []
    measure_latency({"a": lambda: calls.append("a")}, rounds=10, warm_up=2, limit=0)
    assert len(calls) == 3
