"""`Schedule`: when and how the structure of a model changes while it trains, as a pure function of what was observed.

A schedule is one file in `repfx/schedules/`: a frozen dataclass that names itself and returns, for an `Observation`, the actions to be
done. The `Driver` observes, applies the actions and lets the optimizer follow; a schedule never sees a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, TypeVar

from repfx.algebra.conv_spec import ConvSpec
from repfx.blocks.presets import SpecLike
from repfx.blocks.selection import Selection
from repfx.change.companion import Companion, Run
from repfx.errors import InvalidInput, UnknownName
from repfx.passes.squeeze import Squeeze
from repfx.records.journal import Action
from repfx.records.registry import Registry

SCHEDULES: Registry[type[Schedule]] = Registry("repfx.schedules")
_Own = TypeVar("_Own", bound="Schedule")


@dataclass(frozen=True)
class Candidate:
    """A conv that can become a block, or a linear layer if the schedule takes them.

    Args:
        site: path of the conv.
        conv: sizes of the conv.
        depth: number of blocks that the conv lies in.
        saliency: mean of the schedule's `metric` over the steps since the last adjustment.
        own: whether it is the own conv of a block.
    """

    site: str
    conv: ConvSpec
    depth: int = 0
    saliency: float = 0.0
    own: bool = False


@dataclass(frozen=True)
class ObservedBlock:
    """A block, as a schedule sees it.

    Args:
        site: path of the block.
        conv: sizes of the site's own conv.
        branches: names of the branches, in order.
        scales: mean |γ|, relative to the origin's, of each branch that ends in a BatchNorm; empty if the origin has no γ.
        normalised: whether the site has a BatchNorm of its own, in the block or behind its sum.
        depth: number of blocks that the block lies in.
        frozen: whether the site's own conv is frozen at present.
        gates: style of the gates of the block's paths, or None if they have no gates.
        running: names of the paths that run in eval mode: ``origin``, which is the site's own conv, and branches.
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
    """The state of a model in training, as a schedule sees it when it decides.

    Args:
        epoch: number of epochs that are over.
        candidates: the convs that can become blocks, in the model's order, without those that aren't trained.
        blocks: the blocks, in the model's order. Blocks whose own conv isn't trained are left out, unless `Freeze` has frozen it, it
            rests, or the block has gates.
        sites: paths of all blocks, including those left out of `blocks`.
    """

    epoch: int
    candidates: Sequence[Candidate] = ()
    blocks: Sequence[ObservedBlock] = ()
    sites: Sequence[str] = ()


