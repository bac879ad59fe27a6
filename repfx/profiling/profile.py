"""`profile`: where the time of a model goes, layer by layer, before and after fusing, in torch or in onnxruntime."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from repfx.algebra.layers import is_conv
from repfx.errors import InvalidInput, UnknownName, first_line
from repfx.measuring.in_float64 import Inputs, as_arguments, describe, map_tensors
from repfx.onnx.file import OnnxFile, require_packages
from repfx.onnx.free_axes import FreeAxes, tensors_of
from repfx.onnx.fusing.file_comparison import input_of
from repfx.onnx.fusing.fuse_file import fuse_onnx
from repfx.onnx.program import write_program
from repfx.passes.fuse import fused_for
from repfx.profiling.layer_times import Work, layer_times
from repfx.profiling.machine import Machine
from repfx.profiling.node_times import Feeds, node_times, operators
from repfx.profiling.timing import Timing, total
from repfx.records.generators import random_state_kept
from repfx.records.module_tree import require_module
from repfx.records.notes import copy_of
from repfx.records.report import Edit, Skip
from repfx.records.wrappers import innermost

Runtime: TypeAlias = Literal["torch", "onnxruntime"]
RUNTIMES = ("torch", "onnxruntime")
BETWEEN = "(code between layers)"
_GAINS = 0.95  # a layer that takes more than this part of the time it took has gained nothing


@dataclass(frozen=True)
class Row:
    """A layer of the fused model.

    Args:
        path: its path; `BETWEEN` for all code outside of layers, such as sums.
        layer: what it is, such as ``Conv2d 3×3, 64 → 64``.
        merged: number of layers that it was made from, with itself.
        before: time of all that it was made from; None if it is new.
        after: its time; None if nothing is left of it.
        work: multiply-adds and bytes moved, as far as they are known.
        limit: the lower roof of the machine for it: ``arithmetic`` or ``memory``; empty if the work isn't known.
        reason: why a conv or BatchNorm of the model is still there, if nothing was merged into it.
    """

    path: str
    layer: str
    merged: int
    before: Timing | None
    after: Timing | None
    work: Work | None = None
    limit: str = ""
    reason: str = ""

    @property
    def longest(self) -> float:
        """The seconds before or after fusing, whichever are more."""
        return max(timing.median for timing in (self.before, self.after) if timing is not None)

    @property
    def gains(self) -> bool:
        """Whether fusing made it quicker."""
        return (
            self.before is not None and (0.0 if self.after is None else self.after.median) < _GAINS * self.before.median
        )


@dataclass(frozen=True)
class Profile:
    """The time of a model before and after fusing.

    Args:
        runtime: what ran it.
        before, after: the time of a whole run, measured apart from the rows.
        rows: the layers of the fused model, those that take the most time first.
        machine: the roof of the machine.
    """

    runtime: str
    before: Timing
    after: Timing
    rows: tuple[Row, ...]
    machine: Machine

    @property
    def speed_up(self) -> float:
        """How many times as quick the fused model is."""
        return self.before.median / self.after.median

    @property
    def sum_after(self) -> float:
        """The seconds of all rows together after fusing."""
        return total(row.after for row in self.rows if row.after is not None).median

    @property
    def sum_before(self) -> float:
        """The seconds of all rows together before fusing."""
        return total(row.before for row in self.rows if row.before is not None).median

    def share_of(self, rows: Iterable[Row]) -> float:
        """Return the part of the time after fusing that some rows take."""
        return sum(row.after.median for row in rows if row.after is not None) / self.sum_after

    def __str__(self) -> str:
        lines = [f"{self.before} → {self.after} in {self.runtime}: {self.speed_up:.2f} times as quick"]
        for row in self.rows[:10]:
            times = " → ".join("–" if timing is None else str(timing) for timing in (row.before, row.after))
            lines.append(f"  {row.path or '(the model)'}: {row.layer}, {times}")
        return "\n".join(lines)


def profile(model: nn.Module, x: Inputs, *, runtime: Runtime = "torch", rounds: int = 20) -> Profile:
    """Measure each layer of a model on one input in eval mode, before and after fusing, side by side.

    The two forms take turns, so that both see the same state of the machine. A layer's time is its own: that of modules inside it counts
    for these. In torch, hooks measure it. In onnxruntime its own profiler does, and what the runtime merges counts for the conv.
    Layers are matched by what `fuse` made them from. The model isn't changed.

    Args:
        model: any model, with or without branches.
        x: an example: a tensor, a tuple of positional inputs, a dict of keyword inputs, or a list that is one input.
        runtime: ``torch`` or ``onnxruntime``; the latter runs files that torch exports from both forms, on the CPU.
        rounds: number of runs that count.

    Raises:
        InvalidInput: the model can't run on x; ExportError: it can't be exported.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    >>> found = profile(model, torch.randn(1, 3, 16, 16), rounds=2)
    >>> sorted((row.path, row.merged) for row in found.rows if row.layer.startswith("Conv"))
    [('0', 2)]
    """
    require_module(model)
    if runtime not in RUNTIMES:
        raise UnknownName("runtime", runtime, RUNTIMES)
    if rounds < 1:
        raise InvalidInput(f"rounds is {rounds}: at least one run must count.")
    with random_state_kept(model):
        before = copy_of(innermost(model)).eval()
        _try(before, x)
        fused = fused_for(before, x)
        after = fused.model.eval()
        tensor = next(iter(tensors_of(x)), torch.zeros(()))
        machine = Machine.measured(torch.float32, tensor.device)
        forms = {"before": before, "after": after}
        measured = layer_times(forms, x, rounds=rounds if runtime == "torch" else 1)
        described = {path: _described(after.get_submodule(path)) for path in measured["after"].work}
        groups = _Groups.of(described, fused.report.applied, fused.report.stays)
        times: dict[str, tuple[Timing, Mapping[str, Timing]]]
        if runtime == "torch":
            times = {name: (found.whole, found.own) for name, found in measured.items()}
        else:
            times = _in_onnxruntime(forms, map_tensors(lambda tensor: tensor.cpu(), x), rounds)
    rows = groups.rows(times["before"][1], times["after"][1], measured["after"].work, machine)
    return Profile(runtime, times["before"][0], times["after"][0], rows, machine)


def profile_onnx(path: str | os.PathLike[str], x: Inputs | None = None, *, rounds: int = 20) -> Profile:
    """Measure each node of an ONNX file in onnxruntime, before and after `fuse_onnx`, side by side. The file isn't changed.

    Args:
        path: an ONNX file, exported in eval mode.
        x: input of the file: a tensor, a tuple in the order of the inputs, or a dict by their names. None makes one up.
        rounds: number of runs that count.

    Raises:
        InvalidInput: the file can't be read, is quantized, holds nothing to fuse, or can't run on x.
        ExportError: a package is missing, or the fused file computes something else.
    """
    with TemporaryDirectory() as folder:
        fused = fuse_onnx(path, Path(folder) / "fused.onnx", x)
        tensors: Any = input_of(Path(path)) if x is None else map_tensors(lambda tensor: tensor.cpu(), x)
        files = {"before": Path(path), "after": fused.path}
        feeds = {name: _feeds(file, tensors) for name, file in files.items()}
        found = node_times(files, feeds, rounds=rounds)
        groups = _Groups.of(operators(fused.path), fused.applied, fused.stays)
    machine = Machine.measured()
    rows = groups.rows(found["before"].own, found["after"].own, {}, machine)
    return Profile("onnxruntime", found["before"].whole, found["after"].whole, rows, machine)


def _try(model: nn.Module, x: Inputs) -> None:
    args, kwargs = as_arguments(map_tensors(torch.clone, x))
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    except Exception as error:
        raise InvalidInput(f"the model can't run on x = {describe(x)}: {first_line(error)}.") from error


def _in_onnxruntime(
    models: Mapping[str, nn.Module], x: Inputs, rounds: int
) -> dict[str, tuple[Timing, Mapping[str, Timing]]]:
    """Measure exported files, and give each node's time to the path that it was exported from."""
    require_packages("profiling in onnxruntime")
    with TemporaryDirectory() as folder:
        files: dict[str, Path] = {}
        feeds: dict[str, Feeds] = {}
        for name, model in models.items():
            files[name] = Path(folder) / f"{name}.onnx"
            write_program(model.cpu(), x, files[name], free=FreeAxes(), opset=None, outputs=None)
            feeds[name] = _feeds(files[name], x)
        found = node_times(files, feeds, rounds=rounds)
    result: dict[str, tuple[Timing, Mapping[str, Timing]]] = {}
    for name, nodes in found.items():
        by_path: dict[str, list[Timing]] = {}
        for node, timing in nodes.own.items():
            by_path.setdefault(nodes.paths.get(node, ""), []).append(timing)
        result[name] = nodes.whole, {path: total(timings) for path, timings in by_path.items()}
    return result


