"""`fuse_onnx`: an ONNX file fused by the rules that fuse models, and compared with the original before the new file appears."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from repfx.errors import ExportError, InvalidInput, first_line
from repfx.measuring.in_float64 import Inputs
from repfx.onnx.file import OnnxFile, Value, package, require_packages
from repfx.onnx.fusing.file_comparison import compare_files
from repfx.onnx.fusing.lowering import lower
from repfx.onnx.fusing.raising import Raised, graphs_of, raise_file
from repfx.records.report import Edit, Skip
from repfx.records.target_file import staged
from repfx.rewriting.editor import Editor
from repfx.rewriting.explanation import all_that_stays
from repfx.rewriting.pipeline import run_rules
from repfx.rewriting.rule import RULES
from repfx.tracing.trace import Island

_NEEDS = ("onnx", "onnx_ir", "onnxruntime")
_CONVS = ("Conv", "ConvTranspose")
_LINEAR = ("Gemm", "MatMul")
_QUANTIZED = (
    "QuantizeLinear",
    "DequantizeLinear",
    "DynamicQuantizeLinear",
    "ConvInteger",
    "MatMulInteger",
    "QLinear",
    "QAttention",
    "QGemm",
)
_SMALL = 1 << 10  # bytes of a new weight that stays in the file although other weights lie beside it


@dataclass(frozen=True)
class FileFusion:
    """The changes that fusing makes in an ONNX file.

    Args:
        nodes_before: number of nodes of each operator in the source.
        nodes: number of nodes of each operator when it is fused.
        applied: the rules that were applied, with the names of the nodes.
        stays: convs and BatchNormalizations that are left, and why.
    """

    source: Path
    nodes_before: Mapping[str, int]
    nodes: Mapping[str, int]
    applied: tuple[Edit, ...]
    stays: tuple[Skip, ...]

    @property
    def convs_before(self) -> int:
        """The number of convs in the source."""
        return _convs(self.nodes_before)

    @property
    def convs(self) -> int:
        """The number of convs when it is fused."""
        return _convs(self.nodes)

    def __str__(self) -> str:
        names = sorted({*self.nodes_before, *self.nodes}, key=lambda name: -self.nodes_before.get(name, 0))
        counts = [
            f"{self.nodes_before.get(name, 0)} → {self.nodes.get(name, 0)} {name}"
            for name in names
            if self.nodes_before.get(name, 0) != self.nodes.get(name, 0)
        ]
        total = f"{sum(self.nodes_before.values())} → {sum(self.nodes.values())} nodes"
        rules = ", ".join(f"{count} {rule}" for rule, count in Counter(edit.rule for edit in self.applied).items())
        return "\n".join([f"  nodes   {', '.join([total, *counts])}", f"  rules   {rules or 'none applies'}"])


@dataclass(frozen=True)
class FileReport(FileFusion):
    """The report of `fuse_onnx` on the file that it wrote.

    Args:
        path: the file.
        max_error: the worst ``max |a - b| / max |a|`` between outputs a of the source and outputs b of the file.
        tolerance: the largest `max_error` that was allowed.
        opset: version of ONNX's operators.
        inputs: inputs of the file.
        outputs: outputs of the file.
        size: bytes of the file, including weights stored beside it.
    """

    path: Path
    max_error: float
    tolerance: float
    opset: int
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    size: int

    def __str__(self) -> str:
        return "\n".join(
            [
                f"{self.path} ({self.size / 1e6:.2f} MB, opset {self.opset})",
                f"  takes   {'; '.join(map(str, self.inputs))}",
                f"  gives   {'; '.join(map(str, self.outputs))}",
                super().__str__(),
                f"  differs {self.max_error:.1e} from {str(self.source)!r} (allowed {self.tolerance:.0e})",
            ]
        )


def fuse_onnx(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    example: Inputs | None = None,
    *,
    tolerance: float = 1e-4,
) -> FileReport:
    """Fuse an ONNX file, by the rules of `fuse`, and keep the new file only if it computes in onnxruntime what the old one does.

    Nodes that no rule merges stay as they are, and so do names, metadata, functions and control flow. The files are compared on
    random inputs, on `example` if it is given, and with other sizes along the axes that the file leaves free. The file appears at
    `path`, which may be `source`, only after all of this has passed, in one step.

    Args:
        source: an ONNX file, exported in eval mode. Its weights may lie in a file beside it; then those of the new file do, too.
        path: path of the new file, ending in ``.onnx``; its folder must exist.
        example: input of the file: a tensor, a tuple of tensors in the order of the inputs, or a dict by their names.
        tolerance: allowed ``max |a - b| / max |a|`` for each output a of the source. Where it is not enough, the bound is four
            times the distance of the source's own output from the output in float64, up to a hundred times the tolerance. A file in
            float16 is allowed at least 1e-1, as in `check_equivalent`.

    Raises:
        InvalidInput: the path can't be written, the source can't be read, is quantized, holds nothing to fuse, or can't run.
        ExportError: the new file computes something else, or a package is missing (``pip install 'repfx[onnx]'``).
    """
    if not tolerance > 0:
        raise InvalidInput(f"tolerance is {tolerance}: it must be a number above 0.")
    require_packages("fusing a file", _NEEDS)
    origin = _source(source)
    with staged(path, ".onnx") as (target, staging):
        model, fusion = fused_model(origin)
        save_model(model, staging, origin)
        file = OnnxFile.read(staging)
        compared = compare_files(origin, staging, example, tolerance)
        size = sum(each.stat().st_size for each in staging.parent.iterdir())
    found = {name: getattr(fusion, name) for name in FileFusion.__dataclass_fields__}
    return FileReport(
        **found,
        path=target,
        max_error=compared.error,
        tolerance=compared.bound,
        opset=file.opset,
        inputs=file.inputs,
        outputs=file.outputs,
        size=size,
    )


def plan_fusion(source: str | os.PathLike[str]) -> FileFusion:
    """Return what `fuse_onnx` would change in a file, without writing or comparing anything.

    Raises:
        InvalidInput: as `fuse_onnx`.
    """
    require_packages("fusing a file", _NEEDS)
    return fused_model(_source(source))[1]


@torch.inference_mode(False)
def fused_model(source: Path) -> tuple[Any, FileFusion]:
    """Return a file's model, fused, and what was changed."""
    model = _load(source)
    before = Counter(node.op_type for node in model.graph)
    raised = raise_file(model, source)
    editor = Editor(raised.view(), Island("", raised.graph))
    near_misses = run_rules(editor, tuple(RULES.values()))
    stays = (*all_that_stays(editor, near_misses), *(Skip(title, why) for title, why in raised.opaque.items()))
    lower(raised, editor)
    after = Counter(node.op_type for node in model.graph)
    edits = tuple(_edit(edit, raised) for edit in editor.edits)
    skips = tuple(_skip(skip, raised) for skip in stays)
    return model, FileFusion(source, dict(before), dict(after), edits, skips)


