"""Arguments of a forward: which ones are inputs of the traced graph, and which ones keep one value."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import repfx
from repfx.errors import InvalidInput
from repfx.passes.fuse import fused_for
from repfx.tracing.trace import trace
from tests.inline_net import error_of, fused_exactly, image, norms, ready, reasons


class Block(nn.Module):
    """Conv and BatchNorm, in one, two or three dimensions."""

    def __init__(self, dimensions: int = 2) -> None:
        super().__init__()
        self.conv = getattr(nn, f"Conv{dimensions}d")(4, 4, 3, padding=1)
        self.norm = getattr(nn, f"BatchNorm{dimensions}d")(4)

    def run(self, x: Any) -> Any:
        return self.norm(self.conv(x))


class Optional(Block):
    def forward(self, x: Any = None) -> Any:
        return self.run(x)


class Named(Block):
    def forward(self, *, x: Any = "none") -> Any:
        return self.run(x)


class Asks(Block):
    """As in Hugging Face's models."""

    def forward(self, pixel_values: Any = None, mask: Any = None, return_dict: Any = None) -> Any:
        if pixel_values is None:
            raise ValueError("You have to specify pixel_values")
        y = self.run(pixel_values)
        if mask is not None:
            y = y * mask
        return {"y": y} if return_dict else y


FIRST = [Optional, Named, Asks]


def name_of(model: nn.Module) -> str:
    return str(next(iter(trace(model).islands[0].graph.nodes)).target)


# ---- the first argument


@pytest.mark.parametrize("cls", FIRST)
@pytest.mark.parametrize("training", [False, True])
def test_a_first_argument_with_a_default_is_an_input(cls: type[Block], training: bool) -> None:
    model = ready(cls()).train(training)
    fused = repfx.fuse(model).eval()
    model.eval()
    assert norms(fused) == []
    x, name = image(), name_of(model)
    for again in (fused, copy.deepcopy(fused), repfx.fuse(fused)):
        assert torch.allclose(again(**{name: x}), model(**{name: x}), rtol=1e-9)


@pytest.mark.parametrize("cls", FIRST)
def test_a_call_without_the_first_argument_is_refused(cls: type[Block]) -> None:
    fused = repfx.fuse(ready(cls()))
    with pytest.raises(
        InvalidInput, match=f"traced with '{name_of(cls())}' as an input and can't be called without it"
    ):
        fused()


def test_code_that_asks_whether_it_has_an_input_is_not_answered_for_both() -> None:
    class Start(Block):
        def forward(self, x: Any = None) -> Any:
            return self.run(self.conv.weight), x is not None

    fused = repfx.fuse(ready(Start()))
    assert fused(image())[1]
    with pytest.raises(InvalidInput, match="as an input"):
        fused()


@pytest.mark.slow
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_every_verb_serves_it(dimensions: int, tmp_path: Path) -> None:
    model, x = ready(Optional(dimensions)), image(2, 4, *(9, 10, 5)[:dimensions])
    fused_exactly(model, x)
    expanded = repfx.expand(model, "acb" if dimensions == 2 else "repvgg")
    assert repfx.sites(expanded)["conv"].branches
    assert repfx.check_equivalent(model, repfx.fuse(expanded), x).equivalent
    assert error_of(repfx.restore(repfx.fuse(model)), model, x) < 1e-9
    squeezed = repfx.squeeze(copy.deepcopy(model))
    assert error_of(squeezed, model, x) < 1e-9
    assert repfx.export_onnx(model, tmp_path / "net.onnx", x.float(), dtype=torch.float32).max_error < 1e-4


def test_a_squeezed_module_runs_in_its_form_with_that_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = repfx.squeeze(ready(Optional())), image()
    monkeypatch.setattr(nn.BatchNorm2d, "forward", lambda self, x: pytest.fail("the module runs its own forward"))
    assert model(x).shape == x.shape


def test_a_number_may_stand_for_a_first_argument() -> None:
    class Scaled(Block):
        def forward(self, factor: Any = 2.0, x: Any = None) -> Any:
            return self.run(x) * factor

    model = ready(Scaled())
    fused = fused_for(model, {"x": image(), "factor": torch.tensor(3.0)}).model
    x = image()
    assert norms(fused) == []
    assert torch.allclose(fused(x=x), model(x=x), rtol=1e-9)
    assert torch.allclose(fused(torch.tensor(5.0), x), model(5.0, x), rtol=1e-9)


# ---- arguments that an example gives


def test_what_an_example_gives_is_an_input() -> None:
    model = ready(Asks())
    x, mask = image(), (image() > 0).double()
    for example in ((x, mask), {"pixel_values": x, "mask": mask}):
        fused = fused_for(model, example).model
        assert norms(fused) == []
        assert torch.allclose(fused(x, mask), model(x, mask), rtol=1e-9)
        with pytest.raises(InvalidInput, match="traced with 'mask' as an input"):
            fused(x)
    with pytest.raises(InvalidInput, match="traced with mask=None"):
        repfx.fuse(model)(x, mask)


