"""Values that a module carries beside its tensors, through copying and pickling."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

from torch import Tensor, fx, nn

from repfx.errors import InvalidInput, first_line
from repfx.records.copied_hooks import copy_hooks
from repfx.records.modes import set_modes
from repfx.records.module_tree import kept_plainly, require_module, require_sizes
from repfx.records.wrappers import bare

_COPIED = "_user_preserved_attributes"  # torch.fx's name: a copied GraphModule keeps only these attributes of its own
_NAMES = "repfx_notes"  # loading drops the above but keeps plain attributes


class NotedGraphModule(fx.GraphModule):
    """A `GraphModule` that has its notes after it was pickled, and after the unpickled one was copied."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, super().__reduce__()


def _unpickled(make: Callable[..., Any], arguments: tuple[Any, ...]) -> nn.Module:
    """Return the module that torch.fx makes, in a class of its own, with its notes where copying finds them."""
    module: Any = make(*arguments)
    cls: Any = type(NotedGraphModule.__new__(NotedGraphModule))
    cls.__name__ = type(module).__name__
    module.__class__ = cls
    module.recompile()
    _keep_again(module)
    return module  # type: ignore[no-any-return]


def _keep_again(module: nn.Module) -> None:
    """Keep the notes of a module that was unpickled, so that they are copied with it."""
    for name in vars(module).get(_NAMES, ()):
        if name in vars(module):
            keep(module, name, vars(module)[name])


def keep(module: nn.Module, name: str, value: object) -> None:
    """Let `module` carry `value` as its plain attribute `name`."""
    if name == _NAMES:
        return  # the calls for other names write it
    setattr(module, name, value)
    if isinstance(module, fx.GraphModule):
        names = tuple(dict.fromkeys((*vars(module).get(_NAMES, ()), name)))
        setattr(module, _NAMES, names)
        module.meta = _meta(module)
        module.meta.setdefault(_COPIED, {}).update({name: value, _NAMES: names})


def kept(module: nn.Module, name: str) -> object | None:
    """Return what `module`, or the module inside its wrappers, carries under `name`, or None."""
    module = bare(module)
    found: object | None = vars(module).get(name)
    if found is None and isinstance(module, fx.GraphModule):
        return _meta(module).get(_COPIED, {}).get(name)  # type: ignore[no-any-return]
    return found


def _meta(module: fx.GraphModule) -> dict[str, Any]:
    """Return the dict `meta` of a graph, or a new one: a feature extractor of torchvision has none until it is copied."""
    found: dict[str, Any] = vars(module).get("meta", {})
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
        if isinstance(module, fx.GraphModule):
            _keep_again(module)
    memo = {**_nothing_in(model), **_computed_in(model), **(memo or {})}
    try:
        copied = copy.deepcopy(model, memo)
    except Exception as error:
        raise InvalidInput(f"{type(model).__name__} can't be copied: {first_line(error)}.") from error
    _complete(copied, model, memo)
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


def _complete(copied: nn.Module, model: nn.Module, memo: dict[int, Any]) -> None:
    """Give a copy what copying leaves out: hooks that reach the copy, and modes that a module's own code has set in copying."""
    originals = dict(model.named_modules())
    inside = [(originals[path], module) for path, module in copied.named_modules() if path in originals]
    for original, module in inside:
        copy_hooks(original, module, memo)
    set_modes((module, original.training) for original, module in inside)


def _nothing_in(model: nn.Module) -> dict[int, Any]:
    """Return new empty dicts and sets, by the id of the original, for those of modules, such as their dicts of hooks.

    Each module has a dozen of them. `copy.deepcopy` takes longer for these than for all the rest.
    """
    values = (
        value for module in model.modules() for value in vars(module).values() if type(value) in (OrderedDict, set)
    )
    return {id(value): type(value)() for value in values if not value and not getattr(value, "__dict__", None)}


def _computed_in(model: nn.Module) -> dict[int, Any]:
    """Return copies, by the id of the original, of tensors that modules keep as attributes and have computed from parameters.

    The hooks of `torch.nn.utils.weight_norm` and of `torch.nn.utils.prune` keep such weights. `copy.deepcopy` refuses them.
    """
    values = (value for module in model.modules() for value in vars(module).values())
    return {id(value): value.detach().clone() for value in values if isinstance(value, Tensor) and not value.is_leaf}


def copy_without_numbers(model: nn.Module, instead: Mapping[int, Any] | None = None) -> Any:
    """Return a deep copy of a model, as `copy_of` does, with parameters and buffers on the meta device.

    Args:
        instead: what takes the place of an object in the copy, by the object's id.

    Raises:
        InvalidInput: as `copy_of`.
    """
    require_sizes(model)
    memo: dict[int, Any] = {id(buffer): buffer.detach().to("meta") for buffer in model.buffers()}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
    return copy_of(model, {**memo, **(instead or {})})
