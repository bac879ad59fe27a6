"""`code_matrices`: the branches of a net as matrices of eight rows (IRepNAS, figure A2)."""

from __future__ import annotations

from repfx.blocks.architecture import Architecture
from repfx.pages.pictures.grid import Square, grid
from repfx.pages.pictures.picture import Picture


def code_matrices(architecture: Architecture | None) -> list[Picture]:
    """Draw the codes of an architecture, one picture for each matrix; none without an architecture."""
    if architecture is None or not architecture.kinds:
        return []
    kinds, sites, pictures = architecture.kinds, iter(architecture.sites), []
    matrices = architecture.matrices()
    for number, matrix in enumerate(matrices, start=1):
        rows = {
            site: {
                kind: Square(f"{site}, {kind}: {digit}", str(digit), "more" if digit else "none", 0.6 if digit else 1.0)
                for kind, digit in zip(kinds, digits)
            }
            for digits, site in zip(matrix, sites)
        }
        part = f" ({number} of {len(matrices)})" if len(matrices) > 1 else ""
        note = "A row is a site, a column a kind of branch: 1 if the site has it. The site's own conv has no column."
        drawing = grid(rows, kinds, f"Codes of the architecture{part}.", size=(26, 22))
        pictures.append(Picture(f"codes-{number}", f"Structure as a matrix{part}", note, (drawing,)))
    return pictures
