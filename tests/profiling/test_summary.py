"""`summary`: counts by hand, and nothing changed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import repfx
from repfx.errors import InvalidInput
from repfx.profiling.summary import Size, Summary, summary
from repfx.profiling.timing import Timing

X = torch.randn(1, 4, 9, 13)


class Gated(nn.Module):
    """A net of two inputs whose dropout and BatchNorm would change in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Dropout(0.5)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        y: Tensor = self.drop(self.norm(self.conv(x)))
        return y * gate


def test_counts_are_those_of_each_form() -> None:
    model = repfx.expand(nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)), "acb")
    found = summary(model, repfx.fuse(model), X, rounds=3)
    # 3×3, 1×3 and 3×1, each with a BatchNorm
    assert (found.before.convs, found.before.batch_norms) == (3, 3)
    assert found.before.parameters == 4 * 6 * (9 + 3 + 3) + 3 * 2 * 6
    assert found.before.macs == 4 * 6 * (9 + 3 + 3) * 9 * 13
    assert (found.after.convs, found.after.batch_norms) == (1, 0)
    assert found.after.parameters == 4 * 6 * 9 + 6
    assert found.after.macs == 4 * 6 * 9 * 9 * 13
    assert len(found.after.latency.seconds) == len(found.before.latency.seconds) == 3


@pytest.mark.parametrize("x", [(X, X[:, :1]), {"x": X, "gate": X[:, :1]}], ids=["tuple", "dict"])
def test_several_inputs_and_nothing_is_changed(x: tuple[Tensor, ...] | dict[str, Tensor]) -> None:
    model = Gated()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    found = summary(model, model, x, rounds=1)
    assert found.before.macs == 4 * 6 * 9 * 9 * 13
    assert model.training
    assert model.norm.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


def test_the_table_is_aligned() -> None:
    small = Size(950, 2_360_000, 2, 0, Timing((0.001,)))
    table = str(Summary(Size(11_181_642, 1_820_000_000, 62, 60, Timing((0.025,))), small))
    assert table.splitlines() == [
        "                  before      after",
        "parameters        11.2 M        950",
        "multiply-adds     1.82 G     2.36 M",
        "convs                 62          2",
        "BatchNorms            60          0",
        "latency          25.0 ms    1.00 ms",
    ]
    assert Summary(small, small).speed_up == 1


def test_a_model_that_cannot_run_is_named() -> None:
    good, bad = nn.Conv2d(4, 6, 3), nn.Conv2d(5, 6, 3)
    with pytest.raises(InvalidInput, match=r"the model `after` can't run on x = float32 \[1, 4, 9, 13\]"):
        summary(good, bad, X)
    with pytest.raises(InvalidInput, match="rounds is 0"):
        summary(good, good, X, rounds=0)
    with pytest.raises(InvalidInput, match="type int"):
        summary(good, 3, X)  # type: ignore[arg-type]
