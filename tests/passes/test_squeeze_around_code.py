"""`squeeze` of models whose own code is more than layers: dropout, tensors, sums of parameters; and why there is nothing to squeeze."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import repfx
from repfx.blocks.squeezed_form import forms_in
from repfx.errors import InvalidInput
from repfx.rewriting.squeezed_regions import regions_of
from repfx.testing import relative_error
from tests.inline_net import image, ready

DROPOUTS: dict[str, Any] = {
    "dropout": lambda y, on: F.dropout(y, p=0.5, training=on),
    "by position": lambda y, on: F.dropout(y, 0.5, on),
    "in place": lambda y, on: F.dropout(y, 0.5, on, True),
    "alpha": lambda y, on: F.alpha_dropout(y, 0.5, on),
    "of channels": lambda y, on: F.dropout1d(y.unsqueeze(0), 0.5, on).squeeze(0),
}


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x: Any) -> Any:
        return self.layers(x)


class Classifier(nn.Module):
    """As RepGhostNet: dropout in the root's own code, behind layers of the root and of a body."""

    def __init__(self, dropout: Any) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        self.body, self.tail, self.drop = Body(), nn.Linear(4, 3), dropout

    def forward(self, x: Any) -> Any:
        y = self.body(torch.relu(self.norm(self.stem(x)))).mean((2, 3))
        return self.tail(self.drop(y, self.training))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", DROPOUTS)
def test_dropout_in_code_follows_the_mode(kind: str, training: bool) -> None:
    model, x = ready(Classifier(DROPOUTS[kind])).train(training), image()
    squeezed = repfx.squeeze(copy.deepcopy(model), statistics="frozen")
    assert sorted(regions_of(squeezed)) == ["body.layers.0", "stem"]
    model.norm.eval(), model.body.layers[1].eval()
    for mode in (training, not training, training):
        for net in (model, squeezed):
            net.train(mode)
        model.norm.eval(), model.body.layers[1].eval()
        outputs = []
        for net in (squeezed, model):
            torch.manual_seed(5)
            outputs.append(net(x))
        assert relative_error(*outputs) < 1e-9


def test_dropout_runs_in_the_form_and_only_in_one_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    squeezed = repfx.squeeze(ready(Classifier(DROPOUTS["dropout"])), statistics="frozen").train()
    form = forms_in(squeezed)[""]
    assert form.takes(squeezed, (image(),), {})
    squeezed.body.eval()  # code in it may read this mode
    assert not form.takes(squeezed, (image(),), {})


class MakesATensor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = Body()

    def forward(self, x: Any) -> Any:
        return self.body(x) * torch.tensor([2.0], dtype=torch.float64)


def test_where_the_root_can_t_run_as_a_graph_its_parts_do() -> None:
    model, x = ready(MakesATensor()), image()
    squeezed = repfx.squeeze(copy.deepcopy(model))
    assert sorted(regions_of(squeezed)) == ["body.layers.0"]
    for net in (model, squeezed):
        net.zero_grad()
        net(x).square().sum().backward()
    assert relative_error(squeezed(x), model(x)) < 1e-9
    for (name, a), b in zip(squeezed.named_parameters(), model.parameters()):
        assert relative_error(a.grad, b.grad) < 1e-8, name
    repfx.unsqueeze(squeezed)
    assert regions_of(squeezed) == {}
    assert relative_error(squeezed(x), model(x)) < 1e-9


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.na = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Any) -> Any:
        y = self.a(x)
        return torch.cat([y, self.na(y)], 1)


class Alone(MakesATensor):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(4, 4, 3)  # type: ignore[assignment]


class SumsParameters(MakesATensor):
    def forward(self, x: Any) -> Any:
        return self.body(x) + sum(p.pow(2).sum() for p in self.parameters())


class Untraced(Both):
    def forward(self, x: Any) -> Any:
        return super().forward(x) if float(x.sum()) < 1e9 else x


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Both(), "na: 'a' has a second user, 'cat'"),
        (nn.Sequential(Both()), r"0\.na: .* has a second user, 'cat'"),
        (Alone(), "Alone: its code makes tensors that don't depend on the input"),
        (
            SumsParameters(),
            "body: it can't be traced: code around it uses it in a way that repfx doesn't know: self.parameters",
        ),
        (Untraced(), "Untraced: it can't be traced"),
        (torch.fx.symbolic_trace(Body()), "it is a graph already"),
    ],
)
def test_why_there_is_nothing_to_squeeze(model: nn.Module, reason: str) -> None:
    for statistics in (None, "frozen"):
        with pytest.raises(InvalidInput, match=reason) as error:
            repfx.squeeze(model.eval(), statistics=statistics)
        assert ("lets BatchNorms keep" in str(error.value)) == (statistics is None)
        assert not forms_in(model)
