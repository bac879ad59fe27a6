"""Prepare a model for quantization-aware training: fused, with its BatchNorms restored, and rounding its numbers to 8 bits.

Rounding has no useful gradient, so it is ignored in the backward pass (Jacob et al., "Quantization and Training of Neural Networks for
Efficient Integer-Arithmetic-Only Inference", CVPR 2018, section 3). A conv is rounded as it will be in the file: after its BatchNorm is
folded in. An expanded model can't be prepared like this, because each branch would be rounded by itself, and the rounded branches don't
add up to one rounded conv. A fused model has nothing left that keeps its activations in range while it is trained. `restore` gives it
one BatchNorm for each conv, and the function stays what it was.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from repfx.errors import InvalidInput
from repfx.onnx.free_axes import FreeAxes
from repfx.onnx.program import exported, quiet
from repfx.passes.fuse import fuse
from repfx.passes.restore import restore
from repfx.qat.folding import fold_norms
from repfx.records.notes import copy_of

_AT_ONCE = 32  # inputs in a batch
_EPS = 1e-5  # of every BatchNorm in the graphs that torchao writes
_BATCH_NORM, _DROPOUT = torch.ops.aten.batch_norm.default, torch.ops.aten.dropout.default
_MODE_AT = {_BATCH_NORM: 5, _DROPOUT: 2}  # the argument that says whether a node is in training mode


class Rounded(nn.Module):
    """A model that rounds its weights and activations to 8 bits in the forward pass.

    In training mode it also follows the ranges of all tensors that it rounds. In eval mode it keeps them.

    Args:
        graph: graph that torchao has prepared.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, x: Tensor) -> Any:
        """Return the outputs of the model, computed with rounded numbers."""
        return self.graph(x)

    def train(self, mode: bool = True) -> Rounded:
        """Set training mode, or eval mode, in the graph too, whose nodes hold their mode as an argument."""
        from torchao.quantization.pt2e import disable_observer, enable_observer

        self.training = mode
        self.graph.apply(enable_observer if mode else disable_observer)
        for node in self.graph.graph.nodes:
            if node.target in _MODE_AT:
                node.update_arg(_MODE_AT[node.target], mode)
        self.graph.recompile()
        return self


def rounded(model: nn.Module, x: Tensor, *, quantizer: Any = None) -> Rounded:
    """Return a model that computes in 8 bits and can be trained: fused, with a BatchNorm for each conv that had absorbed one.

    The result is in training mode. It has parameters of its own, so make the optimizer after it. A learning rate of about a hundredth of
    the training's is usual. BatchNorms and dropout have their two modes; whatever else the model does in training mode alone, such as
    stochastic depth, it does no more. `model` stays as it is.

    Args:
        model: the trained model, in its training form or fused.
        x: some hundred real inputs, on the model's device. The statistics of the BatchNorms and the ranges of activations begin with
            theirs. The size of the batch stays free.
        quantizer: quantizer of torchao that says where numbers are rounded; None rounds where the files of `quantize_onnx` do.

    Raises:
        InvalidInput: x is one input alone, torchao is missing (``pip install 'repfx[qat]'``), or no conv has absorbed a BatchNorm: then
            give what `restore(model, sites=…, calibrate=…)` returns.
        ExportError: `torch.export` can't follow the model.
    """
    if len(x) < 2:
        raise InvalidInput(f"x has {len(x)} inputs: give some hundred real ones, since ranges begin with theirs.")
    require_torchao()
    from torchao.quantization.pt2e import enable_observer
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e

    from repfx.qat.quantizer import FileQuantizer

    parts = x.split(_AT_ONCE)
    restored = restore(fuse(copy_of(model).eval()), calibrate=parts)
    for module in restored.modules():
        _set_eps(module)
    program = exported(restored.eval(), parts[0], FreeAxes.usual(x, batch=True, size=False))
    with quiet():
        graph = prepare_qat_pt2e(program.module(), FileQuantizer() if quantizer is None else quantizer)
    found = Rounded(graph).eval()
    graph.apply(enable_observer)
    with torch.no_grad():
        for part in parts:
            found(part)
    return found.train()


def converted(model: Rounded) -> fx.GraphModule:
    """Return the graph in eval mode with its weights as integers, as ExecuTorch, AOTInductor and `torch.export.save` take it.

    `model` stays as it is.
    """
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

    graph = copy_of(model).eval().graph
    fold_norms(graph)
    with quiet():
        result: fx.GraphModule = convert_pt2e(graph)
    return result


def require_torchao() -> None:
    """Raise if torchao can't be imported.

    Raises:
        InvalidInput: it can't.
    """
    try:
        with quiet():
            import torchao  # noqa: F401
    except ImportError as error:
        raise InvalidInput("quantization-aware training needs torchao: pip install 'repfx[qat]'.") from error


def _set_eps(module: nn.Module) -> None:
    """Move the difference between a BatchNorm's eps and that of torchao into its running variance."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.eps != _EPS and module.running_var is not None:
        module.running_var.add_(module.eps - _EPS).clamp_(min=0)
        module.eps = _EPS
