"""`fuse` on programs of torch.export and on graphs of ATen operators: numbers, convs that are left, and reasons."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.exported.nets import NETS, made
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves

import repfx
from repfx.exported.operators import conv_call, norm_call
from repfx.testing import TOLERANCE, relative_error

FORMS = ("program", "decomposed", "module", "decomposed module")


def exported(model: nn.Module, inputs: tuple[Any, ...], form: str = "program", **options: Any) -> Any:
    """Export a model, in one of the forms."""
    program = torch.export.export(model, inputs, **options)
    program = program.run_decompositions() if form.startswith("decomposed") else program
    return program.module() if form.endswith("module") else program


def call(program: Any) -> Callable[..., Any]:
    """Return a program as a function."""
    return program.module() if isinstance(program, ExportedProgram) else program  # type: ignore[no-any-return]


def convs_of(program: Any) -> list[fx.Node]:
    """Return the convs, without linear layers."""
    return [node for node in program.graph.nodes if (c := conv_call(node)) is not None and c.dimensions != 0]


def norms_of(program: Any) -> list[fx.Node]:
    """Return the BatchNorms."""
    return [node for node in program.graph.nodes if norm_call(node) is not None]


def assert_same(program: Any, fused: Any, inputs: tuple[Any, ...]) -> None:
    """Assert that two programs have the same outputs, in float64."""
    before, after = (tree_leaves(call(each)(*inputs)) for each in (program, fused))
    assert len(before) == len(after)
    for a, b in zip(before, after):
        assert relative_error(b, a) <= TOLERANCE if isinstance(a, Tensor) else a == b


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NETS)
def test_convs_are_merged_as_in_the_module(name: str, form: str) -> None:
    model, inputs = made(name)
    program = exported(model, inputs, form)
    fused = repfx.fuse(program)
    assert_same(program, fused, inputs)
    assert len(convs_of(fused)) == NETS[name][2]
