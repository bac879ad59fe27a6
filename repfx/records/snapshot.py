"""`Snapshot`: a model as it is now, to which it can be put back in place."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import nn


class Snapshot:
    """The modules of a model, all that they hold, and the numbers of its tensors.

    Putting it back keeps every object: modules, parameters and buffers are the ones that they were. It needs as much memory as the model's
    tensors do.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    >>> before = Snapshot(model)
    >>> _ = nn.init.zeros_(model[0].weight), model.pop(1)
    >>> before.put_back()
    >>> len(model), bool(model[0].weight.any())
    (2, True)
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = [(module, type(module), _contents(vars(module))) for module in model.modules()]
        tensors = (*model.parameters(), *model.buffers())
        self._tensors = [(tensor, tensor.detach().clone(), tensor.requires_grad, tensor.grad) for tensor in tensors]

    @torch.no_grad()
    def put_back(self) -> None:
        """Give the modules and tensors what they had."""
        for module, own_class, contents in self._modules:
            module.__class__ = own_class
            vars(module).clear()
            vars(module).update(_contents(contents))
        for tensor, value, requires_grad, grad in self._tensors:
            if tensor.shape == value.shape and tensor.dtype == value.dtype and tensor.device == value.device:
                tensor.copy_(value)
            else:
                tensor.data = value
            tensor.requires_grad_(requires_grad)
            tensor.grad = grad


def _contents(value: Any) -> Any:
    """Copy plain containers, and keep what is in them."""
    if type(value) in (dict, OrderedDict):
        return type(value)((key, _contents(each)) for key, each in value.items())
    return type(value)(map(_contents, value)) if type(value) in (list, set) else value
