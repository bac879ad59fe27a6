"""DARTS' auxiliary head: what it learns from, and that nothing of it is left."""

from __future__ import annotations

import copy
import signal
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import repfx
from repfx.data.dataset import DataSet
from repfx.errors import Interrupted, InvalidInput, UnknownName
from repfx.training import loop
from repfx.training.loop import Watcher, train
from repfx.training.objective.auxiliary import Auxiliary
from repfx.training.recipe import AuxiliaryHead, Recipe
from tests.tiny import net

IMAGES, LABELS = torch.randn(12, 1, 8, 11), torch.arange(12) % 2
SGD: dict[str, Any] = {"optimizer": "SGD", "optimizer_options": {"momentum": 0.9}, "learning_rate": 0.1, "warm_up": 0.0}


def data() -> DataSet:
    images = TensorDataset(IMAGES, LABELS)
    return DataSet(images, images, ("a", "b"))


def recipe(module: str = "2", **more: Any) -> Recipe:
    return Recipe(auxiliary=AuxiliaryHead(module, 0.3), **{**SGD, "epochs": 1, "batch_size": 12, **more})


class Recorded(Auxiliary):
    """An auxiliary head that keeps a copy of itself and of the model as they were at the beginning."""

    made: ClassVar[list[Any]] = []

    def __init__(self, model: nn.Module, *rest: Any) -> None:
        super().__init__(model, *rest)
        self.made.append((self.head, copy.deepcopy(self.head), copy.deepcopy(model)))


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_one_step_is_that_of_both_losses_together(clip: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "Auxiliary", Recorded)
    losses: list[float] = []
    train(model := net(2), data(), recipe(clip=clip), watcher=Watcher(on_step=lambda step: losses.append(step.loss)))
    trained_head, head, begun = Recorded.made.pop()
    both = nn.ModuleList([begun, head]).train()
    logits = begun(IMAGES)
    features = begun[:3](IMAGES)
    loss = F.cross_entropy(logits, LABELS) + 0.3 * F.cross_entropy(head(features), LABELS)
    loss.backward()
    if clip:
        assert nn.utils.clip_grad_norm_(both.parameters(), clip) > clip
    assert losses == [pytest.approx(loss.item(), rel=1e-5)]
    for after, before in zip((*model.parameters(), *trained_head.parameters()), both.parameters()):
        assert before.grad is not None
        wanted: Tensor = before - 0.1 * (before.grad + 0.01 * before)  # the default weight decay
        torch.testing.assert_close(after, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_nothing_of_it_is_left_and_structure_changes_go_on() -> None:
    model = net(2)
    plain = net(2).state_dict()
    dyrep = repfx.schedules.DyRep(interval=1, until=3, spec="acb", batches=2)
    done = train(model, data(), recipe(epochs=3), dyrep).model
    assert any(isinstance(module, repfx.RepBlock) for module in done.modules())
    assert not any(module._forward_hooks for module in done.modules())
    fused = repfx.restore(repfx.fuse(done))
    assert fused.state_dict().keys() == plain.keys()


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU not every step is looked at")
def test_an_interrupted_training_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    asked = recipe(epochs=3, batch_size=4, drop_path=0.3)
    state = tmp_path / "state.safetensors"

    def run(stop_at: int = 0, **options: Any) -> dict[str, Tensor]:
        def stop(step: loop.Step) -> None:
            if step.number == stop_at:
                signal.raise_signal(signal.SIGINT)

        torch.manual_seed(0)
        model = net(2)
        dyrep = repfx.schedules.DyRep(interval=1, until=3, spec="acb", batches=2)
        torch.manual_seed(len(options))  # what was drawn before must not matter
        return train(model, data(), asked, dyrep, watcher=Watcher(on_step=stop), **options).model.state_dict()

    with pytest.raises(Interrupted):
        run(5, checkpoint=state)
    resumed, whole = run(checkpoint=state, resume=True), run()
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_where_it_can_not_stand_is_told() -> None:
    with pytest.raises(UnknownName, match="no module 'layer3'"):
        train(net(2), data(), recipe("layer3"))
    with pytest.raises(
        InvalidInput, match=r"behind '5', whose output is \(16, 4, 6\): it takes maps of at least 8 × 8"
    ):
        train(net(2), data(), recipe("5"))
    with pytest.raises(InvalidInput, match="compile is true, which an auxiliary head doesn't allow"):
        recipe(compile=True)
    with pytest.raises(InvalidInput, match="weight is 0"):
        AuxiliaryHead("2", 0)
