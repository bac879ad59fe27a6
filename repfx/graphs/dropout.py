"""Dropout calls such as ``F.dropout(x, training=self.training)``: a trace would fix their mode, so dropout modules replace them."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch.nn.functional as F
from torch import fx, nn

from repfx.graphs.calls_by_mode import ModuleCall

MODULES: dict[object, type[nn.Module]] = {
    F.dropout: nn.Dropout,
    F.dropout1d: nn.Dropout1d,
    F.dropout2d: nn.Dropout2d,
    F.dropout3d: nn.Dropout3d,
    F.alpha_dropout: nn.AlphaDropout,
    F.feature_alpha_dropout: nn.FeatureAlphaDropout,
}
_STOCHASTIC_DEPTH = "torchvision.ops.stochastic_depth"


def dropout_in_mode(node: fx.Node, training: bool) -> ModuleCall | None:
    """Return the call of a dropout module that does what a dropout call does, or None.

    The call's own argument `training` must equal `training`, which is the mode of its graph.
    """
    if node.op != "call_function" or len(node.all_input_nodes) != 1:
        return None
    kind = _kind_of(node.target)
    if kind is None:
        return None
    call = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
    call.apply_defaults()
    if call.arguments["training"] is not training:
        return None
    others = ("mode",) if "mode" in call.arguments else ("inplace",)
    made: nn.Module = kind(call.arguments["p"], *(call.arguments[name] for name in others))
    return ModuleCall(made, (node.all_input_nodes[0],), {})


def _kind_of(function: Any) -> Any:
    """Return the class of modules that do what a function does, or None."""
    if function in MODULES:
        return MODULES[function]
    own = getattr(function, "__module__", None) == _STOCHASTIC_DEPTH and function.__name__ == "stochastic_depth"
    return sys.modules[_STOCHASTIC_DEPTH].StochasticDepth if own else None
