"""Squeezed forms: a module runs in its form wherever that is exact, and runs its own forward elsewhere."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import register_parametrization

import repfx
from repfx.blocks.squeezed_form import forms_in
from repfx.rewriting.squeezed_regions import held_in, regions_of
from repfx.testing import randomize_batch_norm
from tests.passes.test_squeeze import X, assert_alike
from tests.passes.test_squeeze_regions import Foreign, Residual, ready, runs_as_its_code_says, still

pytestmark = pytest.mark.usefixtures("as_on_a_gpu")


def test_a_batch_norm_that_takes_statistics_again() -> None:
    model = repfx.squeeze(ready())
    reference = repfx.unsqueeze(copy.deepcopy(model))
    for each in (model, reference):
        each.block.norm.train()
    assert runs_as_its_code_says(model)
    assert_alike(model, reference)
    assert torch.equal(model.block.norm.running_mean, reference.block.norm.running_mean)
    model.block.norm.eval()
    assert not runs_as_its_code_says(model)


def test_a_hook_hears_what_it_did() -> None:
    model = repfx.squeeze(ready())
    heard: list[Tensor] = []
    handle = model.second.register_forward_hook(lambda module, args, output: heard.append(output))
    assert runs_as_its_code_says(model)
    model(X)
    assert len(heard) == 1
    handle.remove()
    assert not runs_as_its_code_says(model)


def test_a_part_that_was_exchanged() -> None:
    model = repfx.squeeze(ready())
    model.first = nn.Conv2d(6, 8, 3, padding=1).double()
    assert runs_as_its_code_says(model)
    assert_alike(model, repfx.unsqueeze(copy.deepcopy(model)))


def test_other_arguments() -> None:
    model = repfx.squeeze(ready(Foreign(3)))
    reference = repfx.unsqueeze(copy.deepcopy(model))
    assert len(regions_of(model)) == 1
    for arguments, options in (((X, 2.0), {}), ((X,), {"scale": 0.1}), ((), {"x": X})):
        torch.testing.assert_close(model(*arguments, **options), reference(*arguments, **options), rtol=0, atol=0)
    torch.testing.assert_close(model(X), reference(X), rtol=1e-12, atol=1e-12)


def test_another_tracer_sees_the_model_s_own_code() -> None:
    model = repfx.squeeze(ready())
    plain = repfx.unsqueeze(copy.deepcopy(model))
    assert str(fx.symbolic_trace(model).graph) == str(fx.symbolic_trace(plain).graph)


class Scaled(nn.Module):
    """Two layers and a number that its code reads."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.alpha = 1.0

    def forward(self, x: Any, mask: Tensor | None = None) -> Tensor:
        x = x if isinstance(x, Tensor) else torch.cat(list(x), 1)
        y: Tensor = self.body(x) * self.alpha
        return y if mask is None else y * mask


class Doubled(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def patch(module: nn.Module) -> None:
    before = module.forward
    module.forward = lambda x: before(x).relu()


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.body.append(nn.ReLU()),
        lambda model: patch(model.body),
        lambda model: patch(model.body[0]),
        lambda model: patch(model.body[1]),
        lambda model: setattr(model.body[1], "__class__", Doubled),
        lambda model: setattr(model, "alpha", 2.0),
    ],
)
def test_whatever_is_changed_afterwards_counts(change: Any) -> None:
    model = repfx.squeeze(ready(Scaled()))
    assert not runs_as_its_code_says(model)
    before = model(X)
    change(model)
    assert runs_as_its_code_says(model)
    found = model(X)
    torch.testing.assert_close(found, repfx.unsqueeze(model)(X), rtol=0, atol=0)
    assert (found - before).abs().max() > 0.1


def test_inputs_that_are_no_tensors() -> None:
    model = repfx.squeeze(ready(Scaled()))
    torch.testing.assert_close(model(list(X.split(1, 1))), model(X), rtol=1e-12, atol=1e-12)


def test_sizes_that_no_longer_make_one_conv() -> None:
    model: Any = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(4, 3, 3, padding=1)).double()
    repfx.squeeze(model)
    assert list(regions_of(model)) == ["1"]
    model[0].bias = nn.Parameter(torch.ones(4).double())
    torch.testing.assert_close(model(X), repfx.unsqueeze(copy.deepcopy(model))(X), rtol=0, atol=0)


