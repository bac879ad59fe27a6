"""`Structure`: the history of a model's layers, as plain values and tensors. `Skeleton`: its layers now, to which it can be taken back."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from repfx.algebra.moments import Moments
from repfx.blocks.folded_norm import folded_norm, remember_norm
from repfx.errors import InvalidInput
from repfx.records.journal import Action, forget, from_json, journal, record, replay, require_told, to_json
from repfx.records.module_tree import same_class
from repfx.records.notes import copy_without_numbers


@dataclass(frozen=True, eq=False)
class Structure:
    """The history of a model's layers: all that a checkpoint holds of the model beside its weights.

    Args:
        journals: the journals of the model and of all modules in it that have one, such as the model inside an `AveragedModel`, by path.
        folded: mean and variance of the BatchNorms that convs have absorbed, which `restore` needs, by the conv's path.

    >>> import repfx
    >>> model = repfx.expand(nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)), "acb")
    >>> again = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    >>> Structure.of(model).rebuild(again)
    >>> again.load_state_dict(model.state_dict())
    <All keys matched successfully>
    """

    journals: Mapping[str, str]
    folded: Mapping[str, tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, module: nn.Module) -> Structure:
        """Return the structure that a module has now.

        Raises:
            InvalidInput: a part of it was fused by a method of its own, which its journal doesn't tell.
        """
        require_told(module)
        modules = dict(module.named_modules())
        journals: dict[str, tuple[Action, ...]] = {path: journal(inner) for path, inner in modules.items()}
        notes = {path: folded_norm(inner) for path, inner in modules.items()}
        moments = {path: note.moments for path, note in notes.items() if note is not None}
        return cls(
            {path: to_json(actions) for path, actions in journals.items() if actions},
            {path: (known.mean, known.variance) for path, known in moments.items() if known is not None},
        )

    def rebuild(self, module: nn.Module) -> None:
        """Bring a module to this structure, in place, from any structure that the saved module has gone through.

        Its weights are left to a checkpoint.

        Raises:
            RepfxError: the module has been through other changes.
        """
        for path, text in self.journals.items():
            inner = module.get_submodule(path)
            done, wanted = journal(inner), from_json(text)
            if wanted[: len(done)] != done:
                raise InvalidInput("the model has been through other changes than the one that was saved")
            replay(inner, wanted[len(done) :])
        for path, (mean, variance) in self.folded.items():
            conv = module.get_submodule(path)
            note = folded_norm(conv)
            if note is not None:
                _require_moments(path, conv, mean, variance)
                remember_norm(conv, replace(note, moments=Moments(mean, variance)))


def _require_moments(path: str, conv: Any, mean: Any, variance: Any) -> None:
    for each in (mean, variance):
        if not (isinstance(each, Tensor) and each.is_floating_point() and each.shape == (conv.weight.shape[0],)):
            raise InvalidInput(
                f"the moments of the BatchNorm that {path!r} has absorbed don't fit its {conv.weight.shape[0]} channels"
            )


class Skeleton:
    """The layers of a model as they are now, without their numbers, so that the model can be taken back to them later.

    >>> import repfx
    >>> model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    >>> skeleton = Skeleton(model)
    >>> model = repfx.expand(model, "acb", inplace=True)
    >>> skeleton.take_back(model)
    >>> model, repfx.journal(model)
    (Sequential(
      (0): Conv2d(8, 8, kernel_size=(3, 3), stride=(1, 1))
      (1): BatchNorm2d(8, ...)
    ), ())
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers: Any = copy_without_numbers(model)

    @property
    def journal(self) -> tuple[Action, ...]:
        """The journal that the model had when this object was created."""
        return journal(self._layers)

    def take_back(self, model: nn.Module) -> None:
        """Replace the layers of a model that differ from these, in place. The new layers hold zeros, for a checkpoint to fill."""
        device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
        _take_back(model, self._layers, device)
        forget(model)
        record(model, self.journal)


def _take_back(model: nn.Module, layers: nn.Module, device: torch.device) -> None:
    for name, wanted in layers.named_children():
        found = model.get_submodule(name)
        if _is_alike(found, wanted):
            _take_back(found, wanted, device)
        else:
            setattr(model, name, _with_zeros(wanted, device).train(found.training))


def _is_alike(found: nn.Module, wanted: nn.Module) -> bool:
    """Whether two modules are built alike, regardless of what lies inside their children."""
    makes = []
    for each in (found, wanted):
        own = [*each.named_parameters(recurse=False), *each.named_buffers(recurse=False)]
        sizes = [(name, tuple(tensor.shape)) for name, tensor in own]
        makes.append((sizes, [name for name, _ in each.named_children()], each.extra_repr()))
    return same_class(found, wanted) and makes[0] == makes[1]


@torch.no_grad()
def _with_zeros(layers: nn.Module, device: torch.device) -> nn.Module:
    made: nn.Module = copy.deepcopy(layers).to_empty(device=device)
    for tensor in (*made.parameters(), *made.buffers()):
        tensor.zero_()
    return made
