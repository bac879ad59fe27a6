"""Further arguments, ``*args`` and ``**kwargs``: options of code that only passes them on, and inputs of any other code."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import repfx
from repfx.errors import InvalidInput
from tests.inline_net import error_of, fused_exactly, image, norms, ready


class Head(nn.Module):
    """A last layer, for whose class code asks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 5, 3)

    def forward(self, x: Any) -> Any:
        return self.conv(x).flatten(1)


class Layers(nn.Module):
    """Layers that run one by one, and a loss that the forward needs for training alone, as in ultralytics' detectors."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), Head())

    def predict(self, x: Any, profile: bool = False, scale: float | None = None) -> Any:
        for layer in self.model:
            x = layer(x)
            if profile and type(self.model[-1]) is not Head:
                x = x + 1
        return x if scale is None else x * scale

    def loss(self, batch: Any, weight: float = 1.0) -> Any:
        return weight * self.predict(batch["image"]).mean()


class Detector(Layers):
    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(x, dict):
            return self.loss(x, *args, **kwargs)
        return self.predict(x, *args, **kwargs)


class Named(Layers):
    def forward(self, x: Any, **options: Any) -> Any:
        return self.predict(x, **options)


class Around(nn.Module):
    """Untraceable code that gives its child an option."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Detector()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.inner(x, False, 2.0 if float(x.mean()) > -100 else 3.0)
        return found


class Decoder(nn.Module):
    """Inputs that come as further arguments; the code around it can't be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

    def add(self, x: Tensor, *skips: Tensor) -> Tensor:
        return x + torch.stack([self.stem(skip).mean() for skip in skips]).sum()

    def forward(self, x: Tensor, *skips: Tensor) -> Tensor:
        return self.add(x, *skips)


@pytest.mark.parametrize("kind", [Detector, Named])
def test_code_that_only_passes_options_on_is_traced_without_them(kind: type[nn.Module]) -> None:
    model, x = ready(kind()), image(2, 3, 9, 11)
    fused = fused_exactly(model, x)
    assert norms(fused) == []
    assert error_of(pickle.loads(pickle.dumps(fused)), model, x) < 1e-9
    expanded = repfx.expand(model, "acb")
    assert [edit.path for edit in repfx.report(expanded).applied] == ["model.0", "model.3.conv"]
    assert type(expanded) is kind
    assert type(expanded.get_submodule("model.3")) is Head
    assert error_of(expanded, model, x) < 1e-9


def test_options_are_refused_by_the_graph() -> None:
    model, x = ready(Detector()), image(2, 3, 9, 11)
    fused = repfx.fuse(model)
    with pytest.raises(InvalidInput, match="without 'args'"):
        fused(x, False, 2.0)
    with pytest.raises(InvalidInput, match="without 'kwargs'"):
        fused(x, scale=2.0)


def test_a_child_that_is_given_options_by_untraceable_code_keeps_them() -> None:
    model, x = ready(Around()), image(2, 3, 9, 11)
    with torch.no_grad():
        assert error_of(repfx.fuse(model), model, x) < 1e-9


def test_further_arguments_that_are_inputs_stay_inputs() -> None:
    model, x = ready(Decoder()), image(2, 3, 9, 11)
    fused = repfx.fuse(model)
    with torch.no_grad():
        assert torch.allclose(fused(x, x, 2 * x), model(x, x, 2 * x), rtol=1e-9, atol=0)
    assert norms(fused) == []


class Asking(nn.Module):
    """Untraceable code that asks for the exact class of its child."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), Head()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        factor = 2.0 if type(self.head) is Head and float(x.mean()) > -100 else 1.0
        return factor * torch.as_tensor(self.head(x))


def test_a_child_whose_exact_class_is_asked_for_keeps_it_and_what_is_inside_is_changed() -> None:
    model, x = ready(Asking()), image(2, 3, 9, 11)
    for changed in (repfx.fuse(model), repfx.expand(model, "acb")):
        assert type(changed.get_submodule("head")) is Head
        assert error_of(changed, model, x) < 1e-9
    assert norms(repfx.fuse(model)) == []
    expanded = repfx.expand(model, "acb")
    assert [edit.path for edit in repfx.report(expanded).applied] == ["stem.0", "head.conv"]
