"""Signature, tensors and notes on nodes of a fused program. It works where repfx isn't."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import repfx
from repfx.testing import randomize_batch_norm
from tests.exported.nets import NETS, Layers, made
from tests.exported.test_fusing import assert_same, call, convs_of, exported


def test_the_signature_is_that_of_the_program() -> None:
    model, inputs = made("outputs")
    program = exported(model, inputs)
    fused = repfx.fuse(program)
    before, after = program.graph_signature, fused.graph_signature
    assert after.user_inputs == before.user_inputs
    assert after.user_outputs == before.user_outputs
    assert fused.call_spec == program.call_spec
    assert fused.dialect == program.dialect
    assert fused.example_inputs is program.example_inputs


def test_inputs_by_keyword_and_in_a_nesting_stay() -> None:
    class Nested(Layers):
        def forward(self, pair: dict[str, Tensor], factor: Tensor, *, plus: Tensor) -> dict[str, Tensor]:
            return {"out": self.n(self.a(pair["x"])) * factor + plus, "other": pair["y"]}

    model = randomize_batch_norm(Nested(a=nn.Conv2d(3, 4, 3), n=nn.BatchNorm2d(4))).double().eval()
    x, factor = torch.randn(2, 3, 9, 7, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64)
    args, kwargs = ({"x": x, "y": factor}, factor), {"plus": factor}
    program = torch.export.export(model, args, kwargs)
    fused = repfx.fuse(program, example={"pair": args[0], "factor": factor, "plus": factor})
    a, b = program.module()(*args, **kwargs), fused.module()(*args, **kwargs)
    assert torch.allclose(a["out"], b["out"], rtol=1e-9)
    assert list(a) == list(b)
    assert len(fused.graph_signature.parameters) == 2


def test_merged_tensors_are_gone_and_new_ones_lie_where_the_conv_was() -> None:
    model, inputs = made("branches")
    for form in ("program", "decomposed"):
        fused = repfx.fuse(exported(model, inputs, form))
        assert list(fused.state_dict) == ["a.weight", "a.bias"] == list(fused.graph_signature.parameters)
        assert all(isinstance(tensor, nn.Parameter) for tensor in fused.state_dict.values())
        assert not fused.graph_signature.buffers
    graph = repfx.fuse(exported(model, inputs, "module"))
    assert list(graph.state_dict()) == ["a.weight", "a.bias"]
    assert not {"n", "m", "b"} & set(dict(graph.named_children()))


@pytest.mark.parametrize("name", ["weight_read", "tied", "own_parameters", "counts", "changed_weight", "called_twice"])
def test_tensors_that_are_read_elsewhere_stay(name: str) -> None:
    model, inputs = made(name)
    program = exported(model, inputs)
    fused = repfx.fuse(program)
    state = {**fused.state_dict, **fused.constants}
    assert set(fused.graph_signature.parameters) | set(fused.graph_signature.buffers) <= state.keys()
    assert len(fused.graph_signature.parameters) == len({id(each) for each in fused.parameters()}) or name == "tied"
    if name == "weight_read":
        assert torch.equal(state["a.weight"], program.state_dict["a.weight"])
    if name == "own_parameters":
        assert list(state) == ["weight", "bias"]


def test_the_program_itself_stays_as_it_was() -> None:
    model, inputs = made("branches")
    for form in ("program", "module"):
        program = exported(model, inputs, form)
        text, expected = str(program.graph), call(program)(*inputs)
        fused = repfx.fuse(program)
        assert str(program.graph) == text
        with torch.no_grad():
            for tensor in fused.parameters():
                tensor.zero_()
        assert torch.equal(call(program)(*inputs), expected)


def test_a_result_shares_no_memory_with_the_program() -> None:
    model, inputs = made("called_twice")
    program = exported(model, inputs)
    fused = repfx.fuse(program)
    own = {tensor.data_ptr() for tensor in program.state_dict.values()}
    assert not own & {tensor.data_ptr() for tensor in fused.state_dict.values()}


def test_nodes_that_rules_left_alone_keep_all_they_had() -> None:
    model, inputs = made("activated")
    program = exported(model, inputs)
    fused = repfx.fuse(program)
    before = {node.name: node for node in program.graph.nodes}
    gelu = next(node for node in fused.graph.nodes if "gelu" in node.name)
    old = before[gelu.name]
    assert (gelu.target, gelu.kwargs) == (old.target, old.kwargs)
    assert {key: str(value) for key, value in gelu.meta.items()} == {key: str(value) for key, value in old.meta.items()}


def test_merged_convs_say_where_they_come_from() -> None:
    model, inputs = made("branches")
    program = exported(model, inputs, dynamic_shapes=({0: Dim.AUTO},))
    fused = repfx.fuse(program)
    (conv,) = convs_of(fused)
    old = {node.name: node for node in program.graph.nodes}
    note = conv.meta["custom"]["repfx"]
    assert note["sources"][0] == "a"
    assert set(note["sources"]) == {"a", "n", "b", "m", "q"}
    assert "fold_batch_norm" in note["rules"]
    assert conv.meta["nn_module_stack"] == old["conv2d"].meta["nn_module_stack"]
    assert conv.meta["stack_trace"] == old["conv2d"].meta["stack_trace"]
    assert str(conv.meta["val"].shape) == str(old["conv2d"].meta["val"].shape)


def test_modules_with_signatures_of_their_own_unflatten() -> None:
    class Outer(Layers):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.second(torch.relu(self.first(x))))

    parts = {
        name: nn.Sequential(nn.Conv2d(width, 4, 3), nn.BatchNorm2d(4)) for name, width in (("first", 3), ("second", 4))
    }
    model = randomize_batch_norm(Outer(**parts)).double().eval()
    x = torch.randn(2, 3, 9, 7, dtype=torch.float64)
    for preserved in ((), ("first", "second")):
        program = torch.export.export(model, (x,), preserve_module_call_signature=preserved)
        fused = repfx.fuse(program)
        assert torch.allclose(torch.export.unflatten(fused)(x), model(x), rtol=1e-9)


_RUN = """
import sys, torch
sys.modules["repfx"] = None  # importing it fails
program = torch.export.load(sys.argv[1])
inputs, expected = torch.load(sys.argv[2])
result = program.module()(*inputs)
assert (result - expected).abs().max() <= 1e-9 * expected.abs().max()
print([str(node.target) for node in program.graph.nodes if "conv" in str(node.target)])
"""


@pytest.mark.slow
def test_a_saved_program_runs_without_repfx(tmp_path: Path) -> None:
    model, inputs = made("branches")
    torch.export.save(repfx.fuse(exported(model, inputs)), tmp_path / "fused.pt2")
    torch.save((inputs, model(*inputs)), tmp_path / "numbers.pt")
    script = [sys.executable, "-c", _RUN, str(tmp_path / "fused.pt2"), str(tmp_path / "numbers.pt")]
    done = subprocess.run(script, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['aten.conv2d.default']"


@pytest.mark.slow
@pytest.mark.slow_one_in(5)
@pytest.mark.parametrize("name", sorted(NETS.keys()))
def test_every_program_is_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model, inputs = made(name)
    fused = repfx.fuse(exported(model, inputs))
    torch.export.save(fused, tmp_path / "fused.pt2")
    assert_same(fused, torch.export.load(tmp_path / "fused.pt2"), inputs)


def test_a_fused_program_can_be_fused_again_and_decomposed() -> None:
    model, inputs = made("branches")
    fused = repfx.fuse(exported(model, inputs))
    again = repfx.fuse(fused)
    assert not repfx.report(again).applied
    assert_same(fused, again, inputs)


@pytest.mark.slow
def test_compilers_take_a_fused_program(tmp_path: Path) -> None:
    model, inputs = made("branches", torch.float32)
    fused = repfx.fuse(exported(model, inputs))
    expected = fused.module()(*inputs)
    compiled: Any = torch.compile(fused.module())
    assert torch.allclose(compiled(*inputs), expected, rtol=1e-4, atol=1e-5)
    package = torch._inductor.aoti_compile_and_package(fused, package_path=str(tmp_path / "fused.pt2"))
    loaded: Any = torch._inductor.aoti_load_package(package)
    assert torch.allclose(loaded(*inputs), expected, rtol=1e-4, atol=1e-5)
