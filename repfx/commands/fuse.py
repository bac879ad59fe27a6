"""`repfx fuse`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor, nn

import repfx
from repfx.commands.app import command
from repfx.commands.arguments import (
    Classes,
    DataOptions,
    InputShape,
    Model,
    Options,
    Trust,
    Weights,
    example_input,
    load_model,
    parse_options,
    shape_of_input,
)
from repfx.commands.names import data_names
from repfx.commands.onnx_file import fuse_file, is_onnx_file
from repfx.commands.output import Json, print_json
from repfx.commands.progress import busy
from repfx.commands.tables import fusion_table, quantization_table
from repfx.data.dataset import DataSource
from repfx.data.predictions import labels_of_logits
from repfx.data.samples import samples
from repfx.errors import InvalidInput, UnknownName
from repfx.measuring.equivalence import EquivalenceReport
from repfx.onnx.export import ExportReport, export_onnx
from repfx.onnx.program_file import ProgramReport, export_program
from repfx.onnx.quantization_report import QuantizationReport
from repfx.onnx.quantize import METHODS, quantize_onnx
from repfx.passes.equalize import equalize
from repfx.records.journal import journal, to_json
from repfx.records.target_file import staged
from repfx.training.models import ModelReference
from repfx.training.run_folder import Setup

_ALSO = ("pt2",)
_GROUPS = {
    "Model": ("weights", "num_classes", "option", "input_shape", "trust", "plugin"),
    "Files": ("onnx", "also", "opset", "batch_size", "dynamic_size", "fp16", "raw_images", "probabilities", "as_json"),
    "8 bits": (
        "int8",
        "data",
        "data_option",
        "root",
        "calibration",
        "calibration_images",
        "per_tensor",
        "reduce_range",
        "keep_float",
        "equalized",
        "bound",
    ),
}


@command("fuse", groups=_GROUPS)
def fuse(
    model: Model,
    onnx: Annotated[Path, typer.Option("--onnx", "-o", help="The ONNX file to write.", show_default=False)],
    weights: Weights = None,
    num_classes: Classes = None,
    option: Options = None,
    input_shape: InputShape = None,
    opset: Annotated[
        int | None, typer.Option(help="Version of ONNX's operators, 13 or later.", show_default="torch's")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Let the file take batches of this size only.", show_default="any")
    ] = None,
    dynamic_size: Annotated[
        bool, typer.Option("--dynamic-size", help="Let the file take images of any height and width.")
    ] = False,
    fp16: Annotated[bool, typer.Option("--fp16", help="Store weights, inputs and outputs in float16.")] = False,
    int8: Annotated[
        bool, typer.Option("--int8", help="Quantize weights and activations to 8 bits; needs --data.")
    ] = False,
    data: Annotated[
        str | None,
        typer.Option(
            help="With --int8: the data, as --data of repfx train takes it. Ranges are measured on training images, accuracy on test "
            "images.",
            show_default=False,
            autocompletion=data_names,
        ),
    ] = None,
    data_option: DataOptions = None,
    root: Annotated[Path, typer.Option(help="Folder with the files of a torchvision data set.")] = DataSource.root,
    calibration: Annotated[
        str,
        typer.Option(
            help=f"With --int8, how ranges are chosen: {', '.join(METHODS)}.", autocompletion=lambda: list(METHODS)
        ),
    ] = next(iter(METHODS)),
    calibration_images: Annotated[
        int, typer.Option(min=1, help="With --int8, number of images to measure ranges on.")
    ] = 256,
    per_tensor: Annotated[
        bool, typer.Option("--per-tensor", help="Use one scale for each tensor of weights, not one for each channel.")
    ] = False,
    reduce_range: Annotated[
        bool, typer.Option("--reduce-range", help="Use 7 bits for weights, for x86 processors without VNNI.")
    ] = False,
    keep_float: Annotated[
        list[str] | None, typer.Option(help="Name of a layer to keep in float32; may be repeated.", show_default=False)
    ] = None,
    bound: Annotated[
        float,
        typer.Option(help="Report the first layer whose outputs are less than this many decibels above the noise."),
    ] = 15.0,
    equalized: Annotated[
        bool,
        typer.Option(
            "--equalize",
            help="With --int8, even out the ranges of weights between layers first, and correct the biases afterwards.",
        ),
    ] = False,
    raw_images: Annotated[
        bool,
        typer.Option(
            "--raw-images",
            help="Let the file of a training run take images of any size as bytes, and prepare them itself.",
        ),
    ] = False,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Let the file give probabilities in place of logits.")
    ] = False,
    also: Annotated[
        str | None,
        typer.Option(
            help=f"Write a second file beside the ONNX file: {', '.join(_ALSO)}, a program of torch.export that needs no repfx.",
            show_default=False,
            autocompletion=lambda: list(_ALSO),
        ),
    ] = None,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Fuse a model into plain convs and export it to ONNX, or fuse an ONNX file.

    The fused model is compared with the original, and the ONNX file is checked in onnxruntime.
    """
    if is_onnx_file(model):
        of_models = {
            "weights": weights,
            "num_classes": num_classes,
            "option": option,
            "input_shape": input_shape,
            "opset": opset,
            "batch_size": batch_size,
            "dynamic_size": dynamic_size,
            "fp16": fp16,
            "int8": int8,
            "data": data,
            "equalize": equalized,
            "raw_images": raw_images,
            "probabilities": probabilities,
            "also": also,
        }
        fuse_file(model, onnx, of_models, as_json=as_json)
        return
    _check(int8=int8, fp16=fp16, data=data, raw_images=raw_images, equalized=equalized, also=also)
    beside = None if also is None else onnx.with_suffix(f".{also}")
    for file, suffix in ((onnx, ".onnx"), (beside, "")):
        if file is not None:
            with staged(file, suffix):
                pass  # fail now, not after the work, if the file can't be written
    original, setup = load_model(model, weights, num_classes, option, trust=trust)
    shape = shape_of_input(input_shape, setup)
    fused = repfx.fuse(original)
    if equalized:
        fused = equalize(fused)
    real = None
    if data is not None:
        trained_on: dict[str, Any] = {}
        if setup is not None:
            trained_on = {"preprocessing": setup.preprocessing, "classes": setup.classes}
        real = samples(
            fused,
            DataSource(data, root, options=parse_options(data_option)),
            calibration_images,
            shape=shape,
            **trained_on,
        )
    x = example_input(original, shape) if real is None else real.example
    equivalence = repfx.check_equivalent(original, fused, x)
    batch = x if batch_size is None else x[torch.arange(batch_size) % len(x)]
    given: dict[str, Any] = {"x": batch, "dynamic_batch": batch_size is None, "dynamic_size": dynamic_size}
    given |= _known(model, original, setup, x)
    export: Callable[..., ExportReport] = partial(
        export_onnx, opset=opset, inside=raw_images, probabilities=probabilities, **given
    )
    dtype = torch.float16 if fp16 else None
    program = None if beside is None else export_program(original if fp16 else fused, beside, dtype=dtype, **given)
    quantized = None
    if real is None:
        exported = export(original if fp16 else fused, onnx, dtype=dtype)
    else:
        quantize = partial(
            quantize_onnx,
            calibrate=real.calibrate,
            labelled=real.labelled,
            method=calibration,
            per_channel=not per_tensor,
            reduce_range=reduce_range,
            keep_float=keep_float or (),
            correct=equalized,
            bound=bound,
        )
        with TemporaryDirectory() as folder, busy("exporting and quantizing"):
            exported = export(fused, Path(folder) / "float32.onnx")
            quantized = quantize(exported.path, onnx)
    found = _Found(original, fused, x, equivalence, exported, quantized, program)
    if as_json:
        print_json(found.as_dict())
    else:
        found.show()


