"""`random_nets`: architectures drawn at random under a budget, each to be trained by itself (RepNAS, §4.1)."""

from __future__ import annotations

import random
from dataclasses import replace

from torch import nn

from repfx.blocks.architecture import Architecture
from repfx.blocks.presets import SpecLike, resolve_spec
from repfx.blocks.spec import Spec
from repfx.errors import InvalidInput
from repfx.passes.expand import expand
from repfx.passes.gate import gate
from repfx.search.space import Code, Space


def random_nets(
    model: nn.Module,
    budget: int | float,
    count: int = 25,
    *,
    spec: SpecLike = "odbb",
    origin: bool = True,
    seed: int = 0,
) -> list[Architecture]:
    """Draw different architectures for a plain model, all of one budget.

    The random search of RepNAS's paper (§4.1) trains 25 such nets for 100 epochs each, and the best one again for 600. No supernet is
    trained, and no weights are shared. `repfx.schedules.RandomSearch` is the other random search: it scores candidates of one supernet.

    Args:
        model: the plain model. It isn't changed.
        budget: number of paths, or a fraction of all. With `origin`, each site has at least one path.
        count: number of architectures.
        spec: the search space. Specs that name no weights share those of the site's own conv, as RepNAS does.
        origin: whether a site's own conv counts as a path, and may be left out.
        seed: seed of the random numbers.

    Raises:
        InvalidInput: the budget isn't possible, or there aren't so many architectures.

    >>> net = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
    >>> [str(found) for found in random_nets(net, 2, 2, spec=["1x1", "1xk"])]
    ['0  110  origin, 1x1', '0  011  1x1, 1xk']
    """
    supernet = expand(model, _shared(spec), preserve=False)
    whole = Architecture.of(supernet)
    for site in whole.sites:
        gate(supernet, site, origin=origin)
    space, numbers = Space.of(supernet), random.Random(seed)
    open_ones = space.budget(budget)
    codes: dict[Code, None] = {}
    for _ in range(100 * count):
        if len(codes) == count:
            break
        codes[space.best([numbers.random() for _ in space.paths], open_ones)] = None
    if len(codes) < count:
        raise InvalidInput(
            f"only {len(codes)} different architectures were found with {open_ones} paths; ask for fewer than {count}."
        )
    return [_found(supernet, space, code) for code in codes]


def _shared(spec: SpecLike) -> SpecLike:
    if isinstance(spec, dict):
        return {pattern: _shared(each) for pattern, each in spec.items()}
    found: Spec = resolve_spec(spec)
    return replace(found, weights="shared") if found.weights == "default" and found.norm == "batch_norm" else found


def _found(supernet: nn.Module, space: Space, code: Code) -> Architecture:
    space.choose(supernet, code)
    found = Architecture.of(supernet)
    return Architecture({site: replace(each, importance=()) for site, each in found.sites.items()}, found.others)
