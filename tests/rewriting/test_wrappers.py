"""Models in wrappers, given to each verb: compiled, averaged, parallel, as TorchScript, or exported."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import repfx
from repfx.errors import InvalidInput
from repfx.records.wrappers import bare, innermost
from tests.inline_net import convs, error_of, image, norms, ready


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=(1, 0), bias=False), nn.BatchNorm2d(4)
        self.layers = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU())

    def forward(self, x: Any, scale: float = 2.0) -> Any:
        return self.layers(torch.relu(self.norm(self.conv(x))) * scale)


class PassesOnInWords(nn.Module):
    """As timm's averages."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


class Counts(AveragedModel):
    """An average that does more than pass on."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs) + 1


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


def parallel(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


WRAPPERS: dict[str, Any] = {
    "compiled": compiled,
    "distributed": parallel,
    "compiled and distributed": lambda m: compiled(parallel(m)),
    "parallel": nn.DataParallel,
}
AVERAGES: dict[str, Any] = {
    "averaged": AveragedModel,
    "averaged and parallel": lambda m: AveragedModel(nn.DataParallel(m)),
}
ALL = {**WRAPPERS, **AVERAGES}


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("name", ALL)
def test_a_wrapped_model_stands_for_the_model_inside(name: str) -> None:
    plain, x = ready(Plain()), image()
    model = ALL[name](copy.deepcopy(plain)).eval()
    fused = repfx.fuse(model, strict=True, example=x)
    assert norms(fused) == []
    assert isinstance(fused, torch.fx.GraphModule)
    assert error_of(fused, plain, x) < 1e-9
    for wrapped in (fused, nn.DataParallel(fused), AveragedModel(fused)):
        restored = repfx.restore(wrapped)
        copy.deepcopy(plain).load_state_dict(restored.state_dict(), strict=True)
    expanded = repfx.expand(model, "acb", strict=True, example=x)
    assert type(expanded) is Plain
    assert error_of(expanded, plain, x) < 1e-9
    assert [site.path for site in repfx.sites(model)] == ["conv", "layers.0"]
    assert norms(innermost(model)) == ["norm", "layers.1"]


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("name", ALL)
def test_changed_in_place_it_stays_in_its_wrapper(name: str) -> None:
    plain, x = ready(Plain()), image()
    model = ALL[name](copy.deepcopy(plain)).eval()
    assert error_of(model, plain, x) < 1e-9
    assert repfx.expand(model, "acb", inplace=True) is model
    assert len(repfx.report(model).applied) == 2
    assert [action.kind for action in repfx.journal(innermost(model))] == ["expand", "expand"]
    assert repfx.drop(model, "conv", "1xk", example=x) is model
    assert repfx.squeeze(model) is model
    assert repfx.unsqueeze(model) is model
    assert len(repfx.report(model).applied) == 2
    assert error_of(innermost(model), plain, x) < 1e-9
    assert error_of(repfx.fuse(model), plain, x) < 1e-9


def test_a_verb_changes_the_average_alone() -> None:
    plain, x = ready(Plain()), image()
    average = AveragedModel(plain).eval()
    repfx.expand(average, "acb", inplace=True)
    assert len(convs(average)) > len(convs(plain)) == 2
    assert error_of(average, plain, x) < 1e-9
    assert int(average.n_averaged) == 0


@pytest.mark.slow
@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("name", ALL)
def test_it_is_exported(name: str, tmp_path: Path) -> None:
    model = ALL[name](ready(Plain()).float()).eval()
    report = repfx.export_onnx(model, tmp_path / "net.onnx", image().float(), dynamic_size=True)
    assert [value.name for value in report.inputs] == ["x"]
    assert report.nodes["Conv"] == 2
    assert "BatchNormalization" not in report.nodes


@pytest.mark.skipif(torch.__version__ < "2.9", reason="torch 2.8 can't export further arguments with a free batch")
@pytest.mark.parametrize("options", [{}, pytest.param({"dynamic_batch": False}, marks=pytest.mark.slow)])
def test_a_forward_of_any_arguments_is_exported(options: dict[str, Any], tmp_path: Path) -> None:
    model = PassesOnInWords(ready(Plain()).float())
    for x in (image().float(), (image().float(),), {"x": image().float()}):
        assert repfx.export_onnx(model, tmp_path / "net.onnx", x, **options).nodes["Conv"] == 2


def test_a_part_in_a_wrapper_is_rewritten() -> None:
    plain = ready(Plain())
    model = nn.Sequential(nn.DataParallel(copy.deepcopy(plain)), nn.Identity())
    fused = repfx.fuse(model)
    assert norms(fused) == []
    assert error_of(fused, plain, image()) < 1e-9


def test_a_wrapper_with_code_of_its_own_keeps_it() -> None:
    plain, x = ready(Plain()), image()
    fused = repfx.fuse(Counts(copy.deepcopy(plain)).eval())
    assert torch.allclose(fused(x), plain(x) + 1, rtol=1e-9)
    hooked = nn.DataParallel(copy.deepcopy(plain))
    hooked.register_forward_hook(lambda module, args, output: output + 1)
    assert torch.allclose(repfx.fuse(hooked)(x), plain(x) + 1, rtol=1e-9)


def test_a_part_that_gets_further_arguments_through_a_wrapper_stays() -> None:
    class Passes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.DataParallel(Plain())

        def forward(self, x: Any) -> Any:
            return self.inner(x, 3.0) if float(x.sum()) < 1e9 else x

    model = ready(Passes())
    assert error_of(repfx.fuse(model), model, image()) < 1e-9


FORMS: dict[str, tuple[Any, str]] = {
    "script": (torch.jit.script, "TorchScript"),
    "trace": (lambda m: torch.jit.trace(m, image()), "TorchScript"),
    "exported": (lambda m: torch.export.export(m, (image(),)).module(), "torch.export"),
}


VERBS = ("fuse", "expand", "restore", "squeeze", "drop", "sites", "export_onnx", "Driver")


@pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel], ids=["bare", "wrapped"])
@pytest.mark.parametrize(
    ("verb", "form"),
    [each for each in product(VERBS, FORMS) if each != ("fuse", "exported")],  # fuse takes such graphs
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_forms_without_layers_are_refused_with_the_reason(verb: str, form: str, wrap: Any, tmp_path: Path) -> None:
    make, reason = FORMS[form]
    model = wrap(make(ready(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)))))
    rest: dict[str, tuple[Any, ...]] = {
        "expand": ("acb",),
        "drop": ("0",),
        "export_onnx": (tmp_path / "net.onnx", image()),
        "Driver": ([], repfx.schedules.Fixed("acb")),
    }
    with pytest.raises(InvalidInput, match=reason):
        getattr(repfx, verb)(model, *rest.get(verb, ()))
    assert not list(tmp_path.iterdir())


def test_fuse_takes_a_wrapped_graph_of_operators() -> None:
    model = ready(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)))
    program = torch.export.export(model, (image(),)).module()
    fused = repfx.fuse(nn.DataParallel(program))
    assert error_of(fused, model, image()) < 1e-9
    assert not [node for node in fused.graph.nodes if "norm" in str(node.target)]


def test_a_graph_that_mixes_operators_and_layers_is_served() -> None:
    class Mixes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))

        def forward(self, x: Any) -> Any:
            return torch.ops.aten.relu(self.block(x))

    model = ready(torch.fx.symbolic_trace(Mixes()))
    assert norms(repfx.fuse(model)) == []


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("name", WRAPPERS)
def test_a_checkpoint_of_one_is_a_checkpoint_of_the_model(name: str, tmp_path: Path) -> None:
    model = WRAPPERS[name](repfx.expand(ready(Plain()), "acb"))
    repfx.save(tmp_path / "run.ckpt", model)
    for again in (ready(Plain(), seed=1), WRAPPERS[name](ready(Plain(), seed=2))):
        assert repfx.load(tmp_path / "run.ckpt", again) is again
        assert error_of(bare(again), bare(model), image()) < 1e-9
        assert len(convs(again)) == len(convs(model))


def test_what_is_inside() -> None:
    model = nn.Linear(1, 1)
    assert innermost(AveragedModel(compiled(nn.DataParallel(model)))).state_dict().keys() == model.state_dict().keys()
    assert bare(model) is innermost(model) is model
