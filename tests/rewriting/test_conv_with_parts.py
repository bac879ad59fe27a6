"""Conv classes that hold more than a weight: an activation, a norm, a padding, a slope, a mask."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import repfx
from tests.inline_net import Net, convs, error_of, fused_exactly, image, norms, ready


class Activated(nn.Conv2d):
    """As detectron2's Conv2d: what comes behind is given by the user."""

    def __init__(self, *sizes: Any, behind: nn.Module, **options: Any) -> None:
        super().__init__(*sizes, **options)
        self.behind = behind

    def forward(self, x: Tensor) -> Any:
        return self.behind(super().forward(x))


class Padded(nn.Conv2d):
    """As efficientnet_pytorch's: pads for itself, by a module."""

    def __init__(self, *sizes: Any, padding_before: nn.Module, **options: Any) -> None:
        super().__init__(*sizes, **options)
        self.inner = nn.Sequential(padding_before)

    def forward(self, x: Tensor) -> Any:
        return F.conv2d(self.inner(x), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Sloped(nn.Conv2d):
    """Tensors of its own stand beside the weight."""

    def __init__(self) -> None:
        super().__init__(4, 4, 3, bias=False)
        self.slope = nn.Parameter(torch.rand(4))
        self.register_buffer("shift", torch.randn(4, 1, 1))
        self.register_buffer("factor", torch.rand(4, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Any:
        y = F.conv2d(x, self.weight, None, padding=(1, 0))
        return F.prelu(y * torch.sigmoid(y), self.slope) * self.get_buffer("factor") + self.get_buffer("shift")


class Length(nn.Conv1d):
    def __init__(self) -> None:
        super().__init__(4, 4, 3)
        self.act = nn.ModuleDict({"act": nn.Tanh()})

    def forward(self, x: Tensor) -> Any:
        return self.act["act"](self._conv_forward(x, self.weight, self.bias))


def behind() -> list[nn.Module]:
    return [nn.ReLU(), nn.GroupNorm(2, 4), nn.PReLU(4), nn.Sequential(nn.BatchNorm2d(4), nn.GELU())]


def before() -> list[nn.Module]:
    pads = [nn.ZeroPad2d((0, 1, 2, 1)), nn.ReflectionPad2d((1, 0, 0, 2)), nn.ConstantPad2d((1, 1, 0, 0), 3.0)]
    return [*pads, nn.Identity(), nn.Dropout(0.5)]


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("stride", [1, 2])
def test_what_stands_behind_the_conv_stays(index: int, stride: int) -> None:
    conv = Activated(4, 4, 3, behind=behind()[index], stride=stride, padding=(1, 0))
    for model in (
        Net(lambda m, x: m.c(m.norm(x)), c=conv, norm=nn.BatchNorm2d(4)),
        nn.Sequential(conv, nn.Conv2d(4, 2, 1)),
    ):
        expected = [
            name for name, _ in ready(model).named_parameters() if ".behind." in name and "behind.0." not in name
        ]
        fused = fused_exactly(model, image())
        assert [name for name, _ in fused.named_parameters() if ".behind." in name] == expected
        assert error_of(copy.deepcopy(fused), model, image()) < 1e-9
        assert error_of(repfx.fuse(fused), model, image()) < 1e-9


@pytest.mark.parametrize("index", range(5))
def test_what_stands_before_the_conv_stays_or_is_merged(index: int) -> None:
    conv = Padded(4, 4, (3, 2), padding_before=before()[index], dilation=(1, 2), groups=2)
    model = Net(lambda m, x: m.norm(m.c(x)), c=conv, norm=nn.BatchNorm2d(4))
    fused = fused_exactly(model, image())
    assert norms(fused) == []
    assert convs(fused) == ["c"]
    restored = repfx.restore(fused)
    assert error_of(restored, model, image()) < 1e-9
    again = copy.deepcopy(model)
    again.load_state_dict(restored.state_dict(), strict=True)
    assert error_of(again, model, image()) < 1e-9


def test_tensors_beside_the_weight_stay() -> None:
    model = ready(Net(lambda m, x: m.c(m.c0(x)), c0=nn.Conv2d(4, 4, 1), c=Sloped()))
    fused = fused_exactly(model, image())
    assert {"c.slope", "c.shift"} <= set(fused.state_dict())
    assert "c.factor" not in fused.state_dict()
    fused.load_state_dict(fused.state_dict(), strict=True)
    assert error_of(copy.deepcopy(fused), model, image()) < 1e-9


def test_in_one_dimension() -> None:
    model = Net(lambda m, x: m.c(m.pre(x)), pre=nn.Conv1d(4, 4, 1), c=Length())
    fused = fused_exactly(model, image(2, 4, 9))
    assert len(convs(fused)) == 1


def test_another_module_s_part_is_used_from_outside() -> None:
    """A conv that runs torch's own code, and whose part the code around it runs."""
    conv = nn.Conv2d(4, 4, 3)
    conv.act = nn.Tanh()
    model = Net(lambda m, x: m.c.act(m.norm(m.c(x))), c=conv, norm=nn.BatchNorm2d(4))
    assert norms(fused_exactly(model, image())) == []


@pytest.mark.parametrize("verb", ["expand", "squeeze", "sites"])
def test_other_verbs_leave_it_as_it_is(verb: str) -> None:
    model = ready(nn.Sequential(Activated(4, 4, 3, behind=nn.ReLU(), padding=1), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)))
    x = image()
    if verb == "expand":
        assert error_of(repfx.expand(model, "acb"), model, x) < 1e-9
    elif verb == "squeeze":
        assert error_of(repfx.squeeze(copy.deepcopy(model)), model, x) < 1e-9
    else:
        assert "runs code of its own" in str(repfx.sites(model)["0"].refusal)
