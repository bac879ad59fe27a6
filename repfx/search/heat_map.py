"""`draw`: write an architecture as a picture, with a row for each site and a column for each kind of branch."""

from __future__ import annotations

import importlib
import os
from typing import Any

from repfx.blocks.architecture import Architecture, SiteCode
from repfx.errors import InvalidInput
from repfx.records.target_file import staged

_CHOSEN, _LEFT_OUT = "#1f5f8b", "#dfe3e8"
_INK, _ON_DARK = "#30363d", "#ffffff"


def draw(architecture: Architecture, path: str | os.PathLike[str]) -> None:
    """Write a heat map as PNG: one row for each site, one column for each kind of branch.

    A dark cell is a branch that the site has, a light cell one that it could have had, and a white cell one that doesn't fit it. If a
    search has learned how much each branch matters, the cells show that number.

    Raises:
        InvalidInput: matplotlib is missing, or the path can't be written.

    >>> from tempfile import TemporaryDirectory
    >>> from torch import nn
    >>> import repfx
    >>> model = repfx.expand(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)), "repvgg")
    >>> with TemporaryDirectory() as folder:
    ...     draw(Architecture.of(model), f"{folder}/architecture.png")
    """
    rows = {site: cells(code) for site, code in architecture.sites.items()}
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    figure, axes = _figure(len(rows), len(columns))
    for y, row in enumerate(rows.values()):
        for name, (chosen, importance) in row.items():
            x = columns.index(name)
            axes.add_patch(_package("patches").Rectangle((x, y), 0.94, 0.9, color=_CHOSEN if chosen else _LEFT_OUT))
            if importance is not None:
                ink = _ON_DARK if chosen else _INK
                axes.text(x + 0.47, y + 0.45, f"{importance:.2g}", ha="center", va="center", fontsize=7, color=ink)
    axes.set_xticks([x + 0.47 for x in range(len(columns))], columns, rotation=35, ha="left", rotation_mode="anchor")
    axes.set_yticks([y + 0.45 for y in range(len(rows))], list(rows))
    kept = sum(chosen for row in rows.values() for chosen, _ in row.values())
    axes.set_xlabel(f"{kept} of {sum(map(len, rows.values()))} paths", color=_INK)
    with staged(path, ".png") as (_, staging):
        figure.savefig(staging, dpi=144, bbox_inches="tight", facecolor="white")


def cells(code: SiteCode) -> dict[str, tuple[bool, float | None]]:
    """Return, by column, whether the site has the path, and how much the path matters, if that was learned."""
    found: dict[str, tuple[bool, float | None]] = {}
    importance = code.importance or (None,) * len(code.code)
    for kind, digit, value in zip(("own conv", *(branch.kind for branch in code.branches)), code.code, importance):
        name, number = kind, 1
        while name in found:
            number += 1
            name = f"{kind}-{number}"
        found[name] = digit == "1", value
    return found


def _figure(rows: int, columns: int) -> tuple[Any, Any]:
    figure = _package("figure").Figure(figsize=(1.6 + 0.62 * columns, 1.2 + 0.3 * rows))
    axes = figure.subplots()
    axes.set_xlim(0, columns)
    axes.set_ylim(rows, 0)
    axes.xaxis.tick_top()
    axes.tick_params(length=0, labelsize=8, colors=_INK)
    axes.spines[:].set_visible(False)
    return figure, axes


def _package(name: str) -> Any:
    try:
        return importlib.import_module(f"matplotlib.{name}")
    except ImportError as error:
        raise InvalidInput("drawing needs matplotlib, which is missing: pip install 'repfx[plot]'.") from error
