"""Fused models that were pickled, as by `torch.save(model)`, and then used, copied and pickled again."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import repfx
from repfx.errors import InvalidInput
from repfx.passes.fuse import fused_for
from tests.inline_net import error_of, image, norms, ready


class Block(nn.Module):
    kind = "block"

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.register_buffer("scale", torch.rand(4, 1, 1), persistent=False)

    def forward(self, x: Any) -> Any:
        return torch.relu(self.norm(self.conv(x))) * self.get_buffer("scale")


class AsksForATensor(Block):
    def forward(self, x: Any) -> Any:
        return super().forward(x) if isinstance(x, Tensor) else x


class AsksForAList(Block):
    """As in DenseNets and HRNets."""

    def forward(self, x: Any) -> Any:
        if isinstance(x, (list, tuple)):
            x = torch.cat(x, 1)
        return super().forward(x)


class AsksInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = AsksForATensor()

    def forward(self, x: Any) -> Any:
        return self.block(x if torch.is_tensor(x) else x[0])


class AsksForAClass(Block):
    def forward(self, x: Any) -> Any:
        return super().forward(x) if issubclass(x.__class__, Tensor) else None


class Masked(Block):
    def forward(self, x: Any = None, mask: Any = None, *, factor: float = 2.0) -> Any:
        y = super().forward(x) * factor
        return y if mask is None else y * mask


class Decides(nn.Module):
    """Traced in part only."""

    def __init__(self) -> None:
        super().__init__()
        self.block = AsksForAList()

    def forward(self, x: Any) -> Any:
        return self.block(x) * len(self.block.kind) if float(x.sum()) < 1e9 else x


MODELS = [Block, AsksForATensor, AsksForAList, AsksInside, AsksForAClass, Masked, Decides]


def saved_and_loaded(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS: dict[str, Any] = {
    "pickled": lambda m: pickle.loads(pickle.dumps(m)),
    "saved": saved_and_loaded,
    "copied, then saved": lambda m: saved_and_loaded(copy.deepcopy(m)),
    "saved, then copied": lambda m: copy.deepcopy(saved_and_loaded(m)),
    "saved, copied, saved, copied": lambda m: copy.deepcopy(saved_and_loaded(copy.deepcopy(saved_and_loaded(m)))),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cls", MODELS)
def test_it_is_the_same_and_has_its_report(cls: type[nn.Module], way: str) -> None:
    model = ready(cls())
    fused = repfx.fuse(model)
    again = WAYS[way](fused)
    x = image()
    assert error_of(again, model, x) < 1e-9
    assert repfx.report(again) == repfx.report(fused)
    assert repfx.report(again).applied
    if torch.__version__ >= "2.9":  # torch 2.8 keeps tensors that no graph reads when it loads a graph
        assert list(again.state_dict()) == list(fused.state_dict())
    assert again.state_dict().keys() >= fused.state_dict().keys()
    assert error_of(repfx.fuse(again), model, x) < 1e-9
    assert error_of(repfx.restore(again), model, x) < 1e-9


@pytest.mark.parametrize("way", WAYS)
def test_it_refuses_what_it_was_not_traced_for(way: str) -> None:
    x, mask = image(), image()
    asks, masked = (WAYS[way](repfx.fuse(ready(cls()))) for cls in (AsksForATensor, Masked))
    with pytest.raises(InvalidInput, match="traced with a tensor"):
        asks([x])
    with pytest.raises(InvalidInput, match="traced with mask=None"):
        masked(x, mask)
    with pytest.raises(InvalidInput, match="traced with 'x' as an input"):
        masked()
    assert masked(x, None, factor=2.0).shape == x.shape


@pytest.mark.parametrize("way", WAYS)
def test_inputs_that_an_example_gave_stay_inputs(way: str) -> None:
    model, x, mask = ready(Masked()), image(), image()
    fused = fused_for(model, (x, mask)).model
    for again in (WAYS[way](fused), repfx.fuse(fused), repfx.fuse(WAYS[way](fused))):
        assert torch.allclose(again(x, mask), model(x, mask), rtol=1e-9)
        assert norms(again) == []
        with pytest.raises(InvalidInput, match="traced with 'mask' as an input"):
            again(x)


def test_an_expanded_graph_keeps_its_journal() -> None:
    expanded = repfx.expand(repfx.fuse(ready(AsksForAList())), "acb")
    again = copy.deepcopy(saved_and_loaded(expanded))
    assert repfx.journal(again) == repfx.journal(expanded) != ()
    assert error_of(again, expanded, image()) < 1e-9


@pytest.mark.slow
def test_it_still_compiles_and_exports() -> None:
    fused = saved_and_loaded(repfx.fuse(ready(AsksForAList())))
    x = image()
    assert torch.allclose(torch.compile(fused, backend="eager", fullgraph=True)(x), fused(x))  # type: ignore[no-untyped-call]
    assert torch.allclose(torch.export.export(fused, (x,)).module()(x), fused(x))
