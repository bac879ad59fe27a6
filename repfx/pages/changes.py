"""`Changes`: the branches that each site gained and lost in an epoch, and the other actions on it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from repfx.blocks.block import ORIGIN
from repfx.passes.drop import Drop
from repfx.passes.expand import Expand
from repfx.passes.fuse import Fuse
from repfx.records.journal import Action
from repfx.training.runs.history import Epoch

Names = tuple[str, ...]
_NAMED = {Expand.kind: "grown", Drop.kind: "dropped"}


@dataclass(frozen=True)
class Changes:
    """Changes of a model's structure at the end of an epoch or, for epoch 0, before training.

    Args:
        epoch: number of the epoch.
        grown, dropped: names of branches by site. A branch that was folded and grown anew is in both.
        others: paths of sites by the kind of action, for all actions but `Expand` and `Drop`.
        order: ``grown``, ``dropped`` and the kinds in `others`, in the order in which they first happened.
    """

    epoch: int
    grown: Mapping[str, Names] = field(default_factory=dict)
    dropped: Mapping[str, Names] = field(default_factory=dict)
    others: Mapping[str, Names] = field(default_factory=dict)
    order: Names = ()

    def __bool__(self) -> bool:
        return bool(self.order)


@dataclass(frozen=True)
class Deed:
    """One change, and all sites at which it was made.

    Args:
        what: ``grown``, ``dropped``, or the kind of another action.
        branches: names of the branches that grew or were dropped; empty for any other action.
        sites: paths of the sites.
    """

    what: str
    branches: Names
    sites: Names


def changes_of(epoch: Epoch) -> Changes:
    """Return what the actions of an epoch changed, given the branches that its `blocks` list.

    Epoch 0 starts without branches, because its `blocks` are those after its actions.
    """
    return _followed(epoch)[0]


def structure_after(epoch: Epoch) -> dict[str, Names]:
    """Return the names of the branches by site after an epoch's actions. Sites without branches are left out.

    >>> from repfx.passes.drop import Drop
    >>> structure_after(Epoch(3, actions=(Drop("0", "1x1"),), blocks={"0": {"origin": 1.0, "1x1": 0.1, "1xk": 0.5}}))
    {'0': ('1xk',)}
    """
    after = _followed(epoch)[1] if epoch.epoch else _own_branches(epoch)
    return {site: tuple(names) for site, names in after.items() if names}


def _followed(epoch: Epoch) -> tuple[Changes, dict[str, list[str]]]:
    """Follow the actions of an epoch one by one. Return what they changed, and the branches by site afterwards."""
    branches = _own_branches(epoch) if epoch.epoch else {}
    grown: dict[str, list[str]] = {}
    dropped: dict[str, list[str]] = {}
    others: dict[str, list[str]] = {}
    for action in epoch.actions:
        if isinstance(action, Expand):
            names = [branch.name or branch.kind for branch in action.branches]
            branches.setdefault(action.site, []).extend(names)
            grown.setdefault(action.site, []).extend(names)
            continue
        for site, leaving in _leaving(action, branches):
            branches[site] = [name for name in branches.get(site, ()) if name not in leaving]
            dropped.setdefault(site, []).extend(leaving)
        if not isinstance(action, Drop):
            others.setdefault(action.kind, []).append(action.site)
    order = tuple(dict.fromkeys(_NAMED.get(action.kind, action.kind) for action in epoch.actions))
    return Changes(epoch.epoch, _fixed(grown), _fixed(dropped), _fixed(others), order), branches


def _own_branches(epoch: Epoch) -> dict[str, list[str]]:
    return {site: [name for name in names if name != ORIGIN] for site, names in epoch.blocks.items()}


def deeds(changes: Changes) -> list[Deed]:
    """Summarise changes in few entries: sites with the same change share one.

    Branches that a fold absorbed are not listed as dropped, because the entry of the fold covers them.
    """
    folded = set(changes.others.get(Fuse.kind, ()))
    dropped = {site: names for site, names in changes.dropped.items() if not _lies_in(site, folded)}
    found = [
        Deed(what, branches, sites)
        for what, by_site in (("grown", changes.grown), ("dropped", dropped))
        for branches, sites in _together(by_site).items()
    ]
    found += [Deed(kind, (), sites) for kind, sites in changes.others.items()]
    return sorted(found, key=lambda deed: changes.order.index(deed.what))


def when(epoch: int) -> str:
    """Say in words when the actions of an epoch were done.

    >>> when(0), when(3)
    ('before training', 'after epoch 3')
    """
    return f"after epoch {epoch}" if epoch else "before training"


def count_of(by_site: Mapping[str, Names]) -> int:
    """Count the branches of all sites together."""
    return sum(map(len, by_site.values()))


def _leaving(action: Action, branches: Mapping[str, list[str]]) -> list[tuple[str, list[str]]]:
    """List the branches that an action removes, by site. Blocks inside the removed branches lose theirs, too."""
    if isinstance(action, Fuse):
        gone, prefix = list(branches.get(action.site, ())), f"{action.site}."
    elif isinstance(action, Drop):
        gone, prefix = [action.branch], f"{action.site}.{action.branch}."
    else:
        return []
    inside = [(site, list(names)) for site, names in branches.items() if site.startswith(prefix) and names]
    return [(action.site, gone), *inside] if gone else inside


def _fixed(by_key: Mapping[str, list[str]]) -> dict[str, Names]:
    return {key: tuple(names) for key, names in by_key.items()}


def _together(by_site: Mapping[str, Names]) -> dict[Names, Names]:
    found: dict[Names, list[str]] = {}
    for site, names in by_site.items():
        found.setdefault(names, []).append(site)
    return {names: tuple(sites) for names, sites in found.items()}


def _lies_in(site: str, others: Iterable[str]) -> bool:
    return any(f"{site}.".startswith(f"{other}.") for other in others)