def test_code_that_asks_for_gradients_stays() -> None:
    class Asks(Scaled):
        def forward(self, x: Any, mask: Tensor | None = None) -> Tensor:
            y: Tensor = self.body(x)
            return y if torch.is_grad_enabled() else 2 * y

    model = repfx.squeeze(ready(Asks()))
    reference = repfx.unsqueeze(copy.deepcopy(model))
    torch.testing.assert_close(model(X), reference(X), rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(model(X), reference(X), rtol=1e-12, atol=1e-12)


def test_code_that_switches_gradients_or_copies_itself_stays() -> None:
    class Frozen(Scaled):
        def forward(self, x: Any, mask: Tensor | None = None) -> Tensor:
            with torch.no_grad():
                y: Tensor = self.body(x)
            return y

    class Decorated(Scaled):
        @torch.no_grad()
        def forward(self, x: Any, mask: Tensor | None = None) -> Tensor:
            y: Tensor = self.body(x)
            return y

    class Copied(Scaled):
        def __getstate__(self) -> Any:
            return vars(self)

    for kind in (Frozen, Decorated, Copied):
        model = repfx.squeeze(ready(kind()))
        reference = repfx.unsqueeze(copy.deepcopy(model))
        assert all(
            path.startswith("body") for path in regions_of(model)
        )  # the modules inside run in the mode of the call
        assert model(X).requires_grad is (kind is Copied)
        torch.testing.assert_close(model(X), reference(X), rtol=1e-12, atol=1e-12)


def test_squeezing_twice_is_squeezing_once() -> None:
    model = repfx.squeeze(ready())
    regions = regions_of(model)
    assert regions_of(repfx.squeeze(model)) == regions
    assert repfx.report(model).applied == ()
    assert regions_of(repfx.squeeze(model, statistics="frozen")) == regions
    assert held_in(model)


def test_norms_that_were_still_for_another_reason_stay_so() -> None:
    model: Any = randomize_batch_norm(Residual().double()).train()
    model.bn.eval()
    repfx.squeeze(model, statistics="frozen")
    model.second.train()  # by itself
    model(X)
    assert not model.second.training
    repfx.unsqueeze(model)
    assert not model.bn.training
    assert model.second.training


def test_a_module_that_was_built_anew_runs_as_its_code_says_until_it_is_squeezed_again() -> None:
    model = repfx.squeeze(randomize_batch_norm(Residual().double()).train(), statistics="frozen")
    repfx.expand(model, {"first": "acb"}, inplace=True)
    assert runs_as_its_code_says(model)
    assert not model.train().bn.training
    loose = repfx.unsqueeze(copy.deepcopy(model)).train()
    assert loose.bn.training
    assert loose.block.norm.training
    assert not forms_in(loose)
    again = repfx.squeeze(copy.deepcopy(model))
    assert not again.bn.training  # as in the earlier call
    repfx.squeeze(model, statistics="frozen")
    assert {"stem", "block.wide.0"} <= regions_of(model).keys()
    assert_alike(model, still(repfx.unsqueeze(copy.deepcopy(model))))


class Inner(nn.Module):
    """A module that can't be traced, because it looks at numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.part(x)
        return y if y.sum() > 0 else -y


class Outer(nn.Module):
    """A module that can be traced except for a part, which takes its own form."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.inner = Inner()
        self.head = nn.Conv2d(6, 5, 1)
        self.last = nn.BatchNorm2d(5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.head(self.inner(self.norm(self.stem(x)).relu())))
        return y


def test_a_form_inside_another_one() -> None:
    model = ready(Outer())
    reference = copy.deepcopy(model)
    repfx.squeeze(model)
    assert forms_in(model).keys() == {"", "inner.part"}
    assert regions_of(model).keys() == {"stem", "head", "inner.part.0"}
    assert_alike(model, reference)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.BatchNorm2d, "forward", None)  # none of which runs
        model(X)


class ReadsItsValues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.settings, self.steps, self.activation = {"scale": [1.0]}, [1.0], torch.relu

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.norm(self.conv(x))) * self.settings["scale"][0] * self.steps[-1]


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.settings["scale"].insert(0, 3.0),
        lambda model: model.steps.append(3.0),
        lambda model: setattr(model, "activation", torch.sigmoid),
    ],
)
def test_values_in_containers_and_functions_that_are_changed(change: Callable[[Any], object]) -> None:
    model = repfx.squeeze(randomize_batch_norm(ReadsItsValues().double()).eval())
    assert not runs_as_its_code_says(model)
    change(model)
    assert runs_as_its_code_says(model)


def test_a_class_that_was_made_of_a_squeezed_one_stays() -> None:
    """A parametrization makes a subclass with the property that computes the parameter; that class must stay."""
    model: Any = repfx.squeeze(ready())
    model.register_parameter("unused", nn.Parameter(torch.ones(2)))
    register_parametrization(model, "unused", nn.Identity())
    reference = copy.deepcopy(model)
    repfx.unsqueeze(model)
    assert type(model).__name__.startswith("Parametrized")
    assert torch.equal(model.unused, torch.ones(2))
    assert_alike(model, reference)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_it_is_traced_by_torchscript() -> None:
    model = repfx.squeeze(ready())
    traced = torch.jit.trace(model, X, check_trace=False)
    torch.jit.save(traced, io.BytesIO())
    torch.testing.assert_close(traced(X), model(X), rtol=1e-12, atol=1e-12)


def test_a_parametrized_weight_is_computed_once() -> None:
    computed: list[Tensor] = []

    class Counts(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            computed.append(weight)
            return weight

    model: Any = repfx.squeeze(repfx.expand(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), "acb").eval())
    register_parametrization(model[0].origin.conv, "weight", Counts())
    computed.clear()
    model(torch.randn(1, 3, 5, 6))
    assert len(computed) == 1
