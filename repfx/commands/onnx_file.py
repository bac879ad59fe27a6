"""`repfx fuse` and `repfx inspect` on the path of an ONNX file in place of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer

from repfx.commands.output import print_json
from repfx.commands.progress import busy
from repfx.errors import InvalidInput
from repfx.onnx.fusing.fuse_file import FileFusion, fuse_onnx, plan_fusion


def is_onnx_file(model: str) -> bool:
    """Whether the argument that names a model is the path of an ONNX file."""
    return model.endswith(".onnx")


def fuse_file(source: str, path: Path, options: Mapping[str, Any], *, as_json: bool) -> None:
    """Fuse an ONNX file and print the report.

    Args:
        options: the values of options that are about models and exports alone.
    """
    refuse_options(options)
    with busy("fusing and comparing"):
        report = fuse_onnx(source, path)
    _print(report, str(report), as_json=as_json)


def inspect_file(source: str, options: Mapping[str, Any], *, as_json: bool) -> None:
    """Print what would merge in an ONNX file, and why each conv and BatchNormalization that is left stays."""
    refuse_options(options)
    with busy("reading"):
        plan = plan_fusion(source)
    title = f"{source}, fused:\n{plan}" if plan.applied else f"{source} is as small as fusing makes it."
    left = ["What is left, and why it stays:", *(f"  {skip.path}: {skip.reason}" for skip in plan.stays)]
    _print(plan, "\n".join([title, *(left if plan.stays else ())]), as_json=as_json)


def refuse_options(options: Mapping[str, Any]) -> None:
    """Refuse options that are about models, where an ONNX file stands in the place of one.

    Raises:
        InvalidInput: one of them is given.
    """
    given = [f"--{name.replace('_', '-')}" for name, value in options.items() if value]
    if given:
        raise InvalidInput(f"an ONNX file has its own weights, sizes and types: leave {' and '.join(given)} out.")


def _print(found: FileFusion, text: str, *, as_json: bool) -> None:
    if as_json:
        plain = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(found).items()}
        print_json({**plain, "convs_before": found.convs_before, "convs": found.convs})
    else:
        typer.echo(text)
