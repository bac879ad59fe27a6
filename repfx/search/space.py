"""`Space`: all gated paths of a model in one row, over which a search chooses; and what a budget makes of scores."""

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
        paths: site and name of each, site by site in the model's order.

    >>> space = Space((("conv1", "origin"), ("conv1", "1x1"), ("conv2", "origin"), ("conv2", "1x1")))
    >>> space.best([0.1, 0.9, 0.2, 0.3], 3)
    (False, True, True, True)
    """

    paths: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, model: nn.Module) -> Space:
        """Of all gates of a model."""
        return cls(tuple((site, name) for site, gates in gates_in(model).items() for name in gates.names))

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites that have gates."""
        return tuple(dict.fromkeys(site for site, _ in self.paths))

    @property
    def origins_too(self) -> bool:
        """Whether the sites' own convs have gates; then each site has to keep one path at least."""
        return any(name == ORIGIN for _, name in self.paths)

    def budget(self, asked: int | float) -> int:
        """How many paths may be open: a whole number is meant as it is, a fraction is one of all paths.

        Raises:
            InvalidInput: more than there are, or so few that a site would be left without any.
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
        """The `count` paths of the highest scores in the whole net; where own convs have gates, each site's best is among them."""
        order = sorted(range(len(scores)), key=lambda index: -scores[index])  # stable: the first of equals
        chosen: set[int] = set()
        if self.origins_too:
            for site in self.sites:
                chosen.add(next(index for index in order if self.paths[index][0] == site))
        chosen.update([index for index in order if index not in chosen][: count - len(chosen)])
        return tuple(index in chosen for index in range(len(scores)))

    def open_at(self, code: Code) -> dict[str, tuple[str, ...]]:
        """The names of the open paths by site."""
        found: dict[str, tuple[str, ...]] = dict.fromkeys(self.sites, ())
        for (site, name), is_open in zip(self.paths, code, strict=True):
            if is_open:
                found[site] += (name,)
        return found

    def choose(self, model: nn.Module, code: Code, modes: Sequence[bool] = (True, False)) -> None:
        """Open and close the gates of a model; True among `modes` is training mode."""
        self.open(gates_in(model), code, modes)

    def open(self, gates: Mapping[str, Gates], code: Code, modes: Sequence[bool] = (True, False)) -> None:
        """The same for gates that are known, by site."""
        for site, names in self.open_at(code).items():
            gates[site].choose(names, modes)

    def digits(self, code: Code) -> str:
        """A code as text, site by site, as IRepNAS writes it."""
        digits = iter("01"[is_open] for is_open in code)
        sizes = {site: sum(site == other for other, _ in self.paths) for site in self.sites}
        return " ".join("".join(next(digits) for _ in range(size)) for size in sizes.values())