def _feeds(path: Path, x: Inputs) -> Feeds:
    if isinstance(x, Mapping):
        return {name: tensor.numpy() for name, tensor in x.items()}
    names = [value.name for value in OnnxFile.read(path).inputs]
    return {name: tensor.numpy() for name, tensor in zip(names, tensors_of(x), strict=True)}


@dataclass(frozen=True)
class _Groups:
    """Which layer of the fused form each layer belongs to.

    Args:
        layers: what each layer of the fused form is, by path.
        targets: where each layer that was merged has gone.
        sources: the layers that each one was made from, if it was made from several.
        stays: why layers are still there.
    """

    layers: Mapping[str, str]
    targets: Mapping[str, str]
    sources: Mapping[str, set[str]]
    stays: Mapping[str, str]

    @classmethod
    def of(cls, layers: Mapping[str, str], edits: Iterable[Edit], stays: Iterable[Skip]) -> _Groups:
        """Group by what `fuse` says that it has done."""
        edits = tuple(edits)
        targets = {source: edit.path for edit in edits for source in edit.sources if source != edit.path}
        found = cls(layers, targets, {}, {skip.path: skip.reason for skip in stays})
        sources: dict[str, set[str]] = {}
        for edit in edits:
            sources.setdefault(found.of_path(edit.path), set()).update(edit.sources)
        return replace(found, sources=sources)

    def of_path(self, path: str) -> str:
        """Return the path of the layer that a module of the model, or of the fused one, belongs to."""
        seen = {path}
        while path in self.targets and self.targets[path] not in seen:
            path = self.targets[path]
            seen.add(path)
        while path not in self.layers and path:
            path = path.rpartition(".")[0]
        return path if path in self.layers else BETWEEN

    def rows(
        self, before: Mapping[str, Timing], after: Mapping[str, Timing], work: Mapping[str, Work], machine: Machine
    ) -> tuple[Row, ...]:
        """Return the rows, those that take the most time first."""
        old, new = self._summed(before), self._summed(after)
        rows = []
        for path in dict.fromkeys([*new, *old]):
            merged = max(1, len(self.sources.get(path, ())))
            limit = machine.limit(work[path]) if path in work else ""
            reason = self.stays.get(path, "") if merged == 1 else ""
            layer = self.layers.get(path, "")
            rows.append(Row(path, layer, merged, old.get(path), new.get(path), work.get(path), limit, reason))
        return tuple(sorted(rows, key=lambda row: row.longest, reverse=True))

    def _summed(self, times: Mapping[str, Timing]) -> dict[str, Timing]:
        found: dict[str, list[Timing]] = {}
        for path, timing in times.items():
            found.setdefault(self.of_path(path), []).append(timing)
        return {path: total(timings) for path, timings in found.items()}


def _described(module: nn.Module) -> str:
    name = type(module).__name__
    if is_conv(module):
        conv: Any = module
        window = "×".join(map(str, conv.kernel_size))
        groups = f", {conv.groups} groups" if conv.groups > 1 else ""
        return f"{name} {window}, {conv.in_channels} → {conv.out_channels}{groups}"
    if isinstance(module, nn.Linear):
        return f"{name}, {module.in_features} → {module.out_features}"
    return name
