"""`profile`: each layer's own time before and after, with a clock that counts, so that no test depends on a machine's speed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import repfx
from repfx.errors import InvalidInput, UnknownName
from repfx.measuring.cost import count_macs
from repfx.profiling import layer_times as measuring
from repfx.profiling.layer_times import Work, layer_times
from repfx.profiling.machine import Machine
from repfx.profiling.profile import BETWEEN, Profile, profile, profile_onnx
from repfx.profiling.timing import Timing, total
from tests.inline_net import ready

X = torch.randn(2, 3, 9, 11)


class Net(nn.Module):
    """A sum in code, a layer that is called twice, an attention whose parts aren't called as modules, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
        self.twice = nn.Conv2d(4, 4, 3, padding=1)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.twice(torch.relu(self.twice(x))) + x)
        tokens = x.flatten(2).mT
        found: Tensor = self.head(self.drop(self.attention(tokens, tokens, tokens)[0].mean(1)))
        return found


def net() -> Any:
    return ready(repfx.expand(Net(), "dbb")).float()


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let the clock count its readings: the seconds between two readings are how many were in between."""
    count = [0]

    def now(self: Any) -> int:
        count[0] += 1
        return count[0]

    monkeypatch.setattr(measuring._Clock, "now", now)
    monkeypatch.setattr(measuring._Clock, "between", lambda self, first, second: float(second - first))
    monkeypatch.setattr(measuring, "_seconds", lambda *_: 1e9)  # so that hooks seem to take no time
    return count


def test_all_time_belongs_to_one_module_each(ticks: list[int]) -> None:
    model = net()
    found = layer_times({"net": model}, X, rounds=3)["net"]
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    hooks = [module.register_forward_hook(count) for module in model.modules()]
    model(X)
    for hook in hooks:
        hook.remove()
    assert total(found.own.values()).seconds == (2.0 * calls - 1,) * 3  # a reading at each begin and each end
    assert found.own["twice.origin.conv"].seconds == (2.0, 2.0, 2.0)
    assert found.own["head"].seconds == (1.0, 1.0, 1.0)
    assert "attention.out_proj" not in found.own


def test_what_hooks_take_is_taken_off_each_call(ticks: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    monkeypatch.setattr(measuring, "_seconds", lambda *_: 3.0)  # with hooks, there are five parts of one tick each
    found = layer_times({"net": model}, X, rounds=2)["net"]
    assert total(found.own.values()).seconds == pytest.approx((3.0, 3.0))
    assert found.own["1"].seconds == pytest.approx((0.6, 0.6))


def test_the_work_of_layers_is_that_of_the_model() -> None:
    model = net()
    work = layer_times({"net": model}, X, rounds=1)["net"].work
    inside = work["stem.0.origin.conv"]
    assert inside == Work(2 * 4 * 3 * 9 * 9 * 11, 4 * (X.numel() + 2 * 4 * 9 * 11 + 4 * 3 * 9))
    assert sum(each.macs for each in work.values()) == count_macs(model, X)
    assert work["head"].moved == 4 * (2 * 4 + 2 * 5 + 4 * 5 + 5)
    assert "stem" not in work


def test_layers_are_matched_by_what_they_were_made_from(ticks: list[int]) -> None:
    model = net()
    found = profile(model, X, rounds=2)
    rows = {row.path: row for row in found.rows}
    assert set(rows) == {"stem.0", "twice", "attention", "drop", "head", BETWEEN}
    assert rows["stem.0"].layer == "Conv2d 3×3, 3 → 4"
    assert rows["head"].layer == "Linear, 4 → 5"
    assert rows["stem.0"].merged > 5 < rows["twice"].merged
    branches = [
        path for path, module in model.named_modules() if path.startswith("stem.") and not any(module.children())
    ]
    assert rows["stem.0"].before is not None
    assert rows["stem.0"].before.median > len(branches)
    assert rows["stem.0"].after is not None
    assert rows["stem.0"].after.median == 1
    assert rows["twice"].after is not None
    assert rows["twice"].after.median == 2
    assert rows["stem.0"].gains
    assert not rows["head"].gains
    assert rows["stem.0"].work is not None
    assert rows["stem.0"].work.macs == 2 * 4 * 3 * 9 * 9 * 11
    assert found.rows == tuple(sorted(found.rows, key=lambda row: -max(t.median for t in (row.before, row.after) if t)))
    assert found.share_of(found.rows) == pytest.approx(1)


def test_a_layer_that_stays_says_why(ticks: list[int]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Sigmoid())
    rows = {row.path: row for row in profile(model, X, rounds=1).rows}
    assert "ReLU" in rows["0"].reason
    assert rows["2"].reason
    assert not rows["1"].reason


def test_the_model_is_left_as_it_was() -> None:
    model = net().train()
    before = copy.deepcopy(model.state_dict())
    state = torch.random.get_rng_state()
    profile(model, X, rounds=1)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_can_not_be_measured_is_refused() -> None:
    with pytest.raises(UnknownName, match="runtime"):
        profile(net(), X, runtime="tvm")  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="rounds is 0"):
        profile(net(), X, rounds=0)
    with pytest.raises(InvalidInput, match=r"can't run on x = .*\[2, 2, 9, 11\]"):
        profile(net(), X[:, :2], rounds=1)
    with pytest.raises(InvalidInput, match="nothing to fuse"):
        profile(nn.ReLU(), X, rounds=1)


def test_the_lower_roof_limits() -> None:
    machine = Machine(macs=1e9, moved=1e8)
    assert machine.limit(Work(macs=100, moved=1)) == "arithmetic"
    assert machine.limit(Work(macs=100, moved=1000)) == "memory"
    measured = Machine.measured()
    assert measured.macs > 0 < measured.moved
    assert Timing((4e-4,)).text == "0.400 (0.400–0.400) ms"


def residual() -> Any:
    """Two convs with branches around a sum, whose activations onnxruntime merges into convs."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
            self.head = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.first(x))
            x = torch.relu(self.second(x) + x)
            found: Tensor = self.head(x.mean((2, 3)))
            return found

    return ready(repfx.expand(Residual(), "repvgg")).float()


def complete(found: Profile, paths: set[str]) -> None:
    """Check that layers have their times before and after, and that little is left for code."""
    rows = {row.path: row for row in found.rows}
    for path in paths:
        assert rows[path].before is not None, path
        assert rows[path].after is not None, path
    assert str(found).count(" → ") >= len(paths)


@pytest.mark.slow
def test_in_onnxruntime(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    found = profile(residual(), X, runtime="onnxruntime", rounds=2)
    complete(found, {"first", "second", "head"})
    assert {row.path for row in found.rows} <= {"first", "second", "head", BETWEEN}


@pytest.mark.slow
@pytest.mark.parametrize("x", [None, X, {"x": X}])
def test_a_file(tmp_path: Path, x: Any) -> None:
    pytest.importorskip("onnxruntime")
    file = tmp_path / "model.onnx"
    torch.onnx.export(residual(), (X,), file, dynamo=True, optimize=False, external_data=False)
    content = file.read_bytes()
    found = profile_onnx(file, x, rounds=2)
    convs = [row for row in found.rows if row.layer.startswith("Conv 8×")]
    assert sorted(row.layer for row in convs) == ["Conv 8×3×3×3", "Conv 8×8×3×3"]
    assert all(row.before is not None and row.after is not None and row.merged >= 3 for row in convs)
    assert file.read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
