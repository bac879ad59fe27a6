"""`SqueezedForm`: how a module runs while linear regions of its graph run as one conv each; and how it takes that form on and off.

The module stays what it is: same object, parameters, state dict, and a class that is a subclass of its own. It runs its own forward
whenever the form isn't exact: while a BatchNorm of a region takes its statistics from the batch, while a hook listens to anything inside,
where a part was exchanged, and where another tracer asks.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, fx, nn

from repfx.block import RepBlock
from repfx.meaning import has_hooks, takes_batch_statistics
from repfx.notes import keep, kept

NAME = "repfx_squeezed_form"


class Region(Protocol):
    """Some modules below a root that together are one linear map, `template` being the conv that lends its window; see `LinearRegion`."""

    @property
    def template(self) -> str: ...

    @property
    def modules(self) -> tuple[str, ...]: ...

    def __call__(self, root: nn.Module, x: Tensor) -> Tensor: ...


@dataclass
class SqueezedForm:
    """The code of a module's graph in which each linear region is one call.

    Args:
        root: the module that takes the form.
        code: takes `root` and the inputs; calls regions as ``root.repfx_squeezed_form.run("<name>", x)``.
        inputs: how many there are.
        regions: by name.
        parts: all modules that the graph calls or regions consist of, by path in `root`.
        held: paths of BatchNorms that stay in eval mode.
    """

    root: nn.Module
    code: Callable[..., Any]
    inputs: int
    regions: Mapping[str, Region]
    parts: Mapping[str, nn.Module]
    held: tuple[str, ...]

    def run(self, name: str, x: Any) -> Any:
        """What a region gives out."""
        return self.regions[name](self.root, x)

    def fits(self, module: nn.Module, args: tuple[Any, ...], options: Mapping[str, Any]) -> bool:
        """Whether the form gives out just what the module's own forward would."""
        if options or len(args) != self.inputs or any(isinstance(argument, fx.Proxy) for argument in args):
            return False
        return self.root is module and self._is_exact and self._is_unheard

    @property
    def _is_exact(self) -> bool:
        """Whether all parts are still there, and what regions consist of is linear in this mode."""
        found = dict(self.root.named_modules(remove_duplicate=False))
        return all(found.get(path) is part for path, part in self.parts.items()) and not any(
            _varies(found[path]) for region in self.regions.values() for path in region.modules
        )

    @property
    def _is_unheard(self) -> bool:
        return not any(has_hooks(module) for module in self.root.modules() if module is not self.root)

    def stop_norms(self) -> None:
        """Put the BatchNorms whose statistics are held into eval mode."""
        self._set_norms(False)

    def let_norms_go(self) -> None:
        """Let the BatchNorms whose statistics were held follow the mode of the module again."""
        self._set_norms(self.root.training)

    def _set_norms(self, mode: bool) -> None:
        modules = dict(self.root.named_modules(remove_duplicate=False))
        for path in self.held:
            if path in modules:
                modules[path].train(mode)


def _varies(part: nn.Module) -> bool:
    """Whether a part of a region is no linear map in the mode that it is in."""
    if isinstance(part, RepBlock):
        return not (part.squeezed and part.is_one_map)
    return takes_batch_statistics(part)


def form_of(module: nn.Module) -> SqueezedForm | None:
    """The form that a module has taken, or None."""
    found = kept(module, NAME)
    return found if isinstance(found, SqueezedForm) else None


def forms_in(model: nn.Module) -> dict[str, SqueezedForm]:
    """All forms in a model, by the paths of the modules that took them."""
    forms = {path: form_of(module) for path, module in model.named_modules()}
    return {path: form for path, form in forms.items() if form is not None}


def take(form: SqueezedForm) -> None:
    """Let the form's module run in it from now on."""
    release(form.root)
    form.root.__class__ = _squeezed(type(form.root))  # type: ignore[arg-type]
    keep(form.root, NAME, form)
    form.stop_norms()


def release(module: nn.Module) -> None:
    """Let a module be of its own class again; its norms' mode stays."""
    if form_of(module) is not None:
        module.__class__ = type(module).__bases__[0]
        delattr(module, NAME)


def release_all(model: nn.Module) -> None:
    """Let all modules of a model be of their own classes again."""
    for module in model.modules():
        release(module)


@functools.cache
def _squeezed(own: Any) -> Any:
    """A subclass whose instances run in the form that they have taken."""

    @functools.wraps(own.forward)
    def forward(self: Any, *args: Any, **options: Any) -> Any:
        form = getattr(self, NAME, None)
        if form is not None and form.fits(self, args, options):
            return form.code(self, *args)
        return own.forward(self, *args, **options)

    def train(self: Any, mode: bool = True) -> Any:
        own.train(self, mode)
        vars(self)[NAME].stop_norms()
        return self

    def deepcopy(self: Any, memo: dict[int, Any]) -> Any:
        copied: Any = nn.Module.__new__(type(self))
        memo[id(self)] = copied
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied

    def reduce(self: Any, protocol: Any) -> Any:
        """Pickled, it is of its own class, for a graph with regions can't be."""
        state = {name: value for name, value in vars(self).items() if name != NAME}
        return nn.Module.__new__, (own,), state

    body: dict[str, Any] = {"forward": forward, "train": train, "__deepcopy__": deepcopy, "__reduce_ex__": reduce}
    return type(own.__name__, (own,), {**body, "__module__": own.__module__, "__qualname__": own.__qualname__})
