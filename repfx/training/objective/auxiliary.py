"""DARTS' auxiliary head: a second classifier on a layer in the middle of a net, which is trained with it and then thrown away."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from repfx.data.predictions import logits_of
from repfx.errors import InvalidInput, UnknownName
from repfx.records.module_tree import module_at
from repfx.records.notes import copy_of
from repfx.training.optimizers import make_optimizer
from repfx.training.recipe import Recipe


class Head(nn.Sequential):
    """A classifier of maps ``(batch, channels, height, width)``, each side at least 8, as DARTS has it for CIFAR.

    DARTS' maps are 8 × 8, so that one position is left in the end. Of larger maps, the positions that are left are averaged.

    >>> Head(16, 10)(torch.zeros(2, 16, 8, 11)).shape
    torch.Size([2, 10])
    """

    def __init__(self, channels: int, classes: int) -> None:
        pooled = [nn.ReLU(), nn.AvgPool2d(5, stride=3, count_include_pad=False)]
        first = [nn.Conv2d(channels, 128, 1, bias=False), nn.BatchNorm2d(128), nn.ReLU()]
        second = [nn.Conv2d(128, 768, 2, bias=False), nn.BatchNorm2d(768), nn.ReLU()]
        super().__init__(*pooled, *first, *second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(768, classes))


class Auxiliary:
    """The auxiliary head of a training, with an optimizer of its own.

    Args:
        model: the model that is trained. It isn't changed; only its logits depend on what the head taught it.
        recipe: recipe that has an auxiliary head.
        images: two or more images, on the device of the model.
        classes: number of logits.

    Raises:
        UnknownName: the model has no module at the recipe's path.
        InvalidInput: the head doesn't fit what this module outputs.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, images: Tensor, classes: int) -> None:
        assert recipe.auxiliary is not None
        self.path, self.weight = recipe.auxiliary.module, recipe.auxiliary.weight
        if module_at(model, self.path) is None:
            raise UnknownName("module", self.path, [path for path, _ in model.named_modules() if path])
        with torch.no_grad():
            features = _Listening(copy_of(model).eval(), self.path)(images)[1]
        if features.ndim != 4 or min(features.shape[2:]) < 8:
            raise InvalidInput(
                f"the auxiliary head can't stand behind {self.path!r}, whose output is {tuple(features.shape[1:])}: it takes maps of at "
                "least 8 × 8. Name a module nearer to the input."
            )
        with torch.random.fork_rng(devices=[]):  # equal seeds give equal heads, whatever was drawn before
            torch.manual_seed(recipe.seed)
            self.head = Head(features.shape[1], classes).to(features.device, features.dtype)
        self.optimizer = make_optimizer(self.head, recipe, features.device)

    def joined(self, model: nn.Module) -> nn.Module:
        """Return a module that gives the logits of the model and those of the head."""
        return _TwoHeads(_Listening(model, self.path), self.head)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the head and of its optimizer."""
        return {"head": self.head.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state that `state_dict` returned."""
        self.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])


class _Listening(nn.Module):
    """A model that also gives the output of one of its modules. The hook is there only while the model runs, so nothing else sees it."""

    def __init__(self, model: nn.Module, path: str) -> None:
        super().__init__()
        self.model, self.path = model, path

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        heard: list[Tensor] = []
        module = self.model.get_submodule(self.path)
        handle = module.register_forward_hook(lambda module, inputs, output: heard.append(output))
        try:
            logits = logits_of(self.model(x))
        finally:
            handle.remove()
        if len(heard) != 1 or not isinstance(heard[0], Tensor):
            raise InvalidInput(
                f"the auxiliary head needs one tensor from {self.path!r}, which gave {len(heard)} outputs."
            )
        return logits, heard[0]


class _TwoHeads(nn.Module):
    def __init__(self, model: _Listening, head: nn.Module) -> None:
        super().__init__()
        self.model, self.head = model, head

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits, features = self.model(x)
        return logits, self.head(features)
