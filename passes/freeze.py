"""`freeze`: keep a block's own conv and BatchNorm as they are while its branches learn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from repfx.blocks.block import RepBlock
from repfx.blocks.paths import block_at
from repfx.records.journal import Action, apply
from repfx.records.notes import keep, kept
from repfx.records.report import Edit, Report
from repfx.rewriting.pipeline import verb

_ATTRIBUTE = "repfx_frozen"


@dataclass(frozen=True)
class Freeze(Action):
    """Freeze a block's own conv and BatchNorm, or let them be trained again.

    Args:
        frozen: False lets them be trained again.
    """

    kind: ClassVar[str] = "freeze"
    frozen: bool = True

    moves_kernels = False

    def do(self, model: nn.Module) -> None:
        block = block_at(model, self.site)
        parameters = dict(block.origin.named_parameters())
        trained = [name for name, each in parameters.items() if each.requires_grad]
        chosen = trained if self.frozen else _frozen(block)
        for name in chosen:
            parameters[name].requires_grad_(not self.frozen)
            parameters[name].grad = None
        keep(block, _ATTRIBUTE, tuple(dict.fromkeys((*_frozen(block), *chosen))) if self.frozen else ())

    def __str__(self) -> str:
        return f"{'freeze' if self.frozen else 'thaw'} {self.site}"


@verb
def freeze(model: nn.Module, site: str, *, frozen: bool = True) -> nn.Module:
    """Freeze a block's own conv and BatchNorm, so that only its branches learn; or let them be trained again.

    The model is changed in place and returned. Parameters that weren't trained before `freeze` aren't trained after it is undone,
    either. Only parameters are frozen: in training mode the BatchNorm still takes the statistics of each batch, because its input
    changes with the layers that are trained.

    Args:
        site: path of the block.
        frozen: False lets conv and BatchNorm be trained again.

    Raises:
        UnknownName: there is no block at that path; InvalidInput: the model has no blocks.

    >>> from repfx.passes.expand import expand
    >>> model = freeze(expand(nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)), "acb"), "0")
    >>> sorted({name.split(".")[1] for name, parameter in model.named_parameters() if parameter.requires_grad})
    ['1xk', 'kx1']
    """
    apply(model, [Freeze(site, frozen)], None)
    Report("freeze", (Edit("freeze", site),)).attach(model)
    return model


def is_frozen(block: RepBlock) -> bool:
    """Whether `freeze` has frozen a block's own conv."""
    return bool(_frozen(block))


def _frozen(block: RepBlock) -> tuple[str, ...]:
    """Return the names of the origin's parameters that `freeze` has frozen."""
    found = kept(block, _ATTRIBUTE)
    return found if isinstance(found, tuple) else ()
