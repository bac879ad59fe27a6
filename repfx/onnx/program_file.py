"""A model as a program of `torch.export` in a ``.pt2`` file: fused, exported, loaded again and compared before the file appears."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from repfx.errors import ExportError, InvalidInput, first_line
from repfx.measuring.difference import leaves
from repfx.measuring.in_float64 import Inputs, as_arguments, describe, map_tensors
from repfx.onnx.free_axes import AxisNames
from repfx.onnx.metadata import Metadata, origin_of
from repfx.onnx.prepared import Prepared, mismatch
from repfx.onnx.preprocessing import Preprocessing
from repfx.onnx.program import exported, quiet
from repfx.records.generators import random_state_kept
from repfx.records.module_tree import require_module
from repfx.records.target_file import staged

METADATA = "repfx.json"  # name of the extra file inside
_PRIVATE = ("stack_trace", "source_fn_stack", "from_node")  # of nodes; these name files of the machine


@dataclass(frozen=True)
class ProgramReport:
    """The report of `export_program` on the file that it wrote.

    Args:
        path: the file.
        max_error: the worst ``max |a - b| / max |a|`` between the fused model's outputs a and the loaded program's outputs b.
        tolerance: the largest `max_error` that was allowed.
        size: bytes of the file.
    """

    path: Path
    max_error: float
    tolerance: float
    size: int

    def __str__(self) -> str:
        return (
            f"{self.path} ({self.size / 1e6:.2f} MB, a program of torch.export)\n"
            f"  differs {self.max_error:.1e} from the model once it is loaded (allowed {self.tolerance:.0e})"
        )


def export_program(
    model: nn.Module,
    path: str | os.PathLike[str],
    x: Inputs,
    *,
    dynamic_batch: bool = True,
    dynamic_size: bool = False,
    dynamic_axes: AxisNames | None = None,
    dtype: torch.dtype | None = None,
    tolerance: float = 1e-4,
    labels: Sequence[str] = (),
    preprocessing: Preprocessing | None = None,
    about: Mapping[str, str] | None = None,
) -> ProgramReport:
    """Fuse a model, save it as a program of `torch.export`, and keep the file only if it gives what the model gives once it is loaded.

    The file needs no repfx: ``torch.export.load(path).module()`` is the fused model in eval mode. What is known of classes and images is in
    its extra file ``repfx.json``: ``torch.export.load(path, extra_files={"repfx.json": ""})`` fills it in. The model isn't changed.

    Args:
        model: any model; parts that can't be fused are exported as they are.
        path: path of the file, ending in ``.pt2``; its folder must exist.
        x: an example, as `export_onnx` takes it. Only its shapes are in the file.
        dynamic_batch, dynamic_size, dynamic_axes, dtype, tolerance: as in `export_onnx`.
        labels, preprocessing, about: as in `export_onnx`.

    Raises:
        InvalidInput: the path can't be written, or the model can't run on x.
        ExportError: the model can't be exported, or the loaded program computes something else.

    >>> from tempfile import TemporaryDirectory
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)).eval()
    >>> with TemporaryDirectory() as folder:
    ...     report = export_program(model, Path(folder) / "model.pt2", torch.randn(2, 3, 8, 9))
    ...     loaded = torch.export.load(report.path)
    >>> [str(node.target) for node in loaded.graph.nodes if node.op == "call_function"]
    ['aten.conv2d.default']
    """
    require_module(model)
    if not tolerance > 0:
        raise InvalidInput(f"tolerance is {tolerance}: it must be a number above 0.")
    metadata = Metadata(tuple(labels), preprocessing, False, {**origin_of(model), **(about or {})})
    with random_state_kept(model), staged(path, ".pt2") as (target, staging):
        prepared = Prepared.of(model, x, batch=dynamic_batch, size=dynamic_size, axes=dynamic_axes, dtype=dtype)
        program = exported(prepared.model, prepared.example, prepared.free)
        _keep_private(program)
        with quiet():
            torch.export.save(program, staging, extra_files={METADATA: json.dumps(metadata.keys())})
            loaded = torch.export.load(staging).module()
        found = prepared.compare(lambda x: _run(loaded, x))
        bound = prepared.bound(tolerance, found)
        if not found.error <= bound:
            raise ExportError(f"the saved program gives something else than the model: {mismatch(found, bound)}.")
        return ProgramReport(target, found.error, bound, staging.stat().st_size)


def _keep_private(program: torch.export.ExportedProgram) -> None:
    """Remove the paths of the machine and the numbers of the example from a program."""
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            for key in _PRIVATE:
                node.meta.pop(key, None)
    program.example_inputs = map_tensors(torch.zeros_like, program.example_inputs)


def _run(program: nn.Module, x: Inputs) -> list[Tensor]:
    args, kwargs = as_arguments(map_tensors(torch.clone, x))
    try:
        with torch.no_grad():
            return [leaf for _, leaf in leaves(program(*args, **kwargs)) if isinstance(leaf, Tensor)]
    except Exception as error:
        raise ExportError(f"the saved program can't run on {describe(x)}: {first_line(error)}.") from error
