"""Questions about a layer before it is read: its kind, its hooks, and whether it runs code of its own."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn

# A torch layer whose class is known where it is used. torch types every attribute of a module as `Tensor | Module`.
Layer: TypeAlias = Any

CONVS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

TRANSPOSED_CONVS: tuple[type[nn.Module], ...] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

# layers whose weight is a kernel; a linear layer's has no axes
KERNEL_LAYERS: tuple[type[nn.Module], ...] = (*CONVS, *TRANSPOSED_CONVS, nn.Linear)

BATCH_NORMS: tuple[type[nn.Module], ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

FROZEN_BATCH_NORMS = {"torchvision.ops.misc.FrozenBatchNorm2d", "detectron2.layers.batch_norm.FrozenBatchNorm2d"}

# classes that run a BatchNorm, then their `drop`, then their `act`; each with the class that is the BatchNorm alone
ACTIVATED_BATCH_NORMS = {
    "timm.layers.norm_act.BatchNormAct2d": "torch.nn.BatchNorm2d",
    "timm.layers.norm_act.SyncBatchNormAct": "torch.nn.SyncBatchNorm",
    "timm.layers.norm_act.FrozenBatchNormAct2d": "torchvision.ops.misc.FrozenBatchNorm2d",
}

_LAZY_BATCH_NORMS: tuple[type[nn.Module], ...] = (nn.LazyBatchNorm1d, nn.LazyBatchNorm2d, nn.LazyBatchNorm3d)

_GLOBAL_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)

OWN_CLASS = "repfx_own_class"  # the attribute of a class made here that names the class of the user that it stands for

CODE = ("__call__", "forward", "_conv_forward")  # the methods that say what a layer computes


def template_of(layer: Layer) -> Tensor:
    """Return a tensor of the dtype and on the device of a layer's weight. A parametrized weight isn't computed for this.

    >>> template_of(nn.Conv2d(4, 4, 3).double()).dtype
    torch.float64
    """
    found = next(layer.parameters(), None)
    weight: Tensor = layer.weight if found is None else found
    return weight


def qualified_name(module: Layer) -> str:
    """Return the full name of a module's class, such as ``torch.nn.modules.conv.Conv2d``."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def is_conv(module: nn.Module) -> bool:
    """Whether `module` is some kind of convolution, readable or not."""
    return isinstance(module, CONVS + TRANSPOSED_CONVS)


def is_conv_or_linear(module: nn.Module) -> bool:
    """Whether `module` is some kind of convolution or linear layer, readable or not."""
    return isinstance(module, KERNEL_LAYERS)


def is_batch_norm(module: nn.Module) -> bool:
    """Whether `module` is some kind of BatchNorm, readable or not."""
    name = qualified_name(module)
    return (
        isinstance(module, BATCH_NORMS + _LAZY_BATCH_NORMS)
        or name in FROZEN_BATCH_NORMS
        or name in ACTIVATED_BATCH_NORMS
    )


def takes_batch_statistics(module: Layer) -> bool:
    """Whether `module` is a BatchNorm that normalises by the batch in its present mode."""
    return is_batch_norm(module) and not is_frozen_norm(module) and (module.training or module.running_mean is None)


def keeps_statistics(module: Layer) -> bool:
    """Whether `module` is a BatchNorm that counts batches, because it updates running statistics in training mode."""
    return is_batch_norm(module) and getattr(module, "num_batches_tracked", None) is not None


def is_frozen_norm(module: nn.Module) -> bool:
    """Whether `module` is a BatchNorm whose numbers are all buffers, so that it is the same map in both modes."""
    return qualified_name(module) in FROZEN_BATCH_NORMS


def is_plain_sequence(module: nn.Module) -> bool:
    """Whether a module runs its children one after another and nothing else."""
    return getattr(own_class(module), "forward", None) is nn.Sequential.forward and code_of_its_own(module) is None


def has_tensors(module: nn.Module) -> bool:
    """Whether a module holds parameters or buffers."""
    tables = (table for inner in module.modules() for table in (inner._parameters, inner._buffers))
    return any(tensor is not None for table in tables for tensor in table.values())


def has_hooks(module: nn.Module) -> bool:
    """Whether calling `module` runs hooks, its own or global ones, besides its forward."""
    own = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(own or any(getattr(nn.modules.module, name) for name in _GLOBAL_HOOKS))


def code_of_its_own(module: nn.Module) -> str | None:
    """Why calling `module` runs something other than the forward of its class, or None."""
    if isinstance(module, torch.jit.ScriptModule):
        return "it is compiled by TorchScript"
    if qualified_name(module) == "torch._dynamo.eval_frame.OptimizedModule":
        return "it is compiled by torch.compile"
    if is_patched(module):
        return "its forward was replaced on the instance"
    if has_call_of_its_own(module):
        return f"{type(module).__name__} has a __call__ of its own"
    return None


def has_call_of_its_own(module: nn.Module) -> bool:
    """Whether the class of a module has a `__call__` other than torch's, which may do more than run its forward."""
    return type(module).__call__ is not nn.Module.__call__ and not isinstance(module, fx.GraphModule)


def has_modes_of_its_own(module: nn.Module) -> bool:
    """Whether a change of training or eval mode runs code from outside torch and repfx, which may write into the module's weights."""
    classes = [cls for cls in own_class(module).__mro__ if not cls.__module__.startswith(("torch.", "repfx."))]
    return any(name in vars(owner) for name in ("train", "eval") for owner in (module, *classes))


def own_class(module: nn.Module) -> type[nn.Module]:
    """Return the class of a module, or the class of the user that it stands for while something in the module is squeezed."""
    found: type[nn.Module] = vars(type(module)).get(OWN_CLASS, type(module))
    return found


def own_classes(cls: type) -> tuple[type, ...]:
    """Return the class of a module and its bases, but for `nn.Module` and `object`, in the order of inheritance.

    A class that stands for the user's while something is squeezed isn't among them.
    """
    return tuple(base for base in cls.__mro__ if base not in (nn.Module, object) and OWN_CLASS not in vars(base))


def is_patched(module: nn.Module) -> bool:
    """Whether `module`, as an instance, has one of the methods in `CODE` in place of its class's."""
    return any(name in vars(module) for name in CODE)
