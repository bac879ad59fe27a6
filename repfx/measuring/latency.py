"""`Latency`: the seconds that a conv takes on this machine, as a cost for `repfx.fuse`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from repfx.algebra.conv_spec import ConvSpec
from repfx.algebra.cost import Shape, weights
from repfx.algebra.kernel import Kernel
from repfx.errors import InvalidInput
from repfx.measuring.cost import measure_times

Runtime = Literal["torch", "onnxruntime"]


class Latency:
    """The seconds of one conv on this machine. Each pair of sizes and input shape is measured once.

    The seconds are the least of several runs with random numbers in float32, the one that other programs disturbed least. Where the shape
    of an input isn't known, the number of weights is returned, so that the forms of one part of a model still compare.

    Args:
        runtime: runs the conv.
        device: holds the numbers, for torch.

    Raises:
        InvalidInput: there is no such runtime, or it isn't installed.

    >>> from torch import nn
    >>> latency = Latency()
    >>> latency(ConvSpec.of(nn.Conv2d(3, 8, 3)), (1, 3, 32, 32)) > 0
    True
    """

    def __init__(self, runtime: Runtime = "torch", device: str | torch.device = "cpu") -> None:
        if runtime not in ("torch", "onnxruntime"):
            raise InvalidInput(f"there is no runtime {runtime!r}: choose 'torch' or 'onnxruntime'.")
        if runtime == "onnxruntime":
            for package in ("onnx", "onnxruntime"):
                _require(package)
        self._runtime = runtime
        self._device = torch.device(device)
        self._known: dict[tuple[ConvSpec, Shape], float] = {}

    def __call__(self, conv: ConvSpec, shape: Shape | None) -> float:
        """Return the seconds of one call for an input of `shape`, ``(batch, channels, *axes)``."""
        if shape is None:
            return weights(conv)
        if (conv, shape) not in self._known:
            _let_freed_memory_be_used_again()
            x = torch.randn(shape, device=self._device)
            call = _in_torch(conv, x) if self._runtime == "torch" else _in_onnxruntime(conv, x.cpu())
            self._known[conv, shape] = min(measure_times({"conv": call}, rounds=50, limit=0.5)["conv"])
        return self._known[conv, shape]


def _let_freed_memory_be_used_again() -> None:
    """Allocate and free a large tensor on the CPU.

    Behind that, C's allocator keeps smaller ones when they are freed, as it does while a model runs. Before, it may give each of them
    back at once. Then a call that makes nothing but one tensor waits for new pages each time, for longer than a small conv takes.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8)  # a little less than 32 MiB, the most that glibc learns from


def _require(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as missing:
        raise InvalidInput(f"{package} isn't installed: pip install 'repfx[onnx]'.") from missing


def _weight(conv: ConvSpec) -> Tensor:
    return torch.randn(conv.out_channels, conv.in_channels // conv.groups, *conv.kernel_size)


def _in_torch(conv: ConvSpec, x: Tensor) -> Callable[[], Any]:
    sizes = (conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    kernel = Kernel(_weight(conv).to(x), torch.zeros(conv.out_channels).to(x), *sizes)
    return torch.no_grad()(partial(kernel, x))


def _in_onnxruntime(conv: ConvSpec, x: Tensor) -> Callable[[], Any]:
    """Build a file of one node in memory. What is cropped, and how a border is filled, is left out."""
    helper, array = _require("onnx").helper, _require("onnx").numpy_helper.from_array
    weight = _weight(conv)
    if conv.dimensions:
        node = helper.make_node("Conv", ["x", "weight", "bias"], ["y"], **_attributes(conv))
        tensors = {"weight": weight, "bias": torch.zeros(conv.out_channels)}
    else:
        node, tensors = helper.make_node("MatMul", ["x", "weight"], ["y"]), {"weight": weight.t().contiguous()}
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node],
        "conv",
        [value("x", 1, list(x.shape))],
        [value("y", 1, None)],
        [array(tensor.numpy(), name) for name, tensor in tensors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = _require("onnxruntime").InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return partial(session.run, None, {"x": x.numpy()})


def _attributes(conv: ConvSpec) -> dict[str, Any]:
    pads = [max(side, 0) for sides in zip(*conv.padding) for side in sides]
    return {"pads": pads, "strides": conv.stride, "dilations": conv.dilation, "group": conv.groups}
