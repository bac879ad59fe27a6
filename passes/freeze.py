"""`freeze`: a block's own conv and BatchNorm stay as they are while its branches learn."""

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
    """A block's own conv and BatchNorm are no longer trained, or are again.

    Args:
        frozen: whether they are left alone.
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
    """Let an optimizer leave a block's own conv and BatchNorm alone, or train them again.

    The model is changed in place and returned. What was frozen before stays so afterwards. Only parameters are frozen: in training mode
    the BatchNorm goes on taking the statistics of each batch, for its input changes with what is trained.

    Args:
        site: path of the block.
        frozen: False lets them be trained again.

    Raises:
        UnknownName: no block at that path; InvalidInput: no block at all.

    >>> from repfx.passes.expand import expand
    >>> model = freeze(expand(nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)), "acb"), "0")
    >>> sorted({name.split(".")[1] for name, parameter in model.named_parameters() if parameter.requires_grad})
    ['1xk', 'kx1']
    """
    apply(model, [Freeze(site, frozen)], None)
    Report("freeze", (Edit("freeze", site),)).attach(model)
    return model


def is_frozen(block: RepBlock) -> bool:
    """Whether `freeze` left a block's own conv alone."""
    return bool(_frozen(block))


def _frozen(block: RepBlock) -> tuple[str, ...]:
    """The names of the origin's parameters that `freeze` froze."""
    found = kept(block, _ATTRIBUTE)
    return found if isinstance(found, tuple) else ()
