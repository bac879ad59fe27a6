"""Two ONNX files compared in onnxruntime: on random inputs, on a caller's, and with other sizes along the axes that are free."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from repfx.errors import ExportError, InvalidInput
from repfx.measuring.difference import Difference, differences, worst
from repfx.measuring.equivalence import TOLERANCES
from repfx.measuring.in_float64 import Inputs, describe
from repfx.onnx.file import open_session, package, runtime_reason
from repfx.onnx.free_axes import FreeAxes, tensors_of
from repfx.onnx.fusing.float64_file import run_in_float64

_SIDES = (64, 224, 32, 16, 8, 512, 1)  # sizes that are tried along free axes
_MAGNIFIED = 100  # how far a bound may rise for a net that magnifies rounding
Call: TypeAlias = Callable[[Mapping[str, Tensor]], list[Any]]
Run: TypeAlias = "tuple[tuple[Tensor, ...], list[Tensor]]"  # an input, and what the source outputs for it


@dataclass(frozen=True)
class _Input:
    """An input of a file: its name, its dtype, and the size of each axis, or the name of the size."""

    name: str
    dtype: torch.dtype
    sizes: tuple[int | str, ...]

    def random(self, sizes: Mapping[str, int]) -> Tensor:
        shape = [sizes[size] if isinstance(size, str) else size for size in self.sizes]
        if self.dtype.is_floating_point:
            return torch.randn(shape, dtype=torch.float64).to(self.dtype)
        return torch.randint(0, 256 if self.dtype == torch.uint8 else 2, shape).to(self.dtype)


@dataclass(frozen=True)
class Comparison:
    """The comparison of a file with the one that it was made from.

    Args:
        error: the worst ``max |a - b| / max |a|`` between outputs a of the source and outputs b of the result.
        bound: the largest error that is allowed.
    """

    error: float
    bound: float


def compare_files(source: Path, result: Path, example: Inputs | None, tolerance: float) -> Comparison:
    """Compare two files that should compute the same.

    Raises:
        ExportError: they don't, or the result can't be run.
        InvalidInput: the source can't be run on the example, or on inputs that are made up.
    """
    pair = _Pair(source, result, tolerance)
    runs = pair.runs(example)
    largest = worst([pair.difference(*run) for run in runs])
    bound = pair.bound(largest, runs)
    if not largest.error <= bound:
        what = largest.problem or f"worst relative difference {largest.error:.1e} (allowed {bound:.0e})"
        raise ExportError(f"the fused file gives something else than {str(source)!r}: {what} at {largest.where}.")
    return Comparison(largest.error, bound)


def input_of(path: Path) -> tuple[Tensor, ...]:
    """Return random numbers that a file takes as its inputs.

    Raises:
        InvalidInput: it can't be run on any that were tried.
    """
    return _Pair(path, path, 1.0).runs(None)[0][0]


class _Pair:
    """Two files with the same inputs."""

    def __init__(self, source: Path, result: Path, tolerance: float) -> None:
        self._source, self._result, self._tolerance = source, result, tolerance
        model = package("onnx").load(source, load_external_data=False)
        defaults = {tensor.name for tensor in model.graph.initializer}
        self._inputs = [_input(value) for value in model.graph.input if value.name not in defaults]
        dtypes = [_DTYPES.get(tensor.data_type) for tensor in model.graph.initializer]
        self._dtypes = {dtype for dtype in (*dtypes, *(each.dtype for each in self._inputs)) if dtype in TOLERANCES}
        self._random = _draws(model.graph)

    # ---- running

    @cached_property
    def _calls(self) -> tuple[Call, Call]:
        """The functions that run the source and the result, in onnxruntime if that has the operators, or else in float64."""
        try:
            return self._session(self._source), self._session(self._result)
        except Exception as error:
            if not self._dtypes & {torch.float64, torch.bfloat16}:
                raise ExportError(f"onnxruntime can't run the file: {runtime_reason(error)}.") from error
            return partial(_run_wide, self._source), partial(_run_wide, self._result)

    def _session(self, path: Path) -> Call:
        session = None if self._random else open_session(path)

        def run(feeds: Mapping[str, Tensor]) -> list[Any]:
            opened = session or open_session(_seeded(path))  # a new session draws the same numbers again
            return list(opened.run(None, {name: tensor.numpy() for name, tensor in feeds.items()}))

        return run

    def _feeds(self, x: tuple[Tensor, ...]) -> dict[str, Tensor]:
        return {each.name: tensor for each, tensor in zip(self._inputs, x)}

    def _expected(self, x: tuple[Tensor, ...]) -> list[Tensor]:
        """Return the outputs of the source; an error if they aren't all finite."""
        outputs = _tensors(self._calls[0](self._feeds(x)))
        if not all(bool(torch.isfinite(each).all()) for each in outputs if each.is_floating_point()):
            raise ArithmeticError("it outputs numbers that are not finite")
        return outputs

    def difference(self, x: tuple[Tensor, ...], expected: list[Tensor]) -> Difference:
        try:
            given = _tensors(self._calls[1](self._feeds(x)))
        except Exception as error:
            raise ExportError(
                f"onnxruntime can't run the fused file on {describe(x)}: {runtime_reason(error)}."
            ) from error
        return worst(differences(expected, given))

    def bound(self, found: Difference, runs: list[Run]) -> float:
        """Return the largest error that `found` may have: the tolerance, or four times the rounding of the source itself."""
        least = max([self._tolerance, *(TOLERANCES[dtype] for dtype in self._dtypes & {torch.float16, torch.bfloat16})])
        if found.error <= least or found.problem:
            return least
        rounding = max(self._rounding(*run) for run in runs)
        return max(least, min(4 * rounding, _MAGNIFIED * least))

    def _rounding(self, x: tuple[Tensor, ...], given: list[Tensor]) -> float:
        """Return the relative distance of the source's outputs from those in float64; 0 if it can't be run in float64."""
        try:
            exact = _tensors(_run_wide(self._source, self._feeds(x)))
        except Exception:
            return 0.0
        found = worst(differences(exact, given))
        return 0.0 if found.problem else found.error

    # ---- inputs

    def runs(self, example: Inputs | None) -> list[Run]:
        """Return inputs that the source can run on, with its outputs: the example, a random input, and one that has other sizes."""
        state = torch.random.get_rng_state()
        try:
            torch.manual_seed(0)
            first = [self._made_up()] if example is None else self._given(example)
            return [*first, *self._resized(first[-1][0])]
        finally:
            torch.random.set_rng_state(state)

    def _run(self, x: tuple[Tensor, ...]) -> Run | str:
        """Return an input with the outputs of the source, or why there are none."""
        try:
            return x, self._expected(x)
        except ExportError:
            raise
        except Exception as error:
            return runtime_reason(error)

    def _given(self, example: Inputs) -> list[Run]:
        x = self._ordered(example)
        found = self._run(x)
        if isinstance(found, str):
            raise InvalidInput(f"the file can't run on the example {describe(x)}: {found}.")
        other = self._run(tuple(torch.randn_like(each) if each.is_floating_point() else each for each in x))
        return [found] if isinstance(other, str) else [found, other]

    def _ordered(self, example: Inputs) -> tuple[Tensor, ...]:
        names = [each.name for each in self._inputs]
        if isinstance(example, Mapping):
            if set(example) != set(names):
                raise InvalidInput(f"the example has the inputs {sorted(example)}, the file has {sorted(names)}.")
            return tuple(example[name] for name in names)
        x = tuple(tensors_of(example))
        if len(x) != len(names):
            raise InvalidInput(f"the example has {len(x)} tensors, the file has the inputs {', '.join(names)}.")
        return x

    def _made_up(self) -> Run:
        why = ""
        for sizes in self._sizes():
            found = self._run(tuple(each.random(sizes) for each in self._inputs))
            if not isinstance(found, str):
                return found
            why = why or found
        raise InvalidInput(f"the file can't run on any input that was made up for it: give an example. ({why})")

    def _sizes(self) -> Iterator[dict[str, int]]:
        names = {size: axis for each in self._inputs for axis, size in enumerate(each.sizes) if isinstance(size, str)}
        for side in _SIDES if set(names.values()) - {0} else _SIDES[:1]:
            for batch in (2, 1):
                yield {name: batch if axis == 0 else side for name, axis in names.items()}

    def _resized(self, x: tuple[Tensor, ...]) -> list[Run]:
        """Return an input that differs in size along all free axes, if the source takes one."""
        free = FreeAxes(
            tuple(
                {axis: size for axis, size in enumerate(each.sizes) if isinstance(size, str)} for each in self._inputs
            )
        )
        if not free:
            return []
        for sizes in free.others(x):
            found = self._run(tuple(tensors_of(free.resized(x, sizes))))
            if not isinstance(found, str):
                return [found]
        return []


