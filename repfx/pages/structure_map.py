"""`StructureMap`: sites and their branches over the epochs, with mean |γ| and the epochs at which branches grew or were dropped."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from repfx.blocks.block import ORIGIN
from repfx.pages.changes import Changes, changes_of, when
from repfx.pages.columns import Column, columns_of
from repfx.records.number_text import plural, short
from repfx.training.runs.history import Epoch

LEVELS = (
    0.002,
    0.005,
    0.02,
    0.05,
    0.2,
    0.5,
)  # γ starts at 0.01 in branches and at 1 in convs: both lie well inside a class
_MOST_COLUMNS = 25
_SIGNS = {(True, False): "+", (False, True): "×", (True, True): "↻", (False, False): ""}


@dataclass(frozen=True)
class Cell:
    """One square of the map.

    Args:
        text: the number that the square shows.
        level: how far the colour of the square is from the background: a number from 0, ``none`` for a branch without γ,
            empty if there is nothing to show.
        sign: ``+`` for grown, ``×`` for dropped, ``↻`` for both, empty for neither.
        title: everything in words, for the tooltip.
    """

    text: str = ""
    level: str = ""
    sign: str = ""
    title: str = ""


@dataclass(frozen=True)
class Row:
    """The row of one branch, or of the site's own conv."""

    name: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class SiteRows:
    """The rows of one site.

    Args:
        path: the path of the site.
        cells: for each column, how many branches the site has.
        story: the changes of the site in words.
        rows: one row for the site's own conv and one for each of its branches.
    """

    path: str
    cells: tuple[Cell, ...]
    story: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class StructureMap:
    """All sites that were a block at any time.

    Args:
        columns: the epochs that each column shows.
        sites: the rows, site by site.
    """

    columns: tuple[Column, ...]
    sites: tuple[SiteRows, ...]

    @property
    def step(self) -> int:
        """The largest number of epochs in one column."""
        return max(len(column.epochs) for column in self.columns)


def structure_map(epochs: Sequence[Epoch], order: Sequence[str] = ()) -> StructureMap:
    """Map the structure over the epochs of a run.

    Args:
        epochs: the history of the run.
        order: paths of modules in the model's order. Sites are sorted by it; sites that lie under none of these paths come last, by name.
    """
    columns = columns_of(epochs, _MOST_COLUMNS)
    changes = {epoch.epoch: changes_of(epoch) for epoch in epochs}
    names: dict[str, dict[str, None]] = {}
    for epoch in epochs:
        for site, gammas in epoch.blocks.items():
            names.setdefault(site, {}).update(dict.fromkeys(gammas))
        for site, grown in changes[epoch.epoch].grown.items():
            names.setdefault(site, {ORIGIN: None}).update(dict.fromkeys(grown))
    most = max((len(gammas) - 1 for epoch in epochs for gammas in epoch.blocks.values()), default=1)
    return StructureMap(
        columns, tuple(_site(site, names[site], columns, changes, most) for site in sorted_sites(names, order))
    )


def level_of(gamma: float) -> int:
    """Return the class of a mean |γ|, counted from 0: how many numbers in `LEVELS` it reaches.

    >>> level_of(0.001), level_of(0.01), level_of(1)
    (0, 2, 6)
    """
    return sum(gamma >= limit for limit in LEVELS)


def _site(
    site: str, names: Iterable[str], columns: Sequence[Column], changes: dict[int, Changes], most: int
) -> SiteRows:
    rows = tuple(
        Row(
            name,
            tuple(_cell(site, name, column, [changes[each.epoch] for each in column.epochs]) for column in columns),
        )
        for name in names
    )
    totals = tuple(_total(site, column, [changes[each.epoch] for each in column.epochs], most) for column in columns)
    return SiteRows(site, totals, _story(site, changes.values()), rows)


def _cell(site: str, name: str, column: Column, changes: Sequence[Changes]) -> Cell:
    seen = [epoch.blocks[site] for epoch in column.epochs if name in epoch.blocks.get(site, {})]
    grown = [change.epoch for change in changes if name in change.grown.get(site, ())]
    dropped = [change.epoch for change in changes if name in change.dropped.get(site, ())]
    sign = _SIGNS[bool(grown), bool(dropped)]
    if not seen and not sign:
        return Cell(title=f"epoch {column}: no such branch")
    gamma = seen[-1][name] if seen else None
    told = ["" if not seen else "no γ" if gamma is None else f"mean |γ| {gamma:.3g}"]
    told += [f"dropped {when(epoch)}" for epoch in dropped] + [f"grown {when(epoch)}" for epoch in grown]
    title = f"epoch {column}: {', '.join(filter(None, told))}"
    if gamma is None:
        return Cell("–" if seen else "", "none" if seen else "", sign, title)
    return Cell(short(gamma), str(level_of(gamma)), sign, title)


def _total(site: str, column: Column, changes: Sequence[Changes], most: int) -> Cell:
    number = len([name for name in column.last.blocks.get(site, {}) if name != ORIGIN])
    grown = [name for change in changes for name in change.grown.get(site, ())]
    dropped = [name for change in changes for name in change.dropped.get(site, ())]
    told = [f"grown {', '.join(grown)}" if grown else "", f"dropped {', '.join(dropped)}" if dropped else ""]
    title = f"epoch {column}: {plural(number, 'branch', 'branches')}"
    title = "; ".join(filter(None, (title, *told)))
    level = "" if not number else str(1 + round(4 * number / max(most, 1)))
    return Cell(str(number) if number else "", level, _SIGNS[bool(grown), bool(dropped)], title)


def _story(site: str, changes: Iterable[Changes]) -> str:
    told = []
    for change in changes:
        for what, names in (("grew", change.grown.get(site)), ("lost", change.dropped.get(site))):
            if names:
                told.append(f"{what} {', '.join(names)} {when(change.epoch)}")
    return "; ".join(told) or "a block from the beginning"


def sorted_sites(sites: Iterable[str], order: Sequence[str] = ()) -> list[str]:
    """Sort sites by place, then by name with numbers compared as numbers.

    The place of a site is that of the outermost path in `order` that is the site itself or a module around it.
    """
    places = {path: place for place, path in enumerate(order)}

    def key(site: str) -> tuple[int, list[tuple[int, int, str]]]:
        parts = site.split(".")
        outer = (".".join(parts[:length]) for length in range(1, len(parts) + 1))
        place = next((places[path] for path in outer if path in places), len(places))
        pieces = re.findall(r"\d+|\D+", site)
        return place, [(0, int(piece), "") if piece.isdigit() else (1, 0, piece) for piece in pieces]

    return sorted(sites, key=key)
