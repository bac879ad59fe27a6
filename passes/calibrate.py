"""`calibrate`: measure the running statistics of BatchNorms anew on data."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from repfx.algebra.layers import keeps_statistics
from repfx.errors import InvalidInput
from repfx.measuring.calibration import calibrate_norms
from repfx.records.journal import Action, record
from repfx.records.report import Edit, Report
from repfx.rewriting.pipeline import verb


@dataclass(frozen=True)
class Calibrate(Action):
    """Measure the running statistics of all BatchNorms in a module anew; without data they stay as they are.

    Args:
        site: path of the module; empty for the whole model.
    """

    kind: ClassVar[str] = "calibrate"

    moves_kernels = False

    @classmethod
    def apply(cls, model: nn.Module, actions: Sequence[Calibrate], calibrate: Iterable[Any] | None) -> None:
        for action in actions:
            if calibrate is not None and _norms(model, action.site):
                _measure(model, action.site, calibrate)
        record(model, actions)

    def __str__(self) -> str:
        return f"calibrate {self.site or 'all BatchNorms'}"


@verb
def calibrate(model: nn.Module, batches: Iterable[Any], *, site: str = "") -> nn.Module:
    """Measure the running statistics of BatchNorms anew in a pass over data, in place.

    Each BatchNorm gets the average of its statistics over all batches. Everything else runs in eval mode, and no parameter changes.
    A net needs this if its paths were trained in changing combinations, or if its weights are an average: afterwards it computes
    in eval mode what it computes in training mode. The model is returned.

    Args:
        batches: inputs of the model, or a data loader.
        site: path of a module, if only the BatchNorms inside it are to be measured.

    Raises:
        InvalidInput: there is no BatchNorm with running statistics, or the data can't be used.

    >>> import torch
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    >>> batch = torch.randn(16, 3, 9, 7)
    >>> round(calibrate(model, [batch]).eval()(batch).var(correction=0).item(), 2)
    1.0
    """
    _measure(model, site, batches)
    record(model, [Calibrate(site)])
    Report("calibrate", (Edit("calibrate", site),)).attach(model)
    return model


def _measure(model: nn.Module, site: str, batches: Iterable[Any]) -> None:
    kept = _norms(model, site)
    if not kept:
        raise InvalidInput(f"{site or type(model).__name__} has no BatchNorm with running statistics.")
    before = [copy.deepcopy(norm.state_dict()) for norm in kept]
    try:
        calibrate_norms(model, kept, batches)
    except Exception:
        for norm, state in zip(kept, before):
            norm.load_state_dict(state)
        raise


def _norms(model: nn.Module, site: str) -> list[Any]:
    """Return the BatchNorms with running statistics inside the module at `site`."""
    return [module for module in model.get_submodule(site).modules() if keeps_statistics(module)]
