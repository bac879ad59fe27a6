"""Models that are trained on with rounded numbers: what is left to train, and that nothing but rounding changes what they compute."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import repfx
from repfx.onnx.free_axes import FreeAxes
from repfx.onnx.program import exported, quiet
from repfx.qat.folding import fold_norms
from repfx.qat.rounded import Rounded, converted, rounded
from repfx.records.notes import copy_of
from repfx.testing import randomize_batch_norm

pt2e = pytest.importorskip("torchao.quantization.pt2e")
pytestmark = pytest.mark.slow

X = torch.rand(6, 3, 12, 10, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two convs with BatchNorm, of which the second can have an identity beside it, and a linear layer."""

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.one, self.norm1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8, eps)
        self.two, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8, eps)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm1(self.one(x)))
        x = torch.relu(self.norm2(self.two(x)))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


class Joined(nn.Module):
    """A residual around two convs, and a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(3, 8, 3, 2, bias=False), nn.BatchNorm2d(8)
        self.one, self.norm1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.two, self.norm2 = nn.Conv2d(8, 8, (3, 1), padding=(1, 0), bias=False), nn.BatchNorm2d(8)
        self.three, self.norm3 = nn.Conv2d(8, 5, 1, bias=False), nn.BatchNorm2d(5)
        self.pool, self.head = nn.MaxPool2d(2), nn.Linear(13, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(torch.relu(self.norm0(self.stem(x))))
        x = torch.relu(x + self.norm2(self.two(torch.relu(self.norm1(self.one(x))))))
        x = torch.cat([x, torch.relu(self.norm3(self.three(x)))], 1)
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


def trained(model: nn.Module, spec: str | None = "repvgg") -> nn.Module:
    """A model as it is after a training: with branches, and BatchNorms whose numbers are far from those of new ones."""
    torch.manual_seed(0)
    model = model if spec is None else repfx.expand(model, spec)
    randomize_batch_norm(model)
    return model.eval()


def prepared(model: nn.Module) -> Rounded:
    """A model as torchao prepares it, neither fused nor restored before."""
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e

    from repfx.qat.quantizer import FileQuantizer

    program = exported(model.train(), X, FreeAxes.usual(X, batch=True, size=False))
    with quiet():
        return Rounded(prepare_qat_pt2e(program.module(), FileQuantizer())).train()


def train(model: nn.Module, steps: int = 3, rate: float = 1e-4) -> None:
    optimizer = torch.optim.SGD(model.parameters(), rate)
    for _ in range(steps):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()


def counts(model: fx.GraphModule | Rounded) -> Counter[str]:
    """How many nodes of each operator a graph has."""
    graph: Any = model.graph.graph if isinstance(model, Rounded) else model.graph
    return Counter(node.target.__name__.split(".")[0] for node in graph.nodes if node.op == "call_function")


def exactly(model: Rounded) -> Rounded:
    """A copy in float64 that computes without rounding."""
    copied = copy_of(model).eval().double()
    copied.apply(pt2e.disable_fake_quant)
    return copied


def test_only_the_restored_net_has_one_norm_for_each_conv_while_it_trains_and_none_in_the_end() -> None:
    model = trained(Net())
    expanded, fused = prepared(copy_of(model)), prepared(repfx.fuse(model))
    restored = rounded(model, X)
    assert counts(fused)["batch_norm"] == 0
    assert counts(restored)["batch_norm"] == counts(restored)["conv2d"] == 2
    found = []
    for each in (expanded, fused, restored):
        train(each)
        nodes = counts(converted(each))
        found.append((nodes["conv2d"], nodes["batch_norm"], nodes["add"]))
    assert found == [(4, 1, 3), (2, 0, 0), (2, 0, 0)]


@pytest.mark.parametrize("eps", [1e-5, 1e-3])
def test_without_rounding_the_prepared_model_computes_the_same(eps: float) -> None:
    model = trained(Net(eps))
    found = exactly(rounded(model, X))(X.double())
    assert float((found - model.double()(X.double())).abs().max()) < 1e-6  # its weights are rounded to float32


def test_folding_changes_nothing() -> None:
    model = rounded(trained(Joined()), X)
    train(model)
    exact = exactly(model)
    folded = copy_of(exact).graph
    fold_norms(folded)
    assert counts(folded)["batch_norm"] == 0
    assert float((folded(X.double()) - exact(X.double())).abs().max()) < 1e-9


def test_rounding_costs_little_and_the_ranges_move_only_in_training() -> None:
    model = trained(Joined())
    found = rounded(model, X)
    train(found)
    state = {name: value.clone() for name, value in found.state_dict().items()}
    found.eval()(3 * X)
    assert all(torch.equal(state[name], value) for name, value in found.state_dict().items())
    expected = exactly(found)(X.double())
    assert 1e-4 < float((found(X) - expected).norm() / expected.norm()) < 0.1
    found.train()(3 * X)
    assert any(not torch.equal(state[name], value) for name, value in found.state_dict().items())


def test_the_model_stays_as_it_is() -> None:
    model = trained(Net()).train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    train(rounded(model, X))
    assert model.training
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