def test_a_value_without_tensors_in_an_example_is_kept() -> None:
    model, x = ready(Asks()), image()
    fused = fused_for(model, {"pixel_values": x, "return_dict": True}).model
    assert norms(fused) == []
    assert torch.allclose(fused(x, return_dict=True)["y"], model(x), rtol=1e-9)
    with pytest.raises(InvalidInput, match="traced with return_dict=True"):
        fused(x)


def test_a_nest_of_tensors_in_an_example_is_an_input() -> None:
    class Nested(Block):
        def forward(self, x: Any, others: Any = ()) -> Any:
            return self.run(x) + others["add"][0]

    model, x = ready(Nested()), image()
    example = (x, {"add": [image()]})
    fused = fused_for(model, example).model
    assert norms(fused) == []
    assert torch.allclose(fused(*example), model(*example), rtol=1e-9)


def test_an_example_without_the_first_argument_keeps_its_default() -> None:
    class Second(Block):
        def forward(self, tokens: Any = None, x: Any = None) -> Any:
            return self.run(x) if tokens is None else tokens

    model, x = ready(Second()), image()
    fused = fused_for(model, {"x": x}).model
    assert norms(fused) == []
    assert torch.allclose(fused(x=x), model(x=x), rtol=1e-9)
    with pytest.raises(InvalidInput, match="traced with tokens=None"):
        fused(x)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_an_export_has_the_inputs_of_its_example(dtype: torch.dtype | None, tmp_path: Path) -> None:
    model, x = ready(Asks()).float(), image().float()
    report = repfx.export_onnx(model, tmp_path / "net.onnx", (x, torch.ones(9, 1)), dtype=dtype)
    assert len(report.inputs) == 2
    assert report.nodes.get("BatchNormalization") is None


def test_an_example_that_does_not_fit_is_refused_by_the_forward() -> None:
    assert norms(fused_for(ready(Optional()), (image(), 1, 2)).model) == ["norm"]


# ---- inside code that isn't traced


class Decides(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Optional()

    def forward(self, x: Any) -> Any:
        return self.block(x=x) if float(x.sum()) < 1e9 else x


class MayPassNothing(Decides):
    def forward(self, x: Any) -> Any:
        return self.block(x) if float(x.sum()) < 1e9 else self.block()


class PassesAList(Decides):
    def forward(self, x: Any) -> Any:
        return self.block(*[x]) if float(x.sum()) < 1e9 else x.mean()


@pytest.mark.parametrize(
    ("cls", "left"), [(Decides, []), (MayPassNothing, ["block.norm"]), (PassesAList, ["block.norm"])]
)
def test_a_part_with_such_an_argument(cls: type[nn.Module], left: list[str]) -> None:
    model = fused_exactly(cls(), image())
    assert norms(model) == left
    assert ("may call it without 'x'" in reasons(model)) == bool(left)


def test_a_part_is_given_its_first_argument_by_code_that_is_traced() -> None:
    model = fused_exactly(nn.Sequential(Optional(), nn.ReLU(), Asks()), image())
    assert norms(model) == []


def test_a_default_that_a_graph_can_t_hold_leaves_the_module_as_it_is() -> None:
    nothing = torch.zeros(1)

    class WithTensor(Block):
        def forward(self, x: Any, mask: Any = nothing) -> Any:
            return self.run(x) + mask

    model = fused_exactly(WithTensor(), image())
    assert norms(model) == ["norm"]
    assert "'mask' has a tensor as its default" in reasons(model)


class NamedAsATensorMethod(nn.Module):
    """Children whose names are those of tensors' methods."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.split = Asks(), Asks()

    def forward(self, x: Any) -> Any:
        return self.split(self.norm(x, x), mask=x) if float(x.sum()) < 1e9 else x


def test_children_named_as_a_tensor_s_methods_are_known_for_modules() -> None:
    model = fused_exactly(NamedAsATensorMethod(), image())
    assert "may give it 'mask'" in reasons(model)


class DropsAtARate(nn.Module):
    """A block that is a leaf of graphs, because it draws. Its caller says how much it drops (EfficientNet's blocks)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor, rate: float | None = None) -> Tensor:
        y: Tensor = self.norm(self.conv(x))
        if rate:
            y = y * (torch.rand(len(y), 1, 1, 1) >= rate if self.training else 1 - rate)
        return x + y


@pytest.mark.parametrize("by_name", [False, True])
def test_a_leaf_that_its_caller_gives_another_value_is_not_traced_without_it(by_name: bool) -> None:
    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([DropsAtARate(), DropsAtARate()])
            self.last, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Any:
            for index, block in enumerate(self.blocks):
                x = block(x, rate=0.2 * index) if by_name else block(x, 0.2 * index)
            return self.norm(self.last(x))

    model = ready(Calls())
    for result in (repfx.fuse(model), repfx.fuse(repfx.expand(model, "acb"))):
        assert error_of(result, model, image()) < 1e-9
    assert norms(repfx.fuse(model)) != ["norm"]
    assert "norm" not in norms(repfx.fuse(model))
