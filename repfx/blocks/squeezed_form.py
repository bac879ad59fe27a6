"""`SqueezedForm`: a form in which each linear region of a module's graph runs as one conv. `take` puts it on, and `release` takes it off.

The module stays the same object with the same parameters and state dict. Its class becomes a subclass of its own class. It runs its own
forward whenever the form isn't exact: while a BatchNorm of a region takes its statistics from the batch, while a hook listens to anything
inside, after a part was exchanged, and while another tracer traces it.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, fx, nn

from repfx.algebra.arithmetic import is_transformed
from repfx.algebra.kernel import Kernel, NoKernel
from repfx.algebra.layers import (
    OWN_CLASS,
    code_of_its_own,
    has_hooks,
    is_conv_or_linear,
    is_patched,
    own_classes,
    takes_batch_statistics,
    template_of,
)
from repfx.blocks.block import RepBlock
from repfx.blocks.together import PLAN, Part, together
from repfx.records.notes import keep, kept

NAME = "repfx_squeezed_form"
_LEADS = "repfx_leads"


class Region(Protocol):
    """A linear part of a module that runs as one conv. `repfx.rewriting.linear_region` has the only class of regions."""

    @property
    def modules(self) -> tuple[str, ...]:
        """The paths of all modules that the region consists of."""

    @property
    def template(self) -> str:
        """The path of the module whose weight gives dtype and device."""

    def kernel(self, root: nn.Module, like: Tensor) -> Kernel:
        """Return the one kernel of the region; differentiable."""

    def weight_in(self, root: nn.Module) -> Tensor:
        """Return the tensor that gives dtype and device."""

    def __call__(self, root: nn.Module, x: Tensor) -> Tensor:
        """Run the region's conv on ``(batch, channels, *axes)``."""


@dataclass
class SqueezedForm:
    """The code of a module's graph in which each linear region is one call.

    Args:
        root: module that takes the form.
        code: function of `root` and the inputs that calls regions as ``root.repfx_squeezed_form.run("<name>", x)``.
        inputs: number of inputs.
        regions: regions by name.
        held: paths of BatchNorms that stay in eval mode.
        one_mode: paths of modules that must be in the root's mode, because the code lets dropout follow that mode.
    """

    root: nn.Module
    code: Callable[..., Any]
    inputs: int
    regions: Mapping[str, Region]
    held: tuple[str, ...]
    one_mode: tuple[str, ...] = ()
    _seen: tuple[Any, ...] = ()
    _apart: tuple[str, ...] = ()  # paths in `held` of BatchNorms that had another mode than the root

    def __post_init__(self) -> None:
        modules = self._modules
        self._apart = tuple(path for path in self.held if modules[path].training != self.root.training)

    def look(self) -> None:
        """Record the root and the modules below it. The form is used only while this record still matches.

        Modules inside may take forms of their own, but only before this call.
        """
        self._seen = tuple(map(_outline, self._modules.items()))

    def run(self, name: str, x: Any) -> Any:
        """Run a region on its input."""
        return self.regions[name](self.root, x)

    def takes(self, module: nn.Module, args: tuple[Any, ...], options: Mapping[str, Any]) -> bool:
        """Put held BatchNorms into eval mode, and tell whether the form then computes exactly what the module's own forward would."""
        modules = self._modules
        self._stop(modules)  # a part of the module may have been put into training mode by itself
        if self.root is not module or options or len(args) != self.inputs:
            return False
        return all(isinstance(argument, Tensor) for argument in args) and self._is_exact(modules)

    @property
    def _modules(self) -> dict[str, nn.Module]:
        return dict(self.root.named_modules(remove_duplicate=False))

    def _is_exact(self, modules: dict[str, nn.Module]) -> bool:
        """Whether all modules are as `look` recorded them, none below the root has hooks, and all parts of regions are linear now."""
        if len(modules) != len(self._seen) or any(map(_differs, modules.items(), self._seen)):
            return False
        if any(modules[path].training != self.root.training for path in self.one_mode):
            return False
        return not any(_varies(modules[path]) for region in self.regions.values() for path in region.modules)

    def parts(self) -> list[Part]:
        """Return the regions that are linear now."""
        modules = self._modules
        found = []
        for region in self.regions.values():
            own = _at(modules, region.modules)
            template = modules.get(region.template)
            if len(own) == len(region.modules) and not any(map(_varies, own)) and _has_weight(template):
                below = [module for each in own for module in each.modules()]
                kernel = functools.partial(region.kernel, self.root)
                found.append(Part(region, kernel, region.weight_in(self.root), below))
        return found

    def stop_norms(self) -> None:
        """Put the BatchNorms whose statistics are held into eval mode."""
        self._stop(self._modules if self.held else {})

    def _stop(self, modules: dict[str, nn.Module]) -> None:
        for norm in _at(modules, self.held):
            if norm.training:
                norm.eval()

    def let_norms_go(self) -> None:
        """Let held BatchNorms follow the mode of the module again, except those that didn't follow it before."""
        for norm in _at(self._modules, {*self.held} - {*self._apart}):
            norm.train(self.root.training)