def _edit(edit: Edit, raised: Raised) -> Edit:
    titles = raised.titles
    return Edit(edit.rule, titles.get(edit.path, edit.path), tuple(titles.get(each, each) for each in edit.sources))


def _skip(skip: Skip, raised: Raised) -> Skip:
    return replace(skip, path=raised.titles.get(skip.path, skip.path), reason=raised.told(skip.reason))


def _convs(nodes: Mapping[str, int]) -> int:
    return sum(nodes.get(name, 0) for name in _CONVS)


# ---- reading


def _source(path: str | os.PathLike[str]) -> Path:
    found = Path(path)
    if not found.is_file():
        raise InvalidInput(f"there is no file {str(path)!r}.")
    return found.resolve()


def _load(path: Path) -> Any:
    """Read a file and refuse what can't be fused.

    Raises:
        InvalidInput: the file isn't valid, is quantized, holds what onnx_ir would lose, or has nothing to fuse.
    """
    try:
        OnnxFile.read(path)
        model = package("onnx_ir").load(path)
        proto = package("onnx").load(path, load_external_data=False)
    except ExportError as error:
        raise InvalidInput(f"{str(path)!r} can't be read: {error}") from error
    except Exception as error:
        raise InvalidInput(f"{str(path)!r} can't be read as an ONNX file: {first_line(error)}.") from error
    if proto.training_info or proto.graph.sparse_initializer:
        what = "training information" if proto.training_info else "sparse initializers"
        raise InvalidInput(f"{str(path)!r} holds {what}, which would be lost: fuse the file before that is added.")
    found = {node.op_type for graph in (model.graph, *model.functions.values()) for node in _all_nodes(graph)}
    quantized = min((name for name in found if name.startswith(_QUANTIZED)), default=None)
    if quantized is not None:
        raise InvalidInput(
            f"{str(path)!r} is quantized ({quantized}), and merged weights would need other scales: fuse the file before quantizing it."
        )
    if not found & {*_CONVS, *_LINEAR}:
        raise InvalidInput(f"{str(path)!r} has no conv or linear layer, so there is nothing to fuse.")
    return model


