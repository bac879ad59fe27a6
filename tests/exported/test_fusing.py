"""`fuse` on programs of torch.export and on graphs of ATen operators: numbers, convs that are left, and reasons."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

import repfx
from repfx.errors import EquivalenceError, InvalidInput, Refused
from repfx.exported.operators import conv_call, norm_call
from repfx.testing import TOLERANCE, randomize_batch_norm, relative_error
from tests.exported.nets import NETS, Layers, made


def exported(model: nn.Module, inputs: tuple[Any, ...], form: str = "program", **options: Any) -> Any:
    """Export a model, in one of the forms: program, module, decomposed program, decomposed module."""
    program = torch.export.export(model, inputs, **options)
    program = program.run_decompositions() if form.startswith("decomposed") else program
    return program.module() if form.endswith("module") else program


def call(program: Any) -> Callable[..., Any]:
    """Return a program as a function."""
    return program.module() if isinstance(program, ExportedProgram) else program


def convs_of(program: Any) -> list[fx.Node]:
    """Return the convs, without linear layers."""
    return [node for node in program.graph.nodes if (c := conv_call(node)) is not None and c.dimensions != 0]


def norms_of(program: Any) -> list[fx.Node]:
    """Return the BatchNorms."""
    return [node for node in program.graph.nodes if norm_call(node) is not None]


def assert_same(program: Any, fused: Any, inputs: tuple[Any, ...]) -> None:
    """Assert that two programs have the same outputs, in float64, in two calls one after another."""
    functions = [call(each) for each in (program, fused)]
    for _ in range(2):
        before, after = (tree_leaves(function(*inputs)) for function in functions)
        assert len(before) == len(after)
        for a, b in zip(before, after):
            assert relative_error(b, a) <= TOLERANCE if isinstance(a, Tensor) else a == b


def skips(program: Any) -> dict[str, str]:
    """Return the reasons of the report by path."""
    return {skip.path: skip.reason for skip in repfx.report(program).skipped}


@pytest.mark.one_in(5)
@pytest.mark.slow_one_in(8)
@pytest.mark.parametrize("form", ["program", "module"])
@pytest.mark.parametrize("name", NETS)
def test_convs_are_merged(name: str, form: str) -> None:
    model, inputs = made(name)
    program = exported(model, inputs, form)
    fused = repfx.fuse(program)
    assert_same(program, fused, inputs)
    assert len(convs_of(fused)) == NETS[name][2]


@pytest.mark.slow
@pytest.mark.slow_one_in(10)
@pytest.mark.parametrize("form", ["decomposed", "decomposed module"])
@pytest.mark.parametrize("name", sorted(NETS.keys() - {"sequence_norm"}))  # torch writes a view that fails
def test_convs_of_core_aten_are_merged(name: str, form: str) -> None:
    model, inputs = made(name)
    program = exported(model, inputs, form)
    fused = repfx.fuse(program)
    assert_same(program, fused, inputs)
    assert len(convs_of(fused)) == NETS[name][2]


def test_core_aten_stays_core_aten() -> None:
    model, inputs = made("linear")
    program = exported(model, inputs, "decomposed")
    fused = repfx.fuse(program)
    assert_same(program, fused, inputs)
    assert {str(node.target) for node in fused.graph.nodes if node.op == "call_function"} == {
        *(
            "aten.convolution.default",
            "aten.relu.default",
            "aten.mean.dim",
            "aten.permute.default",
            "aten.addmm.default",
        )
    }
    assert not norms_of(fused)


@pytest.mark.one_in(6)
@pytest.mark.parametrize(
    "name", ["branches", "one_dimension", "three_dimensions", "transposed", "cropped", "same", "written"]
)
def test_free_sizes_stay_free(name: str) -> None:
    model, (x,) = made(name)
    free = {axis: Dim.AUTO for axis in range(x.ndim) if axis != 1}
    program = exported(model, (x,), dynamic_shapes=(free,))
    fused = repfx.fuse(program)
    assert fused.range_constraints == program.range_constraints
    assert len(convs_of(fused)) == NETS[name][2]
    for more in (0, 3):
        y = torch.randn(x.shape[0] + more, x.shape[1], *(size + more for size in x.shape[2:]), dtype=x.dtype)
        assert_same(program, fused, (y,))


@pytest.mark.slow
def test_free_sizes_stay_free_in_core_aten() -> None:
    model, (x,) = made("written")
    program = exported(model, (x,), "decomposed", dynamic_shapes=(dict.fromkeys((0, 2, 3), Dim.AUTO),))
    fused = repfx.fuse(program)
    assert len(convs_of(fused)) == 1
    assert_same(program, fused, (torch.randn(5, 3, 11, 8, dtype=x.dtype),))


def test_a_graph_of_make_fx_is_fused() -> None:
    model, (x,) = made("branches")
    graph = make_fx(model)(x)
    fused = repfx.fuse(graph)
    assert_same(graph, fused, (x,))
    assert len(convs_of(fused)) == 1


# ---- what stays, and why


def test_training_mode_is_named() -> None:
    model, inputs = made("branches")
    program = exported(model.train(), inputs)
    fused = repfx.fuse(program)
    assert len(norms_of(fused)) == 2
    for path in ("n", "m"):
        assert skips(fused)[path] == "it was exported in training mode: call model.eval() before torch.export.export"
    with pytest.raises(Refused, match="exported in training mode"):
        repfx.fuse(program, strict=True)
    before, after = copies(program), copies(fused)
    assert torch.allclose(before(*inputs), after(*inputs), rtol=1e-12, atol=0)
    for name, buffer in after.named_buffers():
        assert torch.allclose(buffer, before.get_buffer(name), rtol=1e-12, atol=0), name


def copies(program: ExportedProgram) -> nn.Module:
    """Return a program as a module whose buffers change when it runs."""
    return program.module()


def test_batch_statistics_are_named() -> None:
    model, inputs = made("batch_statistics")
    assert "keeps no running statistics" in skips(repfx.fuse(exported(model, inputs)))["n"]


def test_a_conv_that_is_called_twice_is_named() -> None:
    model, inputs = made("called_twice")
    assert "called 2 times" in skips(repfx.fuse(exported(model, inputs)))["a"]


@pytest.mark.slow
def test_branches_of_cond_are_left_alone_and_named() -> None:
    class Branching(Layers):
        def __init__(self) -> None:
            super().__init__(a=nn.Conv2d(3, 4, 3), n=nn.BatchNorm2d(4), b=nn.Conv2d(4, 4, 1), m=nn.BatchNorm2d(4))

        def forward(self, x: Tensor) -> Tensor:
            y = self.n(self.a(x))
            return torch.cond(y.sum() > 0, lambda y: self.m(self.b(y)), lambda y: y * 2, (y,))  # type: ignore[no-any-return]

    model = randomize_batch_norm(Branching()).double().eval()
    x = torch.randn(2, 3, 9, 7, dtype=torch.float64)
    program = exported(model, (x,))
    fused = repfx.fuse(program)
    assert_same(program, fused, (x,))
    assert_same(program, fused, (-x,))
    assert not norms_of(fused)
    assert any("cond" in reason for reason in skips(fused).values())


def test_strides_that_a_program_reads_are_refused() -> None:
    class Strided(Layers):
        def forward(self, x: Tensor) -> Tensor:
            return torch.as_strided(self.n(self.a(x)), (2, 3), (1, 2))

    model = Strided(a=nn.Conv2d(3, 4, 3), n=nn.BatchNorm2d(4)).eval()
    with pytest.raises(InvalidInput, match="reads memory by strides"):
        repfx.fuse(exported(model, (torch.randn(2, 3, 9, 7),)))


def test_a_program_without_convs_is_refused() -> None:
    with pytest.raises(InvalidInput, match="no conv or linear layer"):
        repfx.fuse(exported(nn.ReLU(), (torch.randn(2, 3),)))


@pytest.mark.parametrize("form", ["program", "module"])
def test_other_verbs_refuse_programs_in_words(form: str) -> None:
    model, inputs = made("branches")
    program = exported(model, inputs, form)
    verbs: tuple[Callable[[Any], Any], ...] = (lambda m: repfx.expand(m, "dbb"), repfx.squeeze, repfx.restore)
    for verb in verbs:
        with pytest.raises(InvalidInput, match="give the module that it was made from"):
            verb(program)


# ---- options


def test_an_example_proves_the_fused_program(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = made("branches", torch.float32)
    for form in ("program", "module"):
        program = exported(model, inputs, form)
        assert len(convs_of(repfx.fuse(program, example=inputs))) == 1
    monkeypatch.setattr("repfx.algebra.kernel.Kernel.scaled", lambda kernel, factor: kernel)
    with pytest.raises(EquivalenceError, match="would change the model's output"):
        repfx.fuse(exported(model, inputs), example=inputs)


def test_a_cost_gets_the_shapes_of_the_program() -> None:
    shapes = set()

    def cost(conv: Any, shape: Any) -> float:
        shapes.add(shape)
        return 0.0

    model, inputs = made("branches")
    repfx.fuse(exported(model, inputs, dynamic_shapes=({0: Dim.AUTO},)), cost=cost)
    assert shapes == {(2, 3, 9, 7)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes_are_kept(dtype: torch.dtype) -> None:
    model, inputs = made("residual", dtype)
    program = exported(model, inputs)
    fused = repfx.fuse(program)
    assert {tensor.dtype for tensor in fused.state_dict.values()} == {dtype}
    a, b = (call(each)(*inputs).double() for each in (program, fused))
    assert relative_error(b, a) < 8 * torch.finfo(dtype).eps  # each of a few layers rounds once
