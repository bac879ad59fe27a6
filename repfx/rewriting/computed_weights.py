"""Weights that hooks compute before each forward: `torch.nn.utils.weight_norm`, `spectral_norm` and `prune` of torch's older kind."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import remove_spectral_norm, remove_weight_norm
from torch.nn.utils.prune import BasePruningMethod, remove
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from repfx.algebra.layers import Layer, is_batch_norm, is_conv_or_linear


def fix_weights(model: nn.Module) -> None:
    """Give each conv, linear layer and BatchNorm of a model in eval mode the weights that its hooks compute, in place of the hooks."""
    for module in model.modules():
        if is_conv_or_linear(module) or is_batch_norm(module):
            for hook in list(module._forward_pre_hooks.values()):
                _fix(module, hook)


def _fix(module: Layer, hook: object) -> None:
    if isinstance(hook, WeightNorm):
        trained = getattr(module, f"{hook.name}_v").requires_grad
        remove_weight_norm(module, hook.name)
        getattr(module, hook.name).requires_grad_(trained)
    elif isinstance(hook, SpectralNorm):
        trained = getattr(module, f"{hook.name}_orig").requires_grad
        remove_spectral_norm(module, hook.name)
        getattr(module, hook.name).requires_grad_(trained)
    elif isinstance(hook, BasePruningMethod):
        remove(module, hook._tensor_name)
