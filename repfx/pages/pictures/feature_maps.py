"""`feature_maps`: what sites output for one image, before and after fusing (IRepNAS, figure 4)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from repfx.algebra.layers import is_conv
from repfx.errors import InvalidInput, first_line
from repfx.measuring.equivalence import counterparts
from repfx.pages.chart import add_text
from repfx.pages.pictures.picture import Picture
from repfx.records.provenance import provenance_of

_MOST_SITES, _MOST_CELLS, _SHADES = 8, 16, 8
_SIDE, _TOP, _LEFT, _GAP = 96, 44, 56, 10


@dataclass(frozen=True)
class Maps:
    """Maps of one layer for one image.

    Args:
        site: its path in the model before fusing.
        before, after: mean |output| over the channels, ``(height, width)`` of at most 16 each, averaged over areas if the output is larger.
        error: largest difference of the two outputs, channel by channel, over the largest |output|.
    """

    site: str
    before: Tensor
    after: Tensor
    error: float


@torch.no_grad()
def maps_of(trained: nn.Module, fused: nn.Module, x: Tensor) -> list[Maps]:
    """Return maps of up to eight layers that fusing has made from several, evenly chosen from the first to the last.

    Args:
        x: one image, ``(1, channels, height, width)``.

    Raises:
        InvalidInput: a model doesn't take the image.
    """
    modules = dict(fused.named_modules())
    pairs = {
        path: twin
        for path, twin in counterparts(trained, fused).items()
        if is_conv(modules[path]) and (made := provenance_of(modules[path])) is not None and made.rules
    }
    before = _outputs(trained, list(pairs.values()), x)
    after = _outputs(fused, list(pairs), x)
    known = [
        (path, twin) for path, twin in pairs.items() if path in after and twin in before and before[twin].ndim == 4
    ]
    chosen = [known[round(place)] for place in torch.linspace(0, len(known) - 1, min(len(known), _MOST_SITES)).tolist()]
    found = []
    for path, twin in chosen:
        ours, theirs = before[twin], after[path]
        most = ours.abs().max().clamp(min=torch.finfo(ours.dtype).tiny)
        found.append(Maps(twin, _map(ours), _map(theirs), float((ours - theirs).abs().max() / most)))
    return found


def feature_maps(trained: nn.Module, fused: nn.Module, x: Tensor) -> Picture | None:
    """Draw what layers output for an image before and after fusing; None if fusing has made no layer whose output is a picture.

    Raises:
        InvalidInput: a model doesn't take the image.
    """
    found = maps_of(trained, fused, x)
    if not found:
        return None
    width, height = _LEFT + len(found) * (_SIDE + _GAP), _TOP + 2 * (_SIDE + _GAP) + 22
    box = {"class": "picture", "viewBox": f"0 0 {width} {height}", "role": "img", "width": str(width)}
    svg = Element("svg", {**box, "aria-label": "Maps of features before and after fusing."})
    for row, name in enumerate(("before", "after")):
        add_text(svg, "tick end", _LEFT - 8, _TOP + row * (_SIDE + _GAP) + _SIDE / 2, name)
    for place, maps in enumerate(found):
        left = _LEFT + place * (_SIDE + _GAP)
        add_text(svg, "tick", left, _TOP - 20 + 14 * (place % 2), _short(maps.site))
        most = float(torch.maximum(maps.before.max(), maps.after.max()))
        for row, values in enumerate((maps.before, maps.after)):
            _draw(svg, values, most, left, _TOP + row * (_SIDE + _GAP))
        add_text(svg, "tick mid", left + _SIDE / 2, height - 14, f"{maps.error:.0e}")
    note = (
        "Mean |output| over the channels of each layer, for one image; both maps of a layer have the same shades. "
        "The number is the largest difference of the two outputs, over the largest |output|."
    )
    drawing = ElementTree.tostring(svg, encoding="unicode", method="html")
    return Picture("feature-maps", "Maps of features before and after fusing", note, (drawing,))


def _outputs(model: nn.Module, paths: Sequence[str], x: Tensor) -> dict[str, Tensor]:
    """Return the first output of each module in eval mode."""
    found: dict[str, Tensor] = {}

    def keep(path: str, output: object) -> None:
        if isinstance(output, Tensor):
            found.setdefault(path, output.clone())  # a ReLU in place would write over it

    with ExitStack() as hooks:
        for path in paths:
            module = model.get_submodule(path)
            hooks.enter_context(module.register_forward_hook(lambda _, __, output, path=path: keep(path, output)))
        try:
            model.eval()(x)
        except Exception as error:  # code of the model's author may raise anything
            raise InvalidInput(f"the model fails on an image {tuple(x.shape[1:])}: {first_line(error)}.") from error
    return found


def _map(output: Tensor) -> Tensor:
    mean = output.abs().mean(1)
    height, width = mean.shape[1:]
    return adaptive_avg_pool2d(mean, (min(height, _MOST_CELLS), min(width, _MOST_CELLS)))[0]


def _draw(svg: Element, values: Tensor, most: float, left: float, top: float) -> None:
    """Draw a map, one path for each shade."""
    rows, columns = values.shape
    side = _SIDE / max(rows, columns)
    shades = (values / (most or 1.0) * _SHADES).round().int().clamp(0, _SHADES).tolist()
    for shade in range(1, _SHADES + 1):
        cells = [(row, column) for row in range(rows) for column in range(columns) if shades[row][column] == shade]
        if cells:
            parts = (
                f"M{left + side * column:.1f} {top + side * row:.1f}h{side:.2f}v{side:.2f}h-{side:.2f}z"
                for row, column in cells
            )
            SubElement(svg, "path", {"class": "more", "fill-opacity": f"{shade / _SHADES:.2f}", "d": "".join(parts)})
    frame = {"x": f"{left:.1f}", "y": f"{top:.1f}", "width": f"{side * columns:.1f}", "height": f"{side * rows:.1f}"}
    SubElement(svg, "rect", {"class": "frame", **frame})


def _short(path: str) -> str:
    most = (_SIDE * 2) // 8
    return path if len(path) <= most else f"…{path[1 - most :]}"