def _run_wide(path: Path, feeds: Mapping[str, Tensor]) -> list[Any]:
    wide = {name: (tensor.double() if tensor.is_floating_point() else tensor).numpy() for name, tensor in feeds.items()}
    return run_in_float64(path, wide)


def _tensors(outputs: Any) -> list[Tensor]:
    """Return the arrays of numbers in a file's outputs as tensors; texts are left out."""
    import numpy as np

    if isinstance(outputs, Mapping):
        outputs = [*outputs.values()]
    if isinstance(outputs, (list, tuple)):
        return [tensor for output in outputs for tensor in _tensors(output)]
    array = np.asarray(outputs)
    return [torch.from_numpy(np.ascontiguousarray(array).reshape(array.shape))] if array.dtype.kind in "fiub" else []


def _input(value: Any) -> _Input:
    tensor = value.type.tensor_type
    dtype = _DTYPES.get(tensor.elem_type)
    if dtype is None:
        raise ExportError(f"the fused file can't be compared: input {value.name!r} is no tensor of numbers.")
    sizes = (
        axis.dim_value if axis.HasField("dim_value") else axis.dim_param or f"{value.name}_{place}"
        for place, axis in enumerate(tensor.shape.dim)
    )
    return _Input(value.name, dtype, tuple(sizes))


_DTYPES = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
    16: torch.bfloat16,
}  # by the number of onnx


# ---- random numbers

_DRAWS = frozenset(
    ["RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial", "Dropout"]
)


def _draws(graph: Any) -> bool:
    return any(_may_draw(node) or any(map(_draws, _subgraphs(node))) for node in graph.node)


def _may_draw(node: Any) -> bool:
    drops_nothing = node.op_type == "Dropout" and len(node.input) < 3  # it has no mode
    return node.op_type in _DRAWS and not drops_nothing


def _subgraphs(node: Any) -> list[Any]:
    return [graph for attribute in node.attribute for graph in (attribute.g, *attribute.graphs) if graph.node]


def _seeded(path: Path) -> bytes:
    """Return a file in which every operator that draws random numbers has a seed, so that it draws the same in both files."""
    model = package("onnx").load(path)
    pending = [model.graph]
    while pending:
        for node in pending.pop().node:
            pending += _subgraphs(node)
            if _may_draw(node) and not any(each.name == "seed" for each in node.attribute):
                made = package("onnx").helper.make_attribute("seed", 0 if node.op_type == "Dropout" else 0.0)
                node.attribute.append(made)
    found: bytes = model.SerializeToString()
    return found
