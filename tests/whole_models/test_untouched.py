"""Verbs leave the model that they are given as it is, whatever its own code does when it is copied, traced or put into another mode."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import repfx
from repfx.errors import InvalidInput
from repfx.testing import randomize_batch_norm
from tests.inline_net import Net, image


class MergesItself(nn.Conv2d):
    """A conv like loralib's: it adds what it has learned to the weight in eval mode and subtracts it in training mode."""

    def __init__(self) -> None:
        super().__init__(4, 4, 3, padding=1)
        self.merged = False
        self.learned = nn.Parameter(torch.randn(4 * 4 * 9))

    def train(self, mode: bool = True) -> MergesItself:
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * self.learned.data.view_as(self.weight)
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight if self.merged else self.weight + self.learned.view_as(self.weight)
        return F.conv2d(x, weight, self.bias, padding=1)


class Clamps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Any:
        for weight in self.conv.parameters():
            weight.data.clamp_(-0.01, 0.01)
        return self.norm(self.conv(x))


class Zeroes(Clamps):
    def forward(self, x: Tensor) -> Any:
        self.state_dict()["conv.weight"].zero_()
        return self.norm(self.conv(x))


def read_from_the_state_dict(m: Any, x: Tensor) -> Any:
    return F.relu(m.norm(m.conv(x))) * m.state_dict()["scale"]


def read_from_a_list(m: Any, x: Tensor) -> Any:
    return F.relu(m.norm(m.conv(x))) * m.hidden[0].detach()


def read_as_data(m: Any, x: Tensor) -> Any:
    return F.relu(m.norm(m.conv(x))) * dict(m.named_parameters())["scale"].data


def scaled(code: Callable[..., Any]) -> nn.Module:
    scale = nn.Parameter(torch.rand(4, 1, 1) + 1)
    return Net(code, conv=nn.Conv2d(4, 4, 3), norm=nn.BatchNorm2d(4), scale=scale, hidden=[scale])


MODELS: dict[str, Callable[[], nn.Module]] = {
    "merges itself": lambda: nn.Sequential(MergesItself(), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1)),
    "clamps": Clamps,
    "zeroes": Zeroes,
    "state dict": lambda: scaled(read_from_the_state_dict),
    "list": lambda: scaled(read_from_a_list),
    "data": lambda: scaled(read_as_data),
}
VERBS: dict[str, Callable[[nn.Module], Any]] = {
    "sites": repfx.sites,
    "fuse": repfx.fuse,
    "expand": lambda model: repfx.expand(model, "acb"),
}


def ready(name: str, mode: bool) -> nn.Module:
    return randomize_batch_norm(MODELS[name]().double()).train(mode)


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", MODELS)
def test_the_model_is_as_it_was(name: str, verb: str, mode: bool) -> None:
    model = ready(name, mode)
    state = copy.deepcopy(model.state_dict())
    result = VERBS[verb](model)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(module.training == mode for module in model.modules())
    if isinstance(result, nn.Module):
        theirs = {value.untyped_storage().data_ptr() for value in model.state_dict().values()}
        held = [value for module in result.modules() for value in vars(module).values() if isinstance(value, Tensor)]
        held += [*result.parameters(), *result.buffers()]
        ours = {value.untyped_storage().data_ptr() for value in held}
        assert not theirs & ours


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("verb", ["fuse", "expand"])
@pytest.mark.parametrize("name", MODELS)
def test_the_result_computes_the_same(name: str, verb: str, mode: bool) -> None:
    if (name, verb) == ("zeroes", "expand"):
        pytest.skip("its code asks for a weight by the name that it has in the plain model")
    model, x = ready(name, mode), image()
    result = VERBS[verb](model).eval()
    assert (result(x) - copy.deepcopy(model).eval()(x)).abs().max() < 1e-9
    if name == "merges itself" and verb == "fuse":
        assert type(result.get_submodule("0")) is nn.Conv2d
    elif name == "merges itself":
        assert result.get_submodule("0").merged
        assert not result.train().get_submodule("0").merged
        assert (result.eval()(x) - copy.deepcopy(model).eval()(x)).abs().max() < 1e-9


@pytest.mark.parametrize("verb", [repfx.fuse, lambda model: repfx.expand(model, "acb")])
def test_a_function_around_a_part_of_the_model_would_run_that_part_in_the_copy(verb: Any) -> None:
    class Wraps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.block: Any = lambda x: self.norm(self.conv(x))

        def forward(self, x: Tensor) -> Any:
            return self.block(x)

    with pytest.raises(InvalidInput, match="'block' is a function that closes over a part of the model"):
        verb(Wraps())
