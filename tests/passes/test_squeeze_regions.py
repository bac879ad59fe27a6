"""Squeezed regions outside blocks: they run as one conv with the same outputs, gradients, state and class, or run their own forward."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel

import repfx
from repfx.blocks.squeezed_form import forms_in
from repfx.errors import InvalidInput, UnknownName
from repfx.rewriting.squeezed_regions import SqueezeRegions, held_in, regions_of
from repfx.testing import randomize_batch_norm
from tests.passes.test_squeeze import BREAKS, X, assert_alike, convs_on_activations, outputs_and_gradients

pytestmark = pytest.mark.usefixtures("as_on_a_gpu")


class Foreign(nn.Module):
    """A block that isn't repfx's: an activation, and branches with or without a BatchNorm behind each."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.wide = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))
        self.point = nn.Conv2d(channels, channels, 1)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor, scale: float = 0.5) -> Tensor:
        return torch.relu(self.wide(x) + self.point(x) * scale - self.norm(x))


class Residual(nn.Module):
    """A net with a stem, a strided shortcut, a stage that can't be merged, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.block = Foreign(6)
        self.first = nn.Conv2d(6, 8, 3, padding=1)
        self.second = nn.BatchNorm2d(8)
        self.shortcut = nn.Conv2d(6, 8, 1, bias=False)
        self.pool = nn.AvgPool2d(2)
        self.head = nn.Linear(8, 5)
        self.last = nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(F.relu(self.bn(self.stem(x))))
        x = self.second(self.first(x)).relu() + self.shortcut(self.pool(F.interpolate(x, scale_factor=2.0)))
        y: Tensor = self.last(self.head(x.mean((2, 3))))
        return y


def ready(model: nn.Module | None = None) -> Any:
    """Put a model into float64 and training mode, with random statistics that don't change."""
    found = randomize_batch_norm((model or Residual()).double()).train()
    return still(found)


