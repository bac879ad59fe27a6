"""Values that a module carries beside its tensors, through copying and pickling."""

from __future__ import annotations

from torch import fx, nn


def keep(module: nn.Module, name: str, value: object) -> None:
    """Let `module` carry `value` as its plain attribute `name`."""
    setattr(module, name, value)
    if isinstance(module, fx.GraphModule):
        module.meta[name] = value  # all that copying keeps of a GraphModule's own attributes


def kept(module: nn.Module, name: str) -> object | None:
    """What `module` carries under `name`, or None."""
    value = vars(module).get(name)
    if value is None and isinstance(module, fx.GraphModule):
        return module.meta.get(name)
    return value
