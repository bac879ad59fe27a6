"""The model that is exported, and the model that its file is compared with: the same, or the same before its weights are rounded."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from repfx.algebra.baking import rounded
from repfx.errors import ExportError, InvalidInput, first_line
from repfx.measuring.difference import Difference, count_numbers, differences, leaves, worst
from repfx.measuring.equivalence import TOLERANCES
from repfx.measuring.in_float64 import Inputs, as_arguments, describe, double_copy, map_tensors, run_double, seeded
from repfx.measuring.proof import prove
from repfx.onnx.program import quiet
from repfx.passes.fuse import fused_for
from repfx.records.wrappers import innermost

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.float16)
HALF = 2e-2  # allowed for float16 against float32: deep nets are off by about 1e-3
Run = tuple[Any, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Reference:
    """A fused model for export, and a model whose outputs the file must give.

    Args:
        deployed: the model that is exported, on the CPU and in eval mode.
        exact: the same model in float32 if `dtype` is float16 or float32; otherwise `deployed`.
        dtype: the dtype asked for; None keeps the model's own.
    """

    deployed: nn.Module
    exact: nn.Module
    dtype: torch.dtype | None

    @classmethod
    def of(cls, model: nn.Module, dtype: torch.dtype | None, x: Inputs) -> Reference:
        """Fuse what is inside the wrappers of a model, for calls with x, and prove on x that it computes the same.

        If a dtype is asked for, fuse in float64 and round each weight once.

        Raises:
            ExportError: a weight is too large for the dtype; EquivalenceError: the fused model computes something else.
        """
        model = innermost(model)
        if dtype is None:
            deployed = copy.deepcopy(_proven(model, x)).to(CPU).eval()
            return cls(deployed, deployed, None)
        wide = _proven(double_copy(model), x).to(CPU).eval()
        exact = copy.deepcopy(wide).to(torch.float32)
        deployed = wide._apply(lambda tensor: rounded(tensor, dtype) if tensor.is_floating_point() else tensor)
        for path, tensor in deployed.state_dict().items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise ExportError(
                    f"{path!r} is not finite in {dtype}, whose largest number is {torch.finfo(dtype).max:.0f}."
                )
        return cls(deployed, exact, dtype)

    def rounded(self, x: Inputs) -> Any:
        """Return x in the dtype that the file takes."""
        return x if self.dtype is None else _cast(x, self.dtype)

    def run(self, x: Inputs) -> dict[str, Tensor]:
        """Return the outputs that the file must give for x, by their names.

        Raises:
            InvalidInput: the model can't run on x, or outputs no numbers.
        """
        return _run(self.exact, x if self.dtype is None else _cast(x, torch.float32))

    def bound(self, tolerance: float, found: Difference, runs: Sequence[Run]) -> float:
        """Return the largest error that `found` may have."""
        if any(parameter.dtype == torch.float16 for parameter in self.deployed.parameters()):
            return max(tolerance, TOLERANCES[torch.float16] if self.dtype is None else HALF)
        if found.error <= tolerance:
            return tolerance
        rounding = max(_rounding(self.exact, *each) for each in runs)
        return max(tolerance, min(4 * rounding, 100 * tolerance))

    def rounding_throughout(self, x: Inputs, expected: Mapping[str, Tensor]) -> Difference | None:
        """Compare the outputs with those of torch when each operation rounds to float16, as on a GPU.

        The file can't show that error, because onnxruntime on a CPU computes float16 in float32. Return None for another dtype, or if
        torch has no kernels in float16 for the CPU.

        Raises:
            ExportError: a layer outputs numbers that are not finite; the first such layer is named.
        """
        if self.dtype is not torch.float16:
            return None
        with ExitStack() as stack:
            for path, module in self.deployed.named_modules():
                if not any(module.children()):
                    stack.callback(module.register_forward_hook(_watch(path)).remove)
            try:
                given = _run(self.deployed, x)
            except InvalidInput:  # the exporter has accepted this model, so torch is at fault, not the model
                return None
        return worst(differences(list(expected.values()), list(given.values())))


def _proven(model: nn.Module, x: Inputs) -> nn.Module:
    """Fuse a model, and prove on x that it computes the same, unless only the fused model takes x, such as one without a batch."""
    fused = fused_for(model, x).model
    with quiet(), suppress(InvalidInput):
        prove("fuse", model, fused, x)
    return fused


def _cast(x: Inputs, dtype: torch.dtype) -> Any:
    return map_tensors(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, x)


def _run(model: nn.Module, x: Inputs) -> dict[str, Tensor]:
    # Copied, because an in-place ReLU may write over its input.
    args, kwargs = as_arguments(map_tensors(torch.clone, x))
    try:
        with torch.no_grad(), seeded(model), quiet():
            outputs = model(*args, **kwargs)
    except ExportError:
        raise
    except Exception as error:
        raise InvalidInput(f"the model can't run on x = {describe(x)}: {first_line(error)}.") from error
    if not count_numbers(outputs):
        raise InvalidInput(f"the model gives no numbers for x = {describe(x)}, so the file could not be checked.")
    return {where: leaf for where, leaf in leaves(outputs) if isinstance(leaf, Tensor)}


def _rounding(model: nn.Module, x: Inputs, expected: Mapping[str, Tensor]) -> float:
    """Return the relative distance of torch's own outputs from those in float64; 0 if they can't be compared."""
    exact = [leaf for _, leaf in leaves(run_double(double_copy(model), x)) if isinstance(leaf, Tensor)]
    found = worst(differences(exact, list(expected.values())))
    return 0.0 if found.problem else found.error


def _watch(path: str) -> Any:
    def check(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.is_floating_point() and not output.isfinite().all():
            raise ExportError(
                f"{path!r} outputs numbers for x beyond the range of float16, ±65504: scale the inputs of this layer, or stay in float32."
            )

    return check
