"""All blocks by name."""

from __future__ import annotations

from tests.foreign_blocks import (
    acb,
    dbb,
    dyrep,
    ecbsr,
    mobile,
    orepa,
    parts_of_channels,
    repvgg,
    scales,
    span,
    super_resolution,
    unireplknet,
    vanillanet,
)
from tests.foreign_blocks.parts import Block

_PAPERS = (
    acb,
    dbb,
    dyrep,
    ecbsr,
    mobile,
    orepa,
    parts_of_channels,
    repvgg,
    scales,
    span,
    super_resolution,
    unireplknet,
    vanillanet,
)

BLOCKS: dict[str, Block] = {name: block for paper in _PAPERS for name, block in paper.BLOCKS.items()}
