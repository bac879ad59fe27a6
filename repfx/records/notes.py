"""Values that a module carries beside its tensors, through copying and pickling."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import FunctionType
from typing import Any

from torch import fx, nn

from repfx.errors import InvalidInput, first_line
from repfx.records.module_tree import kept_plainly, require_module

_COPIED = "_user_preserved_attributes"  # torch.fx's name: a copied GraphModule keeps only these attributes of its own
_NAMES = "repfx_notes"  # loading drops the above but keeps plain attributes


def keep(module: nn.Module, name: str, value: object) -> None:
    """Let `module` carry `value` as its plain attribute `name`."""
    if name == _NAMES:
        return  # the calls for other names write it
    setattr(module, name, value)
    if isinstance(module, fx.GraphModule):
        names = tuple(dict.fromkeys((*vars(module).get(_NAMES, ()), name)))
        setattr(module, _NAMES, names)
        module.meta.setdefault(_COPIED, {}).update({name: value, _NAMES: names})


def kept(module: nn.Module, name: str) -> object | None:
    """Return what `module` carries under `name`, or None."""
    found: object | None = vars(module).get(name)
    if found is None and isinstance(module, fx.GraphModule):
        return module.meta.get(_COPIED, {}).get(name)  # type: ignore[no-any-return]
    return found


def copy_of(model: nn.Module, memo: dict[int, Any] | None = None) -> Any:
    """Return a deep copy of a model with all that its modules carry, even if the model was saved and loaded before.

    Args:
        memo: objects that replace originals in the copy, by the original's id, as `copy.deepcopy` takes them.

    Raises:
        InvalidInput: `model` is no module, or a part of it is not copied.
    """
    require_module(model)
    for module in model.modules():
        for name in vars(module).get(_NAMES, ()):
            if isinstance(module, fx.GraphModule) and name in vars(module):
                keep(module, name, vars(module)[name])
    try:
        copied = copy.deepcopy(model, memo)
    except Exception as error:
        raise InvalidInput(f"{type(model).__name__} can't be copied: {first_line(error)}.") from error
    originals = {id(module) for module in model.modules()}
    shared = [path for path, module in copied.named_modules() if id(module) in originals]
    if shared:
        raise InvalidInput(f"{shared[0]!r} isn't copied by copy.deepcopy, so a rewrite would change the model itself.")
    for path, name, part in kept_plainly(copied):
        if id(part) in originals:
            what = "is" if isinstance(vars(copied.get_submodule(path))[name], FunctionType) else "holds"
            raise InvalidInput(
                f"{f'{path}.{name}'.lstrip('.')!r} {what} a function that closes over a part of the model. copy.deepcopy doesn't copy "
                "functions, so a copy would run the original's part: make it a method."
            )
    return copied


def copy_without_numbers(model: nn.Module, instead: Mapping[int, Any] | None = None) -> Any:
    """Return a deep copy of a model, as `copy_of` does, with parameters and buffers on the meta device.

    Args:
        instead: what takes the place of an object in the copy, by the object's id.

    Raises:
        InvalidInput: as `copy_of`.
    """
    memo: dict[int, Any] = {id(buffer): buffer.detach().to("meta") for buffer in model.buffers()}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
    return copy_of(model, {**memo, **(instead or {})})
