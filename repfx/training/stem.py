"""`Stem`: the first modules of a model, which keep pretrained weights as they are while the rest is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from repfx.blocks.architecture import Architecture
from repfx.blocks.presets import SpecLike
from repfx.blocks.spec import Spec
from repfx.errors import InvalidInput, UnknownName
from repfx.records.module_tree import module_at
from repfx.tracing.sites import sites


@dataclass(frozen=True)
class Stem:
    """The modules that are frozen, by path. What is inside them is frozen, too.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1)))
    >>> Stem.up_to(net, "2.0").paths
    ('0', '1', '2.0')
    """

    paths: tuple[str, ...] = ()

    @classmethod
    def up_to(cls, model: nn.Module, last: str) -> Stem:
        """Return a module and all modules that are registered before it, at each level of its path; nothing for an empty path.

        Raises:
            UnknownName: the model has no module at this path.
        """
        if not last:
            return cls()
        if module_at(model, last) is None:
            raise UnknownName("module to freeze", last, [path for path, _ in model.named_modules() if path])
        found, inside, parent = [], "", model
        for name in last.split("."):
            children = [each for each, child in parent._modules.items() if child is not None]
            found += [f"{inside}{each}" for each in children[: children.index(name)]]
            inside, parent = f"{inside}{name}.", parent.get_submodule(name)
        return cls((*found, last))

    def holds(self, path: str) -> bool:
        """Whether a module is in the stem."""
        return any(f"{path}.".startswith(f"{each}.") for each in self.paths)

    def freeze(self, model: nn.Module) -> None:
        """Let the stem's parameters get no gradient, and its modules be in eval mode.

        Raises:
            InvalidInput: the rest of the model has no parameters that are trained.
        """
        for path in self.paths:
            model.get_submodule(path).requires_grad_(False).eval()
        if self.paths and not any(each.requires_grad for each in model.parameters()):
            raise InvalidInput(
                f"freeze = {self.paths[-1]!r} leaves nothing to train in {type(model).__name__}: name an earlier module."
            )

    def train(self, model: nn.Module, training: bool = True) -> None:
        """Set the mode of a model, except that the stem stays in eval mode, so that its BatchNorms keep their statistics."""
        model.train(training)
        for path in self.paths:
            model.get_submodule(path).eval()

    def left_out(self, model: nn.Module, spec: SpecLike | Architecture) -> SpecLike | Architecture:
        """Return a spec that gives no branches to the sites in the stem, whose branches wouldn't learn, and `spec` to the others."""
        found = Architecture.load(spec) if isinstance(spec, str) and spec.endswith(".json") else spec
        frozen: dict[str, Any] = {each.path: _NOTHING for each in sites(model, found) if self.holds(each.path)}
        if not frozen:
            return spec
        rest = found.specs if isinstance(found, Architecture) else found if isinstance(found, Mapping) else {"*": found}
        return {**frozen, **{pattern: each for pattern, each in rest.items() if pattern not in frozen}}


_NOTHING = Spec([], layers="both")
