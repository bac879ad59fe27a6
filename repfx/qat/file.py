"""A model trained with rounding, as an ONNX file in 8 bits.

The file is in the QDQ format, as those of `quantize_onnx` are. It has the scales that the training has found.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, fx

from repfx.errors import ExportError
from repfx.onnx.file import OnnxFile, open_session, require_packages
from repfx.onnx.free_axes import FreeAxes
from repfx.onnx.metadata import Metadata, write_metadata
from repfx.onnx.preprocessing import Preprocessing
from repfx.onnx.program import write_program
from repfx.onnx.raw_images import IMAGES, LOGITS
from repfx.qat.rounded import Rounded, converted
from repfx.records.target_file import staged

_BOUND = 0.1


@dataclass(frozen=True)
class Int8File:
    """The report of `export_int8` on the file that it wrote.

    Args:
        path: the file.
        size: bytes of the file.
        error: relative distance of outputs b of the file, computed as it says, from outputs a of the graph in torch: the root of
            Σ (a - b)² / Σ a². A number between two steps can be rounded either way, so it isn't zero.
        nodes: number of nodes of each operator.
    """

    path: Path
    size: int
    error: float
    nodes: Mapping[str, int]


def export_int8(
    model: Rounded,
    path: str | os.PathLike[str],
    x: Tensor,
    *,
    labels: Sequence[str] = (),
    preprocessing: Preprocessing | None = None,
    about: Mapping[str, str] | None = None,
) -> Int8File:
    """Write a model that was trained with rounding to an ONNX file in 8 bits, and keep it only if onnxruntime agrees with torch.

    `model` stays as it is, and can be trained on.

    Args:
        path: path that ends in ``.onnx``; its folder must exist. An older file is replaced in one step.
        x: two or more inputs. The size of the batch stays free.
        labels: names of the classes, for the file's metadata.
        preprocessing: how a raw image becomes an input, for the metadata.
        about: further keys and texts for the metadata.

    Raises:
        InvalidInput: the path can't be written.
        ExportError: the model can't be exported, or onnxruntime computes something else, or a package is missing.
    """
    with staged(path, ".onnx") as (final, staging):
        require_packages()
        graph = converted(model)
        named = bool(labels) or preprocessing is not None
        write_program(
            graph,
            x,
            staging,
            free=FreeAxes.usual(x, batch=True, size=False),
            opset=None,
            inputs=[IMAGES if named else "x"],
            outputs=[LOGITS if named else "output"],
        )
        error = _error(staging, graph, x)
        if not error <= _BOUND:
            raise ExportError(
                f"onnxruntime gives something else than torch in 8 bits: off by {error:.1%} (allowed {_BOUND:.0%})."
            )
        write_metadata(staging, Metadata(tuple(labels), preprocessing, False, dict(about or {})))
        file = OnnxFile.read(staging)
        return Int8File(final, staging.stat().st_size, error, file.nodes)


@torch.no_grad()
def _error(path: Path, graph: fx.GraphModule, x: Tensor) -> float:
    session = open_session(path, optimized=False)
    given = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]).double()
    expected = graph(x).double()
    signal, noise = float(expected.square().sum()), float((expected - given).square().sum())
    return math.sqrt(noise / signal) if signal else float(noise > 0)