def _has_weight(template: nn.Module | None) -> bool:
    return template is not None and (isinstance(template, RepBlock) or is_conv_or_linear(template))


def _at(modules: Mapping[str, nn.Module], paths: Iterable[str]) -> list[nn.Module]:
    """Return the modules at the paths that still exist."""
    return [modules[path] for path in paths if path in modules]


_Entry: TypeAlias = tuple[str, nn.Module]
_Outline: TypeAlias = tuple[str, nn.Module, type[nn.Module], dict[str, Any], dict[str, Any]]


def _outline(entry: _Entry) -> _Outline:
    """Return everything that a graph relies on in a module at a path: the object, its class, and the values that its code may read."""
    path, module = entry
    return path, module, type(module), *(_values(module) if module._modules else ({}, {}))


def _values(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the attributes that torch doesn't give to every module: plain values, and snapshots of the others."""
    plain: dict[str, Any] = {}
    others: dict[str, Any] = {}
    for name, value in vars(module).items():
        if name not in _OF_EVERY_MODULE and not name.startswith("repfx_"):
            is_plain = all(isinstance(each, _PLAIN) for each in _items(value))
            (plain if is_plain else others)[name] = value if is_plain else _snapshot(value)
    return plain, others


_PLAIN = (bool, int, float, str, type(None))
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def _items(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _snapshot(value: Any) -> Any:
    """Return a value that compares equal as long as `value` is the same: containers by their entries, all other objects by identity."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, dict):
        return type(value), [(key, _snapshot(each)) for key, each in value.items()]
    if isinstance(value, (list, tuple)):
        return type(value), [_snapshot(each) for each in value]
    return _Same(value)


@dataclass(eq=False)
class _Same:
    """A wrapper that equals every other wrapper of the same object."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value


def _differs(entry: _Entry, seen: _Outline) -> bool:
    path, module = entry
    if path != seen[0] or module is not seen[1] or type(module) is not seen[2]:
        return True
    if is_patched(module) or (path and has_hooks(module)):
        return True
    if torch.compiler.is_compiling():  # not every torch can list a module's attributes here
        return any(vars(module).get(name) != value for name, value in seen[3].items())
    return bool(module._modules) and _values(module) != seen[3:]


def _varies(part: nn.Module) -> bool:
    """Whether a part of a region is no linear map in its present mode."""
    if isinstance(part, RepBlock):
        return not (part.squeezed and part.is_one_map) or part.tracks
    return takes_batch_statistics(part)


def form_of(module: nn.Module) -> SqueezedForm | None:
    """Return the form that a module has taken, or None."""
    found = kept(module, NAME)
    return found if isinstance(found, SqueezedForm) else None


def forms_in(model: nn.Module) -> dict[str, SqueezedForm]:
    """Return all forms in a model, by the paths of the modules that took them."""
    forms = {path: form_of(module) for path, module in model.named_modules()}
    return {path: form for path, form in forms.items() if form is not None}


def take(forms: Iterable[SqueezedForm]) -> None:
    """Let modules run in their forms from now on. A module may lie inside another one of them."""
    forms = list(forms)
    for form in forms:
        release(form.root)
        _dress(form.root)
        keep(form.root, NAME, form)
        form.stop_norms()
    for form in forms:
        form.look()


def release(module: nn.Module) -> None:
    """Give a module its own class back, unless it leads. The modes of its BatchNorms stay as they are."""
    _take_off(module, NAME)


def release_all(model: nn.Module) -> None:
    """Give all modules of a model their own classes back."""
    for module in model.modules():
        release(module)
        _take_off(module, _LEADS)


def lead(model: nn.Module) -> None:
    """Let everything that is or will be squeezed in a model assemble its kernels together whenever the model runs.

    A `GraphModule` can't lead, because torch.fx writes its forward into its class. Nor can a module that `copies_itself`.
    """
    if kept(model, _LEADS) is not None or isinstance(model, fx.GraphModule) or copies_itself(model):
        return
    if code_of_its_own(model) is None:
        _dress(model)
        keep(model, _LEADS, True)


def copies_itself(module: nn.Module) -> bool:
    """Whether the class of a module has code of its own for copying, pickling or subclassing, which a class made here would pass over."""
    return any(name in vars(cls) for cls in own_classes(type(module)) for name in _COPYING)


_COPYING = ("__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__init_subclass__")


def stop_leading(model: nn.Module) -> None:
    """Give a model its own class back if nothing is squeezed in it any more."""
    if not forms_in(model) and not any(isinstance(each, RepBlock) and each.squeezed for each in model.modules()):
        _take_off(model, _LEADS)


def _dress(module: nn.Module) -> None:
    if not hasattr(type(module), OWN_CLASS):
        module.__class__ = _squeezed(type(module))  # type: ignore[arg-type]


def _take_off(module: nn.Module, note: str) -> None:
    """Delete a note, and give the module its own class back if no other note needs the other class."""
    if kept(module, note) is None:
        return
    for name in (note, PLAN):
        vars(module).pop(name, None)
    if kept(module, NAME) is None and kept(module, _LEADS) is None and OWN_CLASS in vars(type(module)):
        # unless other code, such as a parametrization, has made a subclass since
        module.__class__ = vars(type(module))[OWN_CLASS]


def _linear_parts(root: nn.Module) -> list[Part]:
    """Return the regions and squeezed blocks of a model that are linear now."""
    forms = [form for module in root.modules() if (form := form_of(module)) is not None and form.root is module]
    parts = [part for form in forms for part in form.parts()]
    inside = {module for part in parts for module in part.modules}
    for block in root.modules():
        if block not in inside and isinstance(block, RepBlock) and block.squeezed and block.is_one_map:
            inside.update(block.modules())
            kernel = functools.partial(block.kernel_in, block.training)
            parts.append(Part(block, kernel, template_of(block.conv), [*block.modules()]))
    return parts


@functools.cache
def _squeezed(own: Any) -> Any:
    """Make a subclass of `own` whose instances run in the form that they have taken."""

    @functools.wraps(own.forward)
    def forward(self: Any, *args: Any, **options: Any) -> Any:
        if is_transformed():
            return run(self, *args, **options)
        with together(self, _linear_parts):
            return run(self, *args, **options)

    def run(self: Any, *args: Any, **options: Any) -> Any:
        form = getattr(self, NAME, None)
        if form is not None and form.takes(self, args, options):
            try:
                return form.code(self, *args)
            except NoKernel:  # sizes were changed since
                pass
        return own.forward(self, *args, **options)

    def train(self: Any, *args: Any, **options: Any) -> Any:
        own.train(self, *args, **options)
        form = getattr(self, NAME, None)
        if form is not None:
            form.stop_norms()
        return self

    def deepcopy(self: Any, memo: dict[int, Any]) -> Any:
        copied: Any = nn.Module.__new__(type(self))
        memo[id(self)] = copied
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied

    def reduce(self: Any, protocol: Any) -> Any:
        """Pickle the module as one of its own class, because a graph with regions can't be pickled."""
        state = {name: value for name, value in vars(self).items() if name not in (NAME, _LEADS, PLAN)}
        return nn.Module.__new__, (own,), state

    body: dict[str, Any] = {
        OWN_CLASS: own,
        "forward": forward,
        "train": train,
        "__deepcopy__": deepcopy,
        "__reduce_ex__": reduce,
    }
    return type(own.__name__, (own,), {**body, "__module__": own.__module__, "__qualname__": own.__qualname__})
