"""The code around each layer of a model: what it reads and asks for, and whether the layer can be changed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from types import CodeType

from torch import nn

from repfx.algebra.layers import code_of_its_own
from repfx.blocks.block import RepBlock
from repfx.reading.source_code import Around, asked_for
from repfx.tracing.leaves import is_leaf
from repfx.tracing.recording import code_recorded
from repfx.tracing.trace import Traces, trace


@dataclass(frozen=True)
class Code:
    """The code around a layer: what it reads and asks for, and the reason why nothing inside it can be changed (`closed`), or None.

    `leaf` says whether a leaf is around the layer, whose code isn't traced.
    """

    around: Around = field(default_factory=Around)
    closed: str | None = None
    leaf: bool = False

    def refusal(self, conv: nn.Module, *, called: bool) -> str | None:
        """Why a conv can't become a block, or None. `called` says whether a graph calls the conv."""
        asked = asked_for(conv, self.around.classes)
        if asked is not None:
            return f"code around it asks whether it is a {asked}"
        if self.around.asks_for_bias and conv.bias is None:
            return "code around it asks whether a layer has a bias; it has none now, and would have one later"
        if not called and self.around.reads_weight_of(conv):
            how = "isn't traced" if self.leaf else "can't be traced"
            return f"code around it, which {how}, reads its weights"
        return self.closed or self.around.closed

    def needs_norm(self, path: str, norm: nn.Module) -> bool:
        """Whether the code needs a BatchNorm to stay where it is."""
        if path.rpartition(".")[2] in self.around.sets_modes:
            return True
        if _asks_for_identities(self.around) or self.around.closed is not None:
            return True
        return asked_for(norm, self.around.classes) is not None or bool(_OF_NORMS & self.around.names)


def _asks_for_identities(around: Around) -> bool:
    """Whether code asks if a module is an identity, which stands where a BatchNorm was once that has moved."""
    return asked_for(nn.Identity(), around.classes) is not None


_OF_NORMS = frozenset({"eps", "momentum", "num_features", "running_mean", "running_var", "affine"})


class _Ran:
    """The code that runs when a model is called, found by tracing the model once more when somebody first asks."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __contains__(self, code: object) -> bool:
        return self._codes is None or code in self._codes

    @cached_property
    def _codes(self) -> set[CodeType] | None:
        with code_recorded() as codes:
            trace(self._model)
        return codes


def code_around(model: nn.Module, traces: Traces) -> dict[str, Code]:
    """Map the path of each module to the code of all modules that it lies in.

    The code of blocks is left out, because it works with whatever their parts become.
    """
    found, islands, ran = {"": Code()}, {island.path for island in traces.islands}, _Ran(model)
    for path, module in model.named_modules():
        code = found.get(path, Code())
        if not isinstance(module, RepBlock):
            code = replace(code, leaf=code.leaf or (is_leaf(module) and path not in islands))
            if any(True for _ in module.children()):
                code = replace(code, around=code.around.inside(module), closed=code.closed or code_of_its_own(module))
        for name, _ in module.named_children():
            inner = code.around.toward(name, None if code.leaf or path in traces.untraced else ran)
            found[f"{path}.{name}".lstrip(".")] = replace(code, around=inner)
    return found