@dataclass(frozen=True)
class Schedule:
    """Base of all schedules. A subclass is a frozen dataclass; one with a `name` is registered at once, for the command line too.

    A subclass defines `decide`, and may also set:

    - `metric`: the saliency that is observed of the candidates, from `repfx.change.saliency.METRICS`; None for none.
    - `batches`: the most batches of data on which new BatchNorms are calibrated; None for all.
    - `needs_data`: whether its actions need data.
    - `takes_linear`: whether linear layers are candidates, too.
    - `grows_own_convs`: whether the own convs of blocks are candidates, too; see `Spec.norm_behind`.
    - `needs_score`: whether it scores candidates, so that the driver needs `score`.
    - `closes_paths`: whether some paths of a block don't run in a step, so that their parameters get no gradient.
    - `nets_per_step`: the number of nets over which a step averages, if the training loop uses `Driver.shares`.
    - `companion`: the object that acts in a run beside the schedule's actions.
    - `cycle`: the number of epochs after which the state of the optimizers begins anew each time, and the learning rate should, too;
      None for never.

    Args:
        squeeze_from: number of epochs after which all blocks are squeezed. From then on, BatchNorms inside blocks keep the statistics
            that they have, each block runs as one conv, an epoch costs about what the plain model's does, and nothing else is
            decided. 0 is for branches without BatchNorm, such as those of ``orepa``. None: never.
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
    def takes_linear(self) -> bool:
        return False

    @property
    def grows_own_convs(self) -> bool:
        return False

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
        """Return the object that acts in a run beside the driver."""
        return Companion()

    def is_due(self, epoch: int) -> bool:
        """Tell whether anything is to be done after `epoch` epochs; 0 is before the first."""
        if self.squeeze_from is None or epoch < self.squeeze_from:
            return self.due(epoch)
        return epoch == self.squeeze_from

    def plan(self, seen: Observation) -> Sequence[Action]:
        """Return the actions to be done now, in order, including those that `squeeze_from` asks for."""
        if seen.epoch != self.squeeze_from:
            return self.decide(seen)
        first = self.decide(seen) if seen.epoch == 0 and self.due(0) else ()
        new = [each for each in first if each.kind == "expand"]
        # tracked norms have measured nothing yet, and needn't be held
        squeezed = [Squeeze(each.site, frozen=getattr(each, "norm", "") != "tracked") for each in new]
        return [*first, *map(Squeeze, seen.sites), *squeezed]

    def require_squeezable(self) -> None:
        """Raise `InvalidInput` if `squeeze_from` is no possible number of epochs."""
        epoch: Any = self.squeeze_from
        least = 0 if self.due(0) else 1
        valid = epoch is None or (isinstance(epoch, int) and not isinstance(epoch, bool) and epoch >= least)
        require(valid, f"squeeze_from is {epoch!r}; it must be a whole number of epochs, from {least} on.")

    def due(self, epoch: int) -> bool:
        """Tell whether `decide` is to be called after `epoch` epochs; 0 is before the first."""
        return epoch > 0

    def decide(self, seen: Observation) -> Sequence[Action]:
        """Return the changes to be made now, in order."""
        raise NotImplementedError

    def attach_rate(self, time: float) -> float | None:
        """Return λ of all blocks that have one, `time` epochs after the beginning; None leaves it as it is."""
        return None

    @classmethod
    def over(cls: type[_Own], epochs: int, /, **options: Any) -> _Own:
        """Return this schedule for a training of `epochs` epochs, in the proportions of its paper, except for the options given.

        Raises:
            InvalidInput: there is no such option, or its value isn't possible.
        """
        unknown = sorted(options.keys() - {each.name for each in fields(cls)})
        if unknown:
            raise UnknownName(f"option of {cls.__name__}", unknown[0], (each.name for each in fields(cls)))
        for each in fields(cls):
            if each.name in options:
                _require_kind(each.name, options[each.name], str(each.type))
        found = cls(**{**cls._proportions(epochs, options), **options})
        found.require_squeezable()
        late = found.squeeze_from is not None and found.squeeze_from >= epochs
        require(
            not late, f"squeeze_from is {found.squeeze_from}; it must be less than the {epochs} epochs of the training."
        )
        return found

    @classmethod
    def _proportions(cls, epochs: int, options: Mapping[str, Any]) -> dict[str, Any]:
        return {}


class Unchanged(Schedule):
    """A schedule that changes nothing."""

    def due(self, epoch: int) -> bool:
        return False


def require(condition: bool, message: str) -> None:
    """Raise `InvalidInput` with this message unless the condition holds."""
    if not condition:
        raise InvalidInput(message)


def require_conv_spec(spec: SpecLike, schedule: Schedule) -> None:
    """Raise `InvalidInput` if a schedule that grows branches beside convs alone gets a spec that is for linear layers alone."""
    if any(each.layers == "linear" for _, each in Selection.of(spec).patterns):
        name = type(schedule).__name__
        raise InvalidInput(
            f"{name} grows branches beside convs, and its spec is for linear layers: give it layers='conv'."
        )


_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "bool": ((bool,), "true or false"),
}


def _require_kind(name: str, value: Any, annotation: str) -> None:
    """Raise `InvalidInput` if an option must be a number, or true or false, and the value is something else."""
    kinds, needed = _KINDS.get(annotation.removesuffix(" | None"), ((), ""))
    fits = type(value) in kinds or (value is None and annotation.endswith("None"))
    require(fits or not kinds, f"{name} is {value!r}; it must be {needed}.")
