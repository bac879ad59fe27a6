"""Models that are trained on with rounded numbers: what is left to train, and that nothing but rounding changes what they compute."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

import repfx
from repfx.errors import ExportError, InvalidInput
from repfx.onnx.free_axes import FreeAxes
from repfx.onnx.program import exported, quiet
from repfx.qat.file import export_int8
from repfx.qat.folding import fold_norms
from repfx.qat.rounded import Rounded, converted, rounded
from repfx.records.notes import copy_of
from tests.onnx.test_quantize import kernels_for
from tests.qat.nets import Chain, Joined, X, trained

pt2e = pytest.importorskip("torchao.quantization.pt2e")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def joined() -> Rounded:
    """The net with a residual and a concatenation, after some steps with rounding."""
    model = rounded(trained(Joined()), X)
    train(model)
    return model


def prepared(model: nn.Module) -> Rounded:
    """A model as torchao prepares it, neither fused nor restored before."""
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e

    from repfx.qat.quantizer import FileQuantizer

    program = exported(model.eval(), X, FreeAxes.usual(X, batch=True, size=False))
    with quiet():
        return Rounded(prepare_qat_pt2e(program.module(), FileQuantizer())).train()


def train(model: nn.Module, steps: int = 3, rate: float = 1e-4) -> None:
    optimizer = torch.optim.SGD(model.parameters(), rate)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()


def counts(model: fx.GraphModule) -> Counter[str]:
    """How many nodes of each operator a graph has."""
    functions = (node.target for node in model.graph.nodes if node.op == "call_function")
    return Counter(str(target).removeprefix("aten.").split(".")[0] for target in functions)


def exactly(model: Rounded) -> Rounded:
    """A copy in float64 that computes without rounding."""
    copied: Rounded = copy_of(model).eval()
    copied.double()
    copied.apply(pt2e.disable_fake_quant)
    return copied


def state_of(model: nn.Module) -> dict[str, Any]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_only_the_restored_net_has_one_norm_for_each_conv_while_it_trains_and_none_in_the_end() -> None:
    model = trained(Chain())
    expanded, fused, restored = prepared(copy_of(model)), prepared(repfx.fuse(model)), rounded(model, X)
    assert counts(fused.graph)["batch_norm"] == 0
    assert counts(restored.graph)["batch_norm"] == counts(restored.graph)["conv2d"] == 2
    found = []
    for each in (expanded, fused, restored):
        train(each)
        fold_norms(each.eval().graph)
        nodes = counts(each.graph)
        found.append((nodes["conv2d"], nodes["batch_norm"], nodes["add"]))
    assert found == [(4, 1, 3), (2, 0, 0), (2, 0, 0)]


def test_without_rounding_the_prepared_model_computes_the_same_and_the_given_one_stays() -> None:
    model = trained(Chain(eps=1e-3)).train()
    before = state_of(model)
    found = rounded(model, X)
    exact = exactly(found)(X.double())
    train(found)
    assert model.training
    assert same(before, state_of(model))
    expected = model.eval().double()(X.double())
    assert float((exact - expected).abs().max().detach()) < 1e-6  # its weights are rounded to float32


def test_the_training_begins_where_the_float_training_has_ended(joined: Rounded) -> None:
    """The statistics of the BatchNorms are measured: those that follow from the branches' own leave out how the branches correlate."""
    found = exactly(joined)
    with torch.no_grad():
        expected = found(X.double())
        for node in found.graph.graph.nodes:
            if node.target == torch.ops.aten.batch_norm.default:
                node.update_arg(5, True)
        found.graph.recompile()
        assert float((found(X.double()) - expected).norm() / expected.norm()) < 0.02


def test_dropout_and_norms_have_two_modes(joined: Rounded) -> None:
    def modes() -> set[Any]:
        at = {torch.ops.aten.batch_norm.default: 5, torch.ops.aten.dropout.default: 2}
        nodes = [node for node in joined.graph.graph.nodes if node.target in at]
        assert len(nodes) == 5
        return {node.args[at[node.target]] for node in nodes}

    joined.train()
    assert modes() == {True}
    assert not torch.allclose(joined(X), joined(X), rtol=0.05)
    joined.eval()
    assert modes() == {False}
    assert torch.equal(joined(X), joined(X))


def test_folding_changes_nothing(joined: Rounded) -> None:
    exact = exactly(joined)
    folded = copy_of(exact).graph
    fold_norms(folded)
    assert counts(folded)["batch_norm"] == 0
    with torch.no_grad():
        assert float((folded(X.double()) - exact(X.double())).abs().max()) < 1e-9


def test_rounding_costs_little_and_the_ranges_move_only_in_training(joined: Rounded) -> None:
    found = copy_of(joined)
    before = state_of(found.eval())
    found(3 * X)
    assert same(before, state_of(found))
    expected = exactly(found)(X.double())
    assert 1e-4 < float(((found(X) - expected).norm() / expected.norm()).detach()) < 0.1
    found.train()(3 * X)
    assert not same(before, state_of(found.eval()))


def test_the_file_computes_what_torch_does_with_kernels_for_integers(joined: Rounded, tmp_path: Path) -> None:
    before = state_of(joined.eval())
    file = export_int8(joined, tmp_path / "int8.onnx", X, labels=("a", "b", "c", "d"))
    assert same(before, state_of(joined))
    assert file.error < 0.02
    assert file.size == file.path.stat().st_size
    found = kernels_for(file.path)
    assert (found["QLinearConv"], found["QLinearAdd"], found["QLinearConcat"], found["QGemm"]) == (4, 1, 1, 1)
    assert not found.keys() & {"Conv", "Add", "Concat", "Gemm", "Relu", "MaxPool", "BatchNormalization"}


def test_a_backend_s_quantizer_decides_what_is_rounded() -> None:
    quantizers = pytest.importorskip("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    how = quantizers.get_default_x86_inductor_quantization_config(is_qat=True)
    found = rounded(trained(Chain()), X, quantizer=quantizers.X86InductorQuantizer().set_global(how))
    train(found)
    nodes = counts(converted(found))
    assert (nodes["conv2d"], nodes["batch_norm"]) == (2, 0)


def test_what_torch_can_not_export_is_refused() -> None:
    class Deciding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = Chain()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(x) if x.sum() > 0 else x

    with pytest.raises(ExportError, match="depends on values inside its tensors"):
        rounded(Deciding().eval(), X)


def test_a_net_that_never_had_norms_is_refused() -> None:
    with pytest.raises(InvalidInput, match="no conv of Sequential has absorbed a BatchNorm"):
        rounded(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), X)


def test_one_input_is_not_enough() -> None:
    with pytest.raises(InvalidInput, match="x has 1 inputs: give some hundred real ones"):
        rounded(Chain().eval(), X[:1])


def test_without_torchao_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(InvalidInput, match=r"pip install 'repfx\[qat\]'"):
        rounded(Chain().eval(), X)