def _known(name: str, model: nn.Module, setup: Setup | None, x: Tensor) -> dict[str, Any]:
    """Return what the file shall say about itself, as far as it is known."""
    if setup is None:
        return {"about": {"source": ModelReference(name).short_name}}
    about = {"source": setup.model.short_name, "journal": to_json(journal(model))}
    labels = labels_of_logits(model, setup.classes, x) if setup.classes else ()
    return {"labels": labels, "preprocessing": setup.preprocessing, "about": about}


def _check(*, int8: bool, fp16: bool, data: str | None, raw_images: bool, equalized: bool, also: str | None) -> None:
    if also is not None and also not in _ALSO:
        raise UnknownName("form of --also", also, _ALSO)
    if also is not None and int8:
        raise InvalidInput("--also writes the model in floats, and --int8 in 8 bits: give only one of them.")
    if equalized and not int8:
        raise InvalidInput("--equalize is for weights in 8 bits: give --int8, too, or leave --equalize out.")
    if int8 and raw_images:
        raise InvalidInput("--int8 quantizes files that take prepared images: leave --raw-images out.")
    if int8 and fp16:
        raise InvalidInput("--int8 and --fp16 exclude each other: give only one of them.")
    if int8 and data is None:
        raise InvalidInput("--int8 measures ranges on real images: give --data, such as --data digits.")
    if data is not None and not int8:
        raise InvalidInput("--data is what --int8 measures ranges on: give --int8, too, or leave --data out.")


@dataclass(frozen=True)
class _Found:
    """The result that the command prints."""

    before: nn.Module
    fused: nn.Module
    x: Tensor
    equivalence: EquivalenceReport
    exported: ExportReport
    quantized: QuantizationReport | None
    program: ProgramReport | None

    def as_dict(self) -> dict[str, Any]:
        file = {**asdict(self.exported), "path": str(self.exported.path)}
        if self.quantized is not None:
            del file["path"], file["size"]  # these describe the temporary float32 file
        return {
            "max_error": self.equivalence.max_error,
            "skipped": [str(skip) for skip in repfx.report(self.fused).skipped],
            "notes": [str(note) for note in repfx.report(self.fused).notes],
            "export": file,
            "quantization": None if self.quantized is None else self.quantized.as_dict(),
            "program": None if self.program is None else {**asdict(self.program), "path": str(self.program.path)},
        }

    def show(self) -> None:
        console = Console()
        console.print(fusion_table({"before": self.before, "fused": self.fused}, self.x))
        error = self.equivalence.max_error
        typer.echo(f"Worst relative difference between the outputs before and after fusing, in float64: {error:.1e}.")
        report = repfx.report(self.fused)
        for line in (*report.notes, *report.skipped[:10]):
            typer.echo(str(line))
        if self.quantized is None:
            typer.echo(str(self.exported))
            if self.program is not None:
                typer.echo(str(self.program))
        else:
            console.print(quantization_table(self.quantized))
            typer.echo(str(self.quantized))
