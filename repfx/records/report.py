"""`Report`: the changes that a pass made and the places it left alone, as values, kept with the model they describe."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import nn

from repfx.errors import Refused
from repfx.records.notes import keep, kept
from repfx.records.wrappers import innermost

_ATTRIBUTE = "repfx_report"


@dataclass(frozen=True)
class Edit:
    """One change: which rule or pass made it, at which module path, from which modules."""

    rule: str
    path: str
    sources: tuple[str, ...] = ()

    def __str__(self) -> str:
        origin = f" from {', '.join(map(repr, self.sources))}" if self.sources else ""
        return f"{self.rule} {self.path!r}{origin}"


@dataclass(frozen=True)
class Skip:
    """Something left alone: where, why, and by which rule or pass."""

    path: str
    reason: str
    rule: str = ""

    def __str__(self) -> str:
        return f"Skip {self.path!r}: {self.reason}" + (f" ({self.rule})" if self.rule else "")


@dataclass(frozen=True)
class Note:
    """Something that a pass has done with a module and that its users should know: where, and what."""

    path: str
    text: str

    def __str__(self) -> str:
        return f"Note {self.path!r}: {self.text}"


@dataclass(frozen=True)
class Report:
    """The changes of a pass (`applied`), what it left alone and why (`skipped`), and optional merges it decided against (`declined`).

    `stays` lists every conv and BatchNorm of a fused model, and why it is there. `notes` tells what else users should know.

    >>> print(Report("expand", (Edit("expand", "conv1"),), (Skip("conv2", "the window is 1×1 already"),)))
    expand: 1 change, 1 left alone
      Skip 'conv2': the window is 1×1 already
    """

    name: str
    applied: tuple[Edit, ...] = ()
    skipped: tuple[Skip, ...] = ()
    declined: tuple[Skip, ...] = ()
    stays: tuple[Skip, ...] = ()
    notes: tuple[Note, ...] = ()

    @property
    def counts(self) -> dict[str, int]:
        """The number of times each rule was applied."""
        return dict(Counter(edit.rule for edit in self.applied))

    def require_all(self) -> None:
        """Raise `Refused` if anything was left alone."""
        if self.skipped:
            lines = "\n  ".join(map(str, self.skipped))
            raise Refused(f"{self.name} with strict=True left {len(self.skipped)} alone:\n  {lines}")

    def attach(self, model: nn.Module) -> None:
        """Keep this report with the model."""
        keep(model, _ATTRIBUTE, self)

    def __str__(self) -> str:
        changes = f"{len(self.applied)} change{'' if len(self.applied) == 1 else 's'}"
        lines = [f"{self.name}: {changes}, {len(self.skipped)} left alone", *map(str, (*self.skipped, *self.notes))]
        return "\n  ".join(lines)


def report(model: nn.Module) -> Report:
    """Return the report of the last verb that made or changed this model, or an empty report if there was none."""
    found = kept(innermost(model), _ATTRIBUTE)
    return found if isinstance(found, Report) else Report("nothing done yet")
