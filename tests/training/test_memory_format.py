"""Models that automatically get channels last: those whose outputs stay the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

import repfx
from repfx.data.dataset import DataSet
from repfx.training.engine import accelerator_for
from repfx.training.loop import train
from repfx.training.memory_format import runs_with_channels_last
from repfx.training.process import Place
from repfx.training.recipe import Recipe
from tests.inline_net import Net

IMAGES = torch.randn(2, 3, 6, 7, generator=torch.Generator().manual_seed(0), device="cpu")


class OwnLayer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.as_strided((2, 4), (1, 1))


class Viewed(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / weight.view(weight.shape[0], -1).std(1)[:, None, None, None]


def convs() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())


def net(code: Callable[..., Tensor]) -> nn.Module:
    return Net(code, convs=convs(), head=nn.Linear(4, 2))


def pooled(m: Any, x: Tensor) -> Tensor:
    y: Tensor = F.dropout(m.convs(x), 0.3, training=m.training)
    head: Tensor = m.head(torch.flatten(y.mean((2, 3), keepdim=True), 1))
    return head


def viewed(m: Any, x: Tensor) -> Tensor:
    y: Tensor = m.convs(x)
    return y.view(y.shape[0], -1)


def asked(m: Any, x: Tensor) -> Tensor:
    y: Tensor = m.convs(x)
    return (y if y.is_contiguous() else -y).mean((2, 3))


def strided(m: Any, x: Tensor) -> Tensor:
    return torch.as_strided(m.convs(x), (2, 4), (1, 2))


def written(m: Any, x: Tensor) -> Tensor:
    y: Tensor = m.convs(x)
    flat = y.reshape(2, -1)
    flat.mul_(2)
    return y.mean((2, 3))


def by_values(m: Any, x: Tensor) -> Tensor:
    y: Tensor = m.convs(x)
    return (y if y.sum() > 0 else -y).mean((2, 3))


def strided_stem(m: Any, x: Tensor) -> Tensor:
    y: Tensor = F.conv2d(x, m.stem, stride=(1, 2)).mean((2, 3))
    return y


def transposed_head(m: Any, x: Tensor) -> Tensor:
    y: Tensor = F.conv_transpose2d(m.convs(x), m.head.weight.T.reshape(4, 2, 1, 1), stride=2).mean((2, 3))
    return y


def strided_in_training(m: Any, x: Tensor) -> Tensor:
    y: Tensor = strided_stem(m, x) if m.training else m.convs(x).mean((2, 3))
    return y


FAULTY: dict[str, Callable[[], nn.Module]] = {
    "layer": lambda: nn.Sequential(nn.Conv2d(3, 4, 1, stride=2), nn.Flatten()),
    "layer, 15 channels": lambda: nn.Sequential(
        nn.Conv2d(3, 15, 1), nn.ReLU(), nn.Conv2d(15, 4, 1, stride=3), nn.Flatten()
    ),
    "function": lambda: Net(strided_stem, stem=nn.Parameter(torch.randn(4, 3, 1, 1))),
    "function, in training alone": lambda: Net(
        strided_in_training, convs=convs(), stem=nn.Parameter(torch.randn(4, 3, 1, 1))
    ),
    "transposed": lambda: net(transposed_head),
}


@pytest.mark.parametrize("name", FAULTY)
def test_a_net_for_which_torch_may_corrupt_memory_stays_as_it_is(name: str) -> None:
    """The trial must not go back through it on a CPU, because that may end the process. Other devices have other kernels."""
    gone_back: list[Tensor] = []
    model = FAULTY[name]()

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.inner(x)
            if y.requires_grad:
                y.register_hook(gone_back.append)
            return y

    assert not runs_with_channels_last(Outer(), IMAGES)
    assert not gone_back
    assert runs_with_channels_last(Outer(), IMAGES, torch.device("meta"))


@pytest.mark.parametrize(
    "conv", [nn.Conv2d(3, 4, 3, stride=2), nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1, stride=2, padding=1)]
)
def test_similar_nets_get_channels_last(conv: nn.Module) -> None:
    assert runs_with_channels_last(nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten()), IMAGES)


def test_blocks_of_strided_stems_get_channels_last() -> None:
    stem = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert runs_with_channels_last(repfx.expand(stem, "dbb"), IMAGES)
    shared = repfx.expand(stem, {"0": repfx.Spec(["1x1"], weights="shared")})
    assert runs_with_channels_last(shared, IMAGES)


def with_hook(kind: str) -> nn.Module:
    def look(module: nn.Module, *values: Any) -> None:
        value = values[-1][0] if isinstance(values[-1], tuple) else values[-1]
        value.view(-1)

    model: Any = net(pooled)
    getattr(model.convs[1], kind)(look)
    return model  # type: ignore[no-any-return]


def parametrized() -> nn.Module:
    model = convs()
    parametrize.register_parametrization(model[0], "weight", Viewed())
    return nn.Sequential(model, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def with_weight_norm() -> nn.Module:
    model = nn.Sequential(convs(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    nn.utils.weight_norm(model.get_submodule("0.0"))
    return model


class NotCopied(nn.Sequential):
    def __deepcopy__(self, memo: Any) -> NotCopied:
        raise TypeError("can't be copied")


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (lambda: nn.Sequential(convs(), nn.Flatten(), nn.Linear(4 * 4 * 5, 2)), True),
        (lambda: repfx.expand(net(pooled), "dbb"), True),
        (lambda: repfx.squeeze(repfx.expand(net(pooled), "orepa")), True),
        (lambda: repfx.fuse(net(pooled)), True),
        (lambda: net(by_values), True),
        (lambda: net(viewed), False),
        (lambda: net(asked), False),
        (lambda: net(strided), False),
        (lambda: net(written), False),
        (lambda: with_hook("register_forward_hook"), False),
        (lambda: with_hook("register_forward_pre_hook"), False),
        (lambda: with_hook("register_full_backward_hook"), False),
        (parametrized, False),
        (with_weight_norm, True),
        (lambda: NotCopied(convs(), nn.AdaptiveAvgPool2d(1), nn.Flatten()), False),
        (lambda: nn.Sequential(convs(), nn.Sequential(OwnLayer())), False),
        (lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 4, 3)), False),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.LazyBatchNorm2d()), False),
    ],
)
def test_it_is_tried_out(model: Callable[[], nn.Module], expected: bool) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tried = model()
        state = torch.get_rng_state()
        values = {name: value.clone() for name, value in tried.state_dict().items() if not is_lazy(value)}
        assert runs_with_channels_last(tried, IMAGES) is expected
        assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tried.state_dict()[name], value) for name, value in values.items())


def test_other_inputs_stay() -> None:
    assert not runs_with_channels_last(nn.Conv2d(3, 4, 1), torch.randn(3, 6, 7))


@pytest.mark.parametrize(
    ("codes", "given", "expected"),
    [
        ([pooled], None, True),
        ([viewed], None, False),
        ([pooled, viewed], None, False),  # a teacher gets the same images
        ([viewed], True, True),
        ([pooled], False, False),
    ],
)
def test_a_training_lays_out_weights_and_images_alike(
    codes: list[Callable[..., Tensor]], given: bool | None, expected: bool
) -> None:
    recipe = Recipe(device="cpu", channels_last=given)
    with accelerator_for(recipe) as accelerator:
        place = Place(accelerator, recipe)
        models = [net(code) for code in codes]
        place.lay_out(models, IMAGES)
        assert place.bring(torch.arange(3)).tolist() == [0, 1, 2]
        tensors = [place.bring(IMAGES), *(model.get_parameter("convs.0.weight") for model in models)]
    assert all(each.is_contiguous(memory_format=torch.channels_last) == expected for each in tensors)


@pytest.mark.slow
def test_a_net_that_views_is_trained_as_ever() -> None:
    labels = torch.arange(16) % 2
    images = torch.utils.data.TensorDataset(torch.randn(16, 3, 6, 7), labels)
    model = Net(lambda m, x: m.head(viewed(m, x)), convs=convs(), head=nn.Linear(4 * 4 * 5, 2))
    train(model, DataSet(images, images, ("a", "b")), Recipe(epochs=1, batch_size=8))
    assert model.convs[0].weight.is_contiguous()  # type: ignore[index, union-attr]
