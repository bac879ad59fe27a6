"""`Schedule`: when and how the structure of a model changes while it trains, as a pure function of what was observed.

A schedule is one file in `repfx/schedules/`: a frozen dataclass that names itself and gives, for an `Observation`, the actions to be taken.
The `Driver` observes, applies the actions and carries the optimizer; a schedule never sees a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, TypeVar

from repfx.algebra.conv_spec import ConvSpec
from repfx.change.companion import Companion, Run
from repfx.errors import InvalidInput
from repfx.passes.squeeze import Squeeze
from repfx.records.journal import Action
from repfx.records.registry import Registry

SCHEDULES: Registry[type[Schedule]] = Registry("repfx.schedules")
_Own = TypeVar("_Own", bound="Schedule")


@dataclass(frozen=True)
class Candidate:
    """A conv that can become a block.

    Args:
        site: its path.
        conv: its sizes.
        depth: how many blocks it lies in.
        saliency: mean over the steps since the last adjustment, of the schedule's `metric`.
    """

    site: str
    conv: ConvSpec
    depth: int = 0
    saliency: float = 0.0


@dataclass(frozen=True)
class ObservedBlock:
    """A block.

    Args:
        site: its path.
        conv: the sizes of its own conv.
        branches: their names, in order.
        scales: for each branch that ends in a BatchNorm, mean |γ| of it, relative to the origin's; empty where the origin has no γ.
        normalised: whether the site's own BatchNorm is the origin's.
        depth: how many blocks it lies in.
        frozen: whether its own conv is left alone at present.
        gates: the style of its paths' gates, if they have any.
        running: the paths that run in eval mode: ``origin``, its own conv, and branches.
    """

    site: str
    conv: ConvSpec
    branches: tuple[str, ...]
    scales: Mapping[str, float]
    normalised: bool = True
    depth: int = 0
    frozen: bool = False
    gates: str | None = None
    running: tuple[str, ...] = ()


@dataclass(frozen=True)
class Observation:
    """What a schedule decides by.

    Args:
        epoch: how many epochs are over.
        candidates, blocks: in the model's order; without those whose own conv isn't trained, but for what `Freeze` froze.
        sites: the paths of all blocks, those that aren't trained, too.
    """

    epoch: int
    candidates: Sequence[Candidate] = ()
    blocks: Sequence[ObservedBlock] = ()
    sites: Sequence[str] = ()


@dataclass(frozen=True)
class Schedule:
    """Base of all schedules. A subclass is a frozen dataclass; with a `name` it is registered at once, for the command line too.

    What it may set, beside `decide`:

    - `metric`: which saliency of the candidates is observed, of `repfx.change.saliency.METRICS`; None for none.
    - `batches`: how many batches of the data new BatchNorms are calibrated on at most; None for all.
    - `needs_data`: whether its actions can't be done without.
    - `needs_score`: whether it scores candidates, so that the driver has to be given `score`.
    - `closes_paths`: whether some paths of a block don't run in a step, so that their parameters get no gradient.
    - `nets_per_step`: over how many nets a step averages, if the loop goes through `Driver.shares`.
    - `companion`: what it brings along to a run beside its actions.
    - `cycle`: after how many epochs the state of the optimizers begins anew, and the learning rate should; None for never.

    Args:
        squeeze_from: after so many epochs the BatchNorms inside all blocks keep the statistics that they have, the blocks run as one
            conv each, and the last epochs cost about what the plain model's do; nothing else is decided from then on. 0 is for
            branches that have no BatchNorm, as those of ``orepa``. None: never.
    """

    name: ClassVar[str]
    needs_data: ClassVar[bool] = False
    needs_score: ClassVar[bool] = False
    closes_paths: ClassVar[bool] = False

    squeeze_from: int | None = field(default=None, kw_only=True)

    def __init_subclass__(cls) -> None:
        if "name" in vars(cls):
            SCHEDULES[cls.name] = cls

    @property
    def metric(self) -> str | None:
        return None

    @property
    def batches(self) -> int | None:
        return None

    @property
    def cycle(self) -> int | None:
        return None

    @property
    def nets_per_step(self) -> int:
        return 1

    def companion(self, run: Run) -> Companion:
        """Give what acts in a run beside the driver."""
        return Companion()

    def is_due(self, epoch: int) -> bool:
        """Whether anything is to be done after so many epochs; 0 is before the first."""
        if self.squeeze_from is None or epoch < self.squeeze_from:
            return self.due(epoch)
        return epoch == self.squeeze_from

    def plan(self, seen: Observation) -> Sequence[Action]:
        """What is to be done now, in this order."""
        if seen.epoch != self.squeeze_from:
            return self.decide(seen)
        first = self.decide(seen) if seen.epoch == 0 and self.due(0) else ()
        return [*first, *map(Squeeze, [*seen.sites, *(each.site for each in first if each.kind == "expand")])]

    def require_squeezable(self) -> None:
        """Raise `InvalidInput` if `squeeze_from` is no epoch."""
        epoch: Any = self.squeeze_from
        least = 0 if self.due(0) else 1
        valid = epoch is None or (isinstance(epoch, int) and not isinstance(epoch, bool) and epoch >= least)
        require(valid, f"squeeze_from is {epoch!r}; it must be a whole number of epochs, from {least} on.")

    def due(self, epoch: int) -> bool:
        """Whether to adjust after so many epochs; 0 is before the first."""
        return epoch > 0

    def decide(self, seen: Observation) -> Sequence[Action]:
        """What to change now, in this order."""
        raise NotImplementedError

    def attach_rate(self, time: float) -> float | None:
        """λ of all blocks that have one, so many epochs after the beginning; None leaves it as it is."""
        return None

    @classmethod
    def over(cls: type[_Own], epochs: int, /, **options: Any) -> _Own:
        """This schedule for a training of so many epochs, in the proportions of its paper, but for the options that are given.

        Raises:
            InvalidInput: no such option, or a value that can't be.
        """
        unknown = sorted(options.keys() - {each.name for each in fields(cls)})
        if unknown:
            known = ", ".join(each.name for each in sorted(fields(cls), key=lambda each: bool(each.kw_only)))
            raise InvalidInput(f"{cls.__name__} has no option {', '.join(unknown)}; it has {known}.")
        for each in fields(cls):
            if each.name in options:
                _require_kind(each.name, options[each.name], str(each.type))
        found = cls(**{**cls._proportions(epochs, options), **options})
        found.require_squeezable()
        late = found.squeeze_from is not None and found.squeeze_from >= epochs
        require(not late, f"squeeze_from is {found.squeeze_from}, and the training has {epochs} epochs.")
        return found

    @classmethod
    def _proportions(cls, epochs: int, options: Mapping[str, Any]) -> dict[str, Any]:
        return {}


class Unchanged(Schedule):
    """No change at all."""

    def due(self, epoch: int) -> bool:
        return False


def require(condition: bool, message: str) -> None:
    """Raise `InvalidInput` for an option that can't be."""
    if not condition:
        raise InvalidInput(message)


_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "bool": ((bool,), "true or false"),
}


def _require_kind(name: str, value: Any, annotation: str) -> None:
    """Raise `InvalidInput` for an option that is a number, or true or false, if the value is something else."""
    kinds, needed = _KINDS.get(annotation.removesuffix(" | None"), ((), ""))
    fits = type(value) in kinds or (value is None and annotation.endswith("None"))
    require(fits or not kinds, f"{name} is {value!r}; it must be {needed}.")