def still(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.eval()
    return model


def runs_as_its_code_says(model: nn.Module, x: Tensor = X) -> bool:
    return not any(form.takes(form.root, (x,), {}) for form in forms_in(model).values())


def test_outputs_gradients_state_and_class_are_the_same() -> None:
    model = ready()
    reference, parameters = copy.deepcopy(model), dict(model.named_parameters())
    assert repfx.squeeze(model) is model
    assert_alike(model, reference)
    assert isinstance(model, Residual)
    assert str(model) == str(reference)
    assert list(model.state_dict()) == list(reference.state_dict())
    assert all(parameters[name] is each for name, each in model.named_parameters())
    assert regions_of(model) == {
        "stem": ("stem", "bn"),
        "block.wide.0": ("block.wide.0", "block.wide.1", "block.point", "block.norm"),
        "first": ("first", "second"),
        "head": ("head", "last"),
    }
    assert [edit.path for edit in repfx.report(model).applied] == list(regions_of(model))
    assert convs_on_activations(model) == 4 < convs_on_activations(reference)


def test_the_way_back() -> None:
    model = ready()
    reference = copy.deepcopy(model)
    repfx.unsqueeze(repfx.squeeze(model))
    assert type(model) is Residual
    assert vars(model).keys() - vars(reference).keys() == {"repfx_journal", "repfx_report"}
    assert convs_on_activations(model) == convs_on_activations(reference)
    assert_alike(model, reference)


def test_it_trains_to_the_same_weights() -> None:
    model = ready()
    reference = copy.deepcopy(model)
    repfx.squeeze(model)
    for each in (model, reference):
        optimizer = torch.optim.SGD(each.parameters(), 0.1, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            each(X).square().mean().backward()
            optimizer.step()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_statistics_are_held_where_that_is_asked_for() -> None:
    model = randomize_batch_norm(Residual().double()).train()
    assert regions_of(repfx.squeeze(model)) == {"block.point": ("block.point",)}  # and its factor
    repfx.squeeze(model, statistics="frozen").train()
    before = copy.deepcopy(model.state_dict())
    reference = still(copy.deepcopy(model))
    assert sorted(held_in(model)) == ["block.norm", "block.wide.1", "bn", "last", "second"]
    assert_alike(model, reference)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    repfx.unsqueeze(model)
    assert all(module.training for module in model.modules())


# ---- what is found


def test_a_pattern_chooses_convs_and_the_choice_can_grow_and_shrink() -> None:
    model = ready()
    reference = copy.deepcopy(model)
    repfx.squeeze(model, "stem")
    assert list(regions_of(model)) == ["stem"]
    repfx.squeeze(model, ["first", "block.*"])
    assert list(regions_of(model)) == ["stem", "block.wide.0", "first"]
    assert [edit.path for edit in repfx.report(model).applied] == ["block.wide.0", "first"]
    assert_alike(model, reference)
    repfx.unsqueeze(model, "stem")
    assert list(regions_of(model)) == ["block.wide.0", "first"]
    assert_alike(model, reference)
    with pytest.raises(UnknownName, match="no block or conv at 'stems'"):
        repfx.squeeze(model, "stems")


def test_statistics_held_before_stay_held() -> None:
    model: Any = randomize_batch_norm(Residual().double()).train()
    repfx.squeeze(model, "stem", statistics="frozen")
    model.second.eval()
    repfx.squeeze(model, "first")
    assert list(regions_of(model)) == ["stem", "first"]
    assert held_in(model) == ["bn"]
    repfx.unsqueeze(model, "first")
    assert held_in(model) == ["bn"]
    assert not model.train().bn.training
    assert model.second.training


def test_a_block_and_the_batch_norm_behind_it_are_one_map() -> None:
    model = ready(repfx.expand(Residual(), repfx.Spec(["1x1", "identity"], norm="none"), preserve=False))
    reference = copy.deepcopy(model)
    repfx.squeeze(model)
    assert regions_of(model)["stem"] == ("stem", "bn")
    assert_alike(model, reference)
    assert convs_on_activations(model) == 4
    repfx.unsqueeze(model, "stem")
    assert "stem" not in regions_of(model)
    assert not model.stem.squeezed
    assert_alike(model, reference)


def test_islands_of_a_model_that_cannot_be_traced() -> None:
    class Decides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Foreign(3)
            self.tail = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.tail(self.inner(x)) if float(x.detach().sum()) < 1e9 else x
            return y

    model = ready(Decides())
    reference = copy.deepcopy(model)
    repfx.squeeze(model)
    assert list(forms_in(model)) == ["inner", "tail"]
    assert len(model.tail) == 2
    assert_alike(model, reference)
    assert convs_on_activations(model) == 2


def test_what_cannot_be_part_of_a_region() -> None:
    """No region takes in a weight that changes when it is read, a dropout with rate 0, or a factor that is trained."""

    class Others(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.spectral = parametrizations.spectral_norm(nn.Conv2d(3, 4, 1))
            self.after = nn.BatchNorm2d(4)
            self.conv = nn.Conv2d(4, 4, 3)
            self.drop = nn.Dropout(0.0)
            self.norm = nn.BatchNorm2d(4)
            self.factor = nn.Parameter(torch.ones(4, 1, 1))
            self.end = nn.Conv2d(4, 4, 1)
            self.bn = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.drop(self.conv(self.after(self.spectral(x)).relu())))
            y: Tensor = self.bn(self.end(x.relu())) * self.factor
            return y

    model = repfx.squeeze(ready(Others()))
    assert regions_of(model) == {"end": ("end", "bn")}
    with pytest.raises(InvalidInput, match="has no block"):
        repfx.squeeze(fx.symbolic_trace(ready()))


@pytest.mark.slow
def test_a_batch_norm_that_activates_too() -> None:
    model = ready(timm.create_model("mobilenetv3_small_050", num_classes=3))
    activated = [path for path, module in model.named_modules() if type(module).__name__ == "BatchNormAct2d"]
    assert activated
    reference = copy.deepcopy(model)
    repfx.squeeze(model)
    assert {*activated} <= {part for parts in regions_of(model).values() for part in parts}
    assert_same_step(model, reference, torch.randn(2, 3, 64, 96, dtype=torch.float64))


def assert_same_step(model: nn.Module, reference: nn.Module, x: Tensor) -> None:
    found, expected = outputs_and_gradients(model, x), outputs_and_gradients(reference, x)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-9 * (1 + float(value.abs().max())))


@pytest.mark.slow_one_in(3)
@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["repvgg_a0", "mobileone_s0", "fastvit_t8", "repvit_m0_9", "resnet18", "efficientnet_b0"]
)
def test_timm_s_models(name: str) -> None:
    model = ready(timm.create_model(name, num_classes=3))
    for module in model.modules():
        if "Drop" in type(module).__name__:
            module.eval()
    reference = copy.deepcopy(model)
    repfx.squeeze(model)
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    assert not runs_as_its_code_says(model, x)
    assert_same_step(model, reference, x)


