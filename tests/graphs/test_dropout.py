"""``F.dropout(…, training=self.training)`` in a model's own code is traced so that it keeps its meaning in both modes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import repfx
from repfx.algebra.layers import is_batch_norm
from repfx.graphs.trace import trace
from repfx.graphs.traced import MODULES
from repfx.rewriting.pipeline import rewrite
from repfx.testing import assert_equivalent, randomize_batch_norm


class Dropping(nn.Module):
    """A conv net whose own code calls dropout."""

    def __init__(self, dropout: Any = F.dropout, always: bool | None = None) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.dropout_0 = nn.Identity()  # a name that is already taken
        self.dropout, self.always = dropout, always

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout_0(self.norm(self.conv(x))).flatten(2)
        dropped: Tensor = self.dropout(x, 0.4, training=self.training if self.always is None else self.always)
        return dropped


X = torch.randn(2, 3, 5, 6, dtype=torch.float64)


@pytest.mark.parametrize("dropout", MODULES, ids=lambda function: function.__name__)
def test_it_follows_the_mode(dropout: Any) -> None:
    model = randomize_batch_norm(Dropping(dropout).double()).eval()
    assert [island.path for island in trace(model).islands] == [""]
    traced = rewrite(model, (), "trace").model
    assert torch.equal(traced(X), model(X))
    outputs = []
    for module in (traced.train(), model.train()):
        torch.manual_seed(0)
        outputs.append(module(X))
    assert torch.equal(*outputs)
    assert (outputs[0] == 0).any() or dropout not in (F.dropout, F.dropout1d)
    assert traced.state_dict().keys() == model.state_dict().keys()


def test_every_function_of_dropout_has_its_module() -> None:
    names = {
        name for name, function in vars(F).items() if name.endswith(("dropout", "dropout1d", "dropout2d", "dropout3d"))
    }
    modules: dict[Any, type[nn.Module]] = {**MODULES}
    assert {function.__name__ for function in modules} == {name for name in names if not name.startswith("_")}
    assert all(kind.__name__.lower() == function.__name__.replace("_", "") for function, kind in modules.items())


@pytest.mark.parametrize("always", [True, False])
def test_one_that_has_a_mode_of_its_own_keeps_it(always: bool) -> None:
    traced = rewrite(Dropping(always=always), (), "trace").model.eval()
    assert bool((traced(X.float()) == 0).any()) is always


def test_what_drops_is_fused_whole() -> None:
    model = randomize_batch_norm(Dropping().double()).eval()
    fused = repfx.fuse(model)
    assert not any(map(is_batch_norm, fused.modules()))
    assert_equivalent(fused, model, X)
    restored = repfx.restore(fused)
    assert_equivalent(restored, model, X)
    assert restored.train()(X).eq(0).any()
    assert repfx.sites(model)["conv"].norm == "norm"


def test_what_drops_right_behind_a_conv_is_expanded() -> None:
    class Next(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.after = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Any:
            return self.after(F.dropout(self.conv(x), training=self.training))

    model = Next().double().eval()
    assert_equivalent(repfx.expand(model, "acb"), model, X)
