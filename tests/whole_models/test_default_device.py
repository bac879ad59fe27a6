"""New tensors are on the model's device, whatever torch's default device is: here the meta device, which has no numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import repfx
from repfx.passes.recompute import recompute
from repfx.testing import relative_error
from tests.small_net import batch, small_net

X = batch()


def driven(schedule: repfx.Schedule) -> Callable[[nn.Module], nn.Module]:
    """A function that trains a model under a schedule for three short epochs."""

    def run(model: nn.Module) -> nn.Module:
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
        driver = repfx.Driver(
            model, optimizer, schedule, calibrate=[X], steps_per_epoch=2, score=lambda net: -net(X).square().mean()
        )
        for _ in range(3):
            for _ in range(2):
                optimizer.zero_grad()
                model.train()(X).square().mean().backward()
                driver.after_backward()
                optimizer.step()
            driver.after_epoch()
        return model

    return run


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "fused": lambda model: repfx.fuse(repfx.expand(model, "dbb")),
    "calibrated": lambda model: repfx.expand(model, "dyrep", calibrate=[X]),
    "squeezed": lambda model: repfx.squeeze(repfx.expand(model, "orepa")),
    "recomputed": lambda model: recompute(repfx.expand(model, "dbb")),
    "dropped": lambda model: repfx.drop(repfx.expand(model, ["1xk"]), "stem", "1xk", calibrate=[X]),
    "dyrep": driven(repfx.schedules.DyRep(interval=1, until=9, deviation=0.0)),
    "repan": driven(repfx.schedules.RepAn(cycles=3, epochs=1, warm_up=0.5)),
    "repnas": driven(repfx.schedules.RepNAS(budget=0.5, warm_up=1, epochs=2)),
    "des": driven(repfx.schedules.DES(epochs=2, warm_up=1, population=4)),
    "restored": lambda model: repfx.restore(repfx.fuse(repfx.expand(model, "acb")), calibrate=[X]),
}


def adam_counts_elsewhere() -> bool:
    """Whether torch's Adam, which trains gates, counts its steps on the default device, as it does before about torch 2.12."""
    parameter = nn.Parameter(torch.zeros(()))
    parameter.grad = torch.ones(())
    optimizer = torch.optim.Adam([parameter])
    try:
        with torch.device("meta"):
            optimizer.step()
    except RuntimeError:
        return True
    return False


SEARCHES = pytest.mark.skipif(adam_counts_elsewhere(), reason="torch's Adam doesn't work so")


@pytest.mark.slow
@pytest.mark.one_in(3)
@pytest.mark.parametrize("way", [pytest.param(w, marks=SEARCHES) if w in ("repnas", "des") else w for w in WAYS])
def test_models_are_changed_where_they_stand(way: str) -> None:
    torch.manual_seed(0)
    model = small_net()
    with torch.device("meta"):
        changed = WAYS[way](model)
        found = changed.eval()(X)
    tensors = [*changed.state_dict().values(), found]
    assert {tensor.device for tensor in tensors} == {X.device}
    torch.manual_seed(0)
    reference = WAYS[way](small_net()).eval()
    assert relative_error(found, reference(X)) < 1e-9