# ---- copies, files, other passes


def test_copies_run_by_themselves() -> None:
    model = repfx.squeeze(ready())
    copied, average = copy.deepcopy(model), AveragedModel(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    for other in (copied, average.module):
        assert not runs_as_its_code_says(other)
        assert_alike(other, repfx.unsqueeze(copy.deepcopy(other)))
        assert not torch.allclose(other(X), model(X))


def test_pickled_it_runs_its_own_forward() -> None:
    model = repfx.squeeze(ready())
    loaded = pickle.loads(pickle.dumps(model))
    assert type(loaded) is Residual
    assert_alike(loaded, model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert_alike(torch.load(buffer, weights_only=False), model)


@pytest.mark.slow
def test_other_passes_take_it_as_the_model_that_it_is() -> None:
    model = ready()
    squeezed = repfx.squeeze(copy.deepcopy(model))
    fused = repfx.fuse(squeezed)
    assert str(fused) == str(repfx.fuse(model))
    repfx.check_equivalent(squeezed, fused, X)
    assert not runs_as_its_code_says(squeezed)
    assert [site.path for site in repfx.sites(squeezed)] == [site.path for site in repfx.sites(model)]
    grown = repfx.expand(squeezed, "acb")
    repfx.check_equivalent(grown, model, X)


@pytest.mark.slow
def test_a_checkpoint_builds_it_again(tmp_path: Path) -> None:
    model = repfx.squeeze(
        randomize_batch_norm(repfx.expand(Residual().double(), {"first": "acb"})), statistics="frozen"
    )
    repfx.save(tmp_path / "a.ckpt", model)
    loaded = Residual().double()
    repfx.load(tmp_path / "a.ckpt", loaded)
    assert regions_of(loaded) == regions_of(model)
    assert held_in(loaded) == held_in(model) != []
    assert_alike(loaded.train(), model.train())
    assert not runs_as_its_code_says(loaded)


def test_an_average_follows() -> None:
    model = randomize_batch_norm(Residual().double()).train()
    average: Any = AveragedModel(model)
    with repfx.carry(model, average):
        repfx.squeeze(model, statistics="frozen")
    assert regions_of(average.module) == regions_of(model)
    assert not average.module.train().bn.training


def test_the_action_says_what_it_does() -> None:
    assert str(SqueezeRegions("", ["a", "b"], ["b"])) == "squeeze regions of 2 modules: their statistics stay"
    assert str(SqueezeRegions("")) == "unsqueeze regions"


def test_it_moves_to_another_type_and_runs_under_autocast() -> None:
    model = repfx.squeeze(ready()).float()
    reference = repfx.unsqueeze(copy.deepcopy(model))
    x = X.float()
    torch.testing.assert_close(model(x), reference(x), rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert not runs_as_its_code_says(model, x)
        assert (model(x) - reference(x)).abs().max() < 0.05 * reference(x).abs().max()


@pytest.mark.slow
@pytest.mark.skipif(BREAKS, reason="torch 2.8 breaks the graph")
def test_it_compiles_without_a_break() -> None:
    model: Any = repfx.squeeze(ready())
    compiled: Any = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), model(X), rtol=1e-10, atol=1e-10)
    model.block.norm.train()
    reference = repfx.unsqueeze(copy.deepcopy(model))
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(X), reference(X), rtol=1e-10, atol=1e-10)
