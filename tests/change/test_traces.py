"""A change of structure costs few traces: sites are found once for an adjustment and handed on, to averages too."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import repfx
from repfx.testing import assert_same_map, randomize_batch_norm
from repfx.tracing import trace as tracing
from tests.small_net import batch, small_net


@contextmanager
def traced(patch: pytest.MonkeyPatch) -> Iterator[list[nn.Module]]:
    """Collect the models that are traced, whoever asks for it."""
    found: list[nn.Module] = []
    own = tracing.trace

    def counting(model: nn.Module) -> tracing.Traces:
        found.append(model)
        return own(model)

    with patch.context() as inside:
        for module in list(sys.modules.values()):
            if getattr(module, "__name__", "").startswith("repfx.") and vars(module).get("trace") is own:
                inside.setattr(module, "trace", counting)
        yield found


class Run:
    """A model with an average, an optimizer and a driver, trained by one step an epoch."""

    def __init__(self, schedule: repfx.Schedule, model: nn.Module) -> None:
        self.model: Any = randomize_batch_norm(model, seed=1)
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.01, momentum=0.9)
        data = [batch(seed=seed) for seed in range(2)]
        self.driver = repfx.Driver(self.model, self.optimizer, schedule, calibrate=data, ema=self.average)

    def epoch(self) -> tuple[Any, ...]:
        """Train one step and let the schedule adjust."""
        self.model(batch(seed=7)).square().mean().backward()
        self.driver.after_backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self.driver.after_epoch()


SCHEDULES: dict[str, repfx.Schedule] = {
    "dyrep": repfx.schedules.DyRep(interval=1),
    "repan": repfx.schedules.RepAn(cycles=5, epochs=1, warm_up=0.5),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULES)
def test_an_adjustment_traces_the_model_twice_at_most_and_its_average_once(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(SCHEDULES[name], small_net())
    run.epoch()
    with traced(monkeypatch) as found:
        actions = run.epoch()
    assert len({action.kind for action in actions}) >= {"dyrep": 1, "repan": 3}[name]
    copies = {id(module) for module in run.average.modules()}
    of_average = [model for model in found if id(model) in copies]
    assert len(of_average) <= 1
    assert len(found) - len(of_average) <= 2


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULES)
def test_an_average_follows_all_the_same(name: str) -> None:
    run = Run(SCHEDULES[name], small_net())
    for _ in range(3):
        reference = repfx.fuse(run.average.module)
        run.epoch()
        assert repfx.journal(run.average.module) == repfx.journal(run.model)
        assert_same_map(run.average.module.eval(), reference, batch(seed=5))
        run.average.train()


def test_what_is_known_of_sites_is_what_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from repfx.passes.fuse import Fuse
    from repfx.passes.restore import Restore
    from repfx.records.journal import apply
    from repfx.tracing.sites import find_sites, sites_at, sites_known

    model = repfx.expand(small_net(), {"stem": "acb", "depthwise": "repvgg", "plain": "qarepvgg"})
    with sites_known(find_sites(model), model):
        for actions in ([Fuse("stem"), Fuse("depthwise")], [Restore("stem")]):
            apply(model, actions, None)
            known = sites_at(model, ["stem", "depthwise"])
            assert known == {site.path: site for site in find_sites(model) if site.path in known}
        with traced(monkeypatch) as found:
            assert sites_at(model, ["plain"])["plain"].branches == ("1x1", "identity")
            assert found == [model]  # what stands behind a block's sum isn't known


def test_another_module_in_the_model_is_seen() -> None:
    run = Run(SCHEDULES["dyrep"], small_net())
    run.epoch()
    run.model.extra = nn.Conv2d(8, 4, 3, padding=1).double()
    assert "extra" in {candidate.site for candidate in run.driver.observe().candidates}