def _all_nodes(graph: Any) -> Iterator[Any]:
    for node in graph:
        yield node
        for inner in graphs_of(node):
            yield from _all_nodes(inner)


# ---- writing


def save_model(model: Any, staging: Path, source: Path) -> None:
    """Write a model. If weights of the source lie beside it, they and large new ones lie beside the new file."""
    ir = package("onnx_ir")
    external = ir.ExternalTensor
    for node in _all_nodes(model.graph):
        for attribute in list(node.attributes.values()):
            if attribute.type == ir.AttributeType.TENSOR and isinstance(attribute.value, external):
                inside = ir.Tensor(attribute.value.numpy().copy(), name=attribute.value.name)
                node.attributes[attribute.name] = ir.AttrTensor(attribute.name, inside)
    values = [value for graph in _all_graphs(model.graph) for value in graph.initializers.values()]
    outside = [value for value in values if isinstance(value.const_value, external)]
    if outside:
        new = [value for value in values if _is_new(value) and value.const_value.nbytes >= _SMALL]
        name = _free_name(f"{staging.name}.data", source, outside)
        moved = [*outside, *new]
        tensors = ir.external_data.convert_tensors_to_external(
            [value.const_value for value in moved], staging.parent, name
        )
        for value, tensor in zip(moved, tensors):
            value.const_value = tensor
    onnx = package("onnx")
    proto = ir.to_proto(model)
    _forget_other_notes(proto.graph, set(_noted(onnx.load(source, load_external_data=False).graph)))
    onnx.save(proto, staging)


def _noted(graph: Any) -> Iterator[str]:
    """Yield the names of the values whose shape a graph and its subgraphs note."""
    yield from (value.name for value in graph.value_info)
    for inner in _subgraphs(graph):
        yield from _noted(inner)


def _forget_other_notes(graph: Any, names: Collection[str]) -> None:
    """Delete the notes on shapes that the source doesn't have. onnx_ir adds one for each initializer."""
    kept = [value for value in graph.value_info if value.name in names]
    del graph.value_info[:]
    graph.value_info.extend(kept)
    for inner in _subgraphs(graph):
        _forget_other_notes(inner, names)


def _subgraphs(graph: Any) -> list[Any]:
    attributes = [attribute for node in graph.node for attribute in node.attribute]
    return [inner for attribute in attributes for inner in (attribute.g, *attribute.graphs) if inner.node]


def _is_new(value: Any) -> bool:
    return isinstance(value.const_value, package("onnx_ir.tensor_adapters").TorchTensor)


def _all_graphs(graph: Any) -> Iterator[Any]:
    yield graph
    for node in graph:
        for inner in graphs_of(node):
            yield from _all_graphs(inner)


def _free_name(name: str, source: Path, outside: list[Any]) -> str:
    """Return the name of the weights' file. It isn't that of the source's, which the source needs until it is replaced."""
    taken = {Path(value.const_value.location).name for value in outside}
    return next(found for found in (name, *(f"{name}.{number}" for number in range(1, 10**6))) if found not in taken)
