"""`difference_map`: how much more one branch of a pair matters than the other, site by site (IRepNAS, figure 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from repfx.blocks.architecture import Architecture
from repfx.blocks.block import ORIGIN
from repfx.pages.pictures.grid import Square, grid
from repfx.pages.pictures.picture import Picture
from repfx.pages.structure_map import sorted_sites
from repfx.training.runs.history import Epoch

PAIRS = (("1xk", "dilated-1x2"), ("kx1", "dilated-2x1"))
_FULL = 0.7  # of a colour, so that text on it can be read
Strengths = Mapping[str, Mapping[str, float]]


def importances_of(architecture: Architecture | None) -> Strengths:
    """Return what a search has learned of each branch, by site and branch: α of RepNAS, σ(α) · σ(β) of DES."""
    found: dict[str, dict[str, float]] = {}
    for site, code in ({} if architecture is None else architecture.sites).items():
        own = {name: value for (name, _), value in zip(code.digits, code.importance[1:]) if value is not None}
        if own:
            found[site] = own
    return found


def gammas_of(epochs: Sequence[Epoch]) -> Strengths:
    """Return mean |γ| of each branch, by site and branch, in the last epoch that has branches."""
    blocks = next((epoch.blocks for epoch in reversed(epochs) if epoch.blocks), {})
    return {
        site: {name: gamma for name, gamma in own.items() if name != ORIGIN and gamma is not None}
        for site, own in blocks.items()
    }


def pairs_in(strengths: Strengths) -> list[tuple[str, str]]:
    """Return the paper's pairs that occur together at a site. If none does, the branches that follow one another make pairs."""
    found = [pair for pair in PAIRS if any(set(pair) <= own.keys() for own in strengths.values())]
    return found or list(dict.fromkeys(pair for own in strengths.values() for pair in pairwise(own)))


def differences(strengths: Strengths) -> dict[str, dict[tuple[str, str], float]]:
    """Return, for each site, by how much the first branch of each pair is stronger than the second."""
    pairs = pairs_in(strengths)
    rows = {
        site: {(a, b): own[a] - own[b] for a, b in pairs if a in own and b in own} for site, own in strengths.items()
    }
    return {site: rows[site] for site in sorted_sites(rows) if rows[site]}


def difference_map(architecture: Architecture | None, epochs: Sequence[Epoch]) -> Picture | None:
    """Draw the differences; None if no site has two branches of known strength."""
    learned = importances_of(architecture)
    rows = differences(learned) or differences(gammas_of(epochs))
    if not rows:
        return None
    most = max(abs(value) for row in rows.values() for value in row.values()) or 1.0
    columns = list(dict.fromkeys(f"{a} − {b}" for row in rows.values() for a, b in row))
    squares = {
        site: {
            f"{a} − {b}": Square(
                f"{site}, {a} − {b}: {value:+.4g}",
                f"{value:+.2f}",
                "more" if value >= 0 else "less",
                _FULL * abs(value) / most,
            )
            for (a, b), value in row.items()
        }
        for site, row in rows.items()
    }
    of = "importance that the search learned" if learned and differences(learned) else "mean |γ| at the end"
    note = f"Each square is a difference of the {of}. + is a site where the first branch of the pair matters more."
    drawing = grid(squares, columns, "Differences of branch pairs, site by site.", size=(52, 20))
    return Picture("branch-pairs", "Differences of branch pairs", note, (drawing,))
