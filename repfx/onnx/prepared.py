"""A fused model that is ready to be written into a file, and the comparison of what a file gives with what it must give."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from repfx.errors import ExportError, InvalidInput
from repfx.measuring.difference import Difference, differences, worst
from repfx.measuring.in_float64 import Inputs, describe, map_tensors
from repfx.onnx.free_axes import AxisNames, FreeAxes
from repfx.onnx.reference import CPU, DTYPES, Reference, Run

Runner: TypeAlias = Callable[[Any], Sequence[Tensor]]  # gives the outputs of a file for an input


@dataclass(frozen=True)
class Prepared:
    """A fused model for export.

    Args:
        reference: the model, and what its file must give.
        free: axes of the input that the file leaves free.
        example: the input that is exported.
        run: the input that was given, and the outputs of the model for it.
    """

    reference: Reference
    free: FreeAxes
    example: Any
    run: Run

    @classmethod
    def of(
        cls,
        model: nn.Module,
        x: Inputs,
        *,
        batch: bool,
        size: bool,
        axes: AxisNames | None,
        dtype: torch.dtype | None,
    ) -> Prepared:
        """Fuse a model, and run it on x. The arguments are those of `export_onnx`.

        Raises:
            InvalidInput: the model can't run on x, or has no such axes.
        """
        if dtype not in (None, *DTYPES):
            raise InvalidInput(f"dtype is {dtype}: on a CPU convs run only in {' and '.join(map(str, DTYPES))}.")
        x = map_tensors(lambda tensor: tensor.detach().to(CPU, copy=True), x)
        reference = Reference.of(model, dtype, x)
        x = reference.rounded(x)
        expected = reference.run(x)
        if axes is None:
            free = FreeAxes.usual(x, batch=batch, size=size)
        else:
            free = FreeAxes.named(reference.deployed, x, axes)
        # torch.export treats a size of 1 as a constant.
        example = free.resized(x, {name: 2 for name, size in free.sizes(x).items() if size == 1})
        return cls(reference, free, example, (x, expected))

    @property
    def model(self) -> nn.Module:
        """The model that is exported."""
        return self.reference.deployed

    @property
    def outputs(self) -> Mapping[str, Tensor]:
        """The outputs of the model for the input that was given, by name."""
        return self.run[1]

    @cached_property
    def resized(self) -> Run | None:
        """An input that differs in size from the example along all free axes, and the outputs for it; None if no axis is free.

        Raises:
            ExportError: the model takes no other sizes.
        """
        return _run_resized(self.reference, self.example, self.free) if self.free else None

    def compare(self, run: Runner) -> Difference:
        """Return the worst difference between what a file gives and what it must give.

        Raises:
            ExportError: the file can't run on one of the inputs.
        """
        found = _difference(run, *self.run)
        return found if self.resized is None else worst([found, self._difference_resized(run, *self.resized)])

    def bound(self, tolerance: float, found: Difference) -> float:
        """Return the largest error that `found` may have."""
        runs = [self.run] if self.resized is None else [self.run, self.resized]
        return self.reference.bound(tolerance, found, runs)

    def _difference_resized(self, run: Runner, x: Inputs, expected: Mapping[str, Tensor]) -> Difference:
        try:
            found = _difference(run, x, expected)
        except ExportError as error:
            advice = f"it runs on x itself, so leave fewer axes free than {self.free}"
            raise ExportError(f"{str(error)[:-1]}; {advice}.") from error
        problem = found.problem and f"{found.problem} for {describe(x)}"
        return replace(found, where=f"{found.where} for {describe(x)}", problem=problem)


def mismatch(found: Difference, bound: float) -> str:
    """Say how a file differs from the model."""
    if found.problem:
        return f"{found.problem} (here 'model' means the file)"
    return f"worst relative difference {found.error:.1e} (allowed {bound:.0e}) at {found.where}"


def _difference(run: Runner, x: Inputs, expected: Mapping[str, Tensor]) -> Difference:
    return worst(differences(list(expected.values()), list(run(x))))


def _run_resized(reference: Reference, x: Inputs, free: FreeAxes) -> Run:
    """Return an input that differs in size from x along each free axis, and the outputs that the file must give for it."""
    failure = None
    for sizes in free.others(x):
        other = free.resized(x, sizes)
        try:
            return other, reference.run(other)
        except InvalidInput as error:
            failure = failure or error
    raise ExportError(
        f"the model takes no other {free} than in x, so these axes can't all be free: {failure}"
    ) from failure
