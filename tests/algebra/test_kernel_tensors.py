"""The algebra as tensor functions: differentiable, of any dtype, on any device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from repfx.algebra.kernel import Kernel
from tests.algebra.test_kernel import pointwise

Operation = Callable[[Kernel, Kernel], Kernel]
OPERATIONS: dict[str, Operation] = {
    "add": lambda a, b: a.add(b),
    "sum": lambda a, b: Kernel.sum([a, b, a, b]),
    "subtract": lambda a, b: a.subtract(b),
    "compose": lambda a, b: a.compose(replace(b, groups=2, weight=b.weight[:, :1])),
    "compose pointwise": lambda a, b: pointwise(a).compose(b),
    "fold_affine": lambda a, b: a.fold_affine(b.weight.flatten()[:2], b.bias),
    "fold_affine_before": lambda a, b: a.fold_affine_before(b.weight.flatten()[:2], b.bias),
    "concat": lambda a, b: Kernel.concat([a, b]),
    "slice_channels": lambda a, b: a.slice_channels(1, 2),
    "slice_inputs": lambda a, b: a.slice_inputs(0, 1),
    "widen": lambda a, b: a.widen((1, 0), (0, 2)),
    "densify": lambda a, b: a.densify(),
    "regroup": lambda a, b: replace(a, groups=2, weight=a.weight[:, :1]).ungroup(),
    "diagonal": lambda a, b: Kernel.diagonal(a.weight.flatten()[:2], a.bias, 2),
    "identity": lambda a, b: Kernel.identity(a.weight, channels=2, dimensions=2).add(replace(b, padding=((1, 1),) * 2)),
    "average_pool": lambda a, b: Kernel.average_pool(a.weight, channels=2, kernel_size=(2, 3)).compose(b),
}


def dilated(*tensors: Tensor) -> tuple[Kernel, Kernel]:
    """Two kernels of 2 channels whose outputs are of one size: 2×2 with dilation 2, and 3×3."""
    weight, bias, weight2, bias2 = tensors
    none, ones = ((0, 0), (0, 0)), (1, 1)
    return Kernel(weight, bias, ones, none, (2, 2)), Kernel(weight2, bias2, ones, none, ones)


SHAPES = ((2, 2, 2, 2), (2,), (2, 2, 3, 3), (2,))


def results(operation: Operation, *tensors: Tensor) -> tuple[Tensor, ...]:
    kernel = operation(*dilated(*tensors))
    return tuple(tensor for tensor in (kernel.weight, kernel.bias) if tensor is not None)


@pytest.mark.parametrize("name", OPERATIONS)
def test_gradients_flow(name: str) -> None:
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in SHAPES]
    assert torch.autograd.gradcheck(lambda *drawn: results(OPERATIONS[name], *drawn), tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_the_dtype_is_kept(name: str, dtype: torch.dtype) -> None:
    made = results(OPERATIONS[name], *(torch.randn(shape, dtype=dtype) for shape in SHAPES))
    assert {tensor.dtype for tensor in made} == {dtype}


@pytest.mark.parametrize("name", OPERATIONS)
def test_shapes_are_found_on_the_meta_device(name: str) -> None:
    real = results(OPERATIONS[name], *(torch.randn(shape) for shape in SHAPES))
    meta = results(OPERATIONS[name], *(torch.randn(shape, device="meta") for shape in SHAPES))
    assert {tensor.device.type for tensor in meta} == {"meta"}
    assert [tensor.shape for tensor in meta] == [tensor.shape for tensor in real]


def test_no_operation_writes_into_its_operands() -> None:
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in SHAPES]
    before = [tensor.clone() for tensor in tensors]
    for operation in OPERATIONS.values():
        results(operation, *tensors)
    assert all(torch.equal(tensor, old) for tensor, old in zip(tensors, before))
