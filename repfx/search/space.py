"""`Space`: all gated paths of a model in one row, from which a search chooses those that a budget allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import nn

from repfx.blocks.block import ORIGIN
from repfx.blocks.gates import Gates, gates_in
from repfx.errors import InvalidInput

Code: TypeAlias = tuple[bool, ...]  # for each path of a space, whether it is open


@dataclass(frozen=True)
class Space:
    """The gated paths of a model.

    Args:
        paths: site and name of each path, site by site in the model's order.

    >>> space = Space((("conv1", "origin"), ("conv1", "1x1"), ("conv2", "origin"), ("conv2", "1x1")))
    >>> space.best([0.1, 0.9, 0.2, 0.3], 3)
    (False, True, True, True)
    """

    paths: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, model: nn.Module) -> Space:
        """Return the space of all gates of a model."""
        return cls(tuple((site, name) for site, gates in gates_in(model).items() for name in gates.names))

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites that have gates."""
        return tuple(dict.fromkeys(site for site, _ in self.paths))

    @property
    def origins_too(self) -> bool:
        """Whether the sites' own convs have gates, too; then each site must keep at least one path."""
        return any(name == ORIGIN for _, name in self.paths)

    def budget(self, asked: int | float) -> int:
        """Return how many paths may be open. A whole number is this number itself, and a fraction is one of all paths.

        Raises:
            InvalidInput: the budget is more than there are paths, or so few that a site would be left without any.
        """
        total = len(self.paths)
        count = asked if isinstance(asked, int) else int(total * asked + 0.5)
        lowest = len(self.sites) if self.origins_too else 1
        if not lowest <= count <= total:
            why = f"each of {lowest} sites needs one" if self.origins_too else "one is the least"
            raise InvalidInput(
                f"a budget of {asked!r} means {count} branches; there are {total} to choose from, and {why}."
            )
        return count

    def best(self, scores: Sequence[float], count: int) -> Code:
        """Return the `count` paths of the highest scores in the whole net. If own convs have gates, each site's best path is among them."""
        order = sorted(range(len(scores)), key=lambda index: -scores[index])  # stable: the first of equals
        chosen: set[int] = set()
        if self.origins_too:
            for site in self.sites:
                chosen.add(next(index for index in order if self.paths[index][0] == site))
        chosen.update([index for index in order if index not in chosen][: count - len(chosen)])
        return tuple(index in chosen for index in range(len(scores)))

    def open_at(self, code: Code) -> dict[str, tuple[str, ...]]:
        """Return the names of the open paths, by site."""
        found: dict[str, tuple[str, ...]] = dict.fromkeys(self.sites, ())
        for (site, name), is_open in zip(self.paths, code, strict=True):
            if is_open:
                found[site] += (name,)
        return found

    def choose(self, model: nn.Module, code: Code, modes: Sequence[bool] = (True, False)) -> None:
        """Open and close the gates of a model in the given modes; True is training mode, and False is eval mode."""
        self.open(gates_in(model), code, modes)

    def open(self, gates: Mapping[str, Gates], code: Code, modes: Sequence[bool] = (True, False)) -> None:
        """Open and close gates, given by site, in the given modes; True is training mode, and False is eval mode."""
        for site, names in self.open_at(code).items():
            gates[site].choose(names, modes)

    def digits(self, code: Code) -> str:
        """Return a code as text, site by site, as IRepNAS writes it."""
        digits = iter("01"[is_open] for is_open in code)
        sizes = {site: sum(site == other for other, _ in self.paths) for site in self.sites}
        return " ".join("".join(next(digits) for _ in range(size)) for size in sizes.values())
