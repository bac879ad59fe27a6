"""Wrappers around a model that compute what the model computes, and forms of a model in which its layers are gone."""

from __future__ import annotations

import torch
from torch import fx, nn
from torch.optim.swa_utils import AveragedModel

from repfx.errors import InvalidInput
from repfx.records.module_tree import require_module

# wrappers that hold the model as `module`
_PARALLEL: tuple[type[nn.Module], ...] = (nn.DataParallel, nn.parallel.DistributedDataParallel)
_PASSING_ON: tuple[type[nn.Module], ...] = (AveragedModel, *_PARALLEL)


def is_compiled(module: nn.Module) -> bool:
    """Whether a module is what `torch.compile` has returned for another one."""
    return f"{type(module).__module__}.{type(module).__qualname__}" == "torch._dynamo.eval_frame.OptimizedModule"


def bare(model: nn.Module) -> nn.Module:
    """Return the module inside its wrappers for several processes or devices and for compilation.

    A wrapper of a class of its own, or with hooks, stays, because it may do more than the module inside.

    >>> linear = nn.Linear(1, 1)
    >>> bare(torch.compile(linear)) is bare(nn.DataParallel(linear)) is bare(linear) is linear
    True
    """
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel) or (passes_on(model) and _is_parallel(model)):
            model = model.get_submodule("module")
        elif is_compiled(model):
            model = model.get_submodule("_orig_mod")
        else:
            return model


def _is_parallel(module: nn.Module) -> bool:
    return isinstance(module, _PARALLEL) and not _has_hooks(module)


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def passes_on(module: nn.Module) -> bool:
    """Whether a module gives its arguments to its child `module` and returns what that gives.

    >>> passes_on(nn.DataParallel(nn.Linear(1, 1)))
    True
    """
    return any(isinstance(module, cls) and type(module).forward is cls.forward for cls in _PASSING_ON)


def innermost(model: nn.Module) -> nn.Module:
    """Return the module inside all wrappers, averages too."""
    while True:
        model = bare(model)
        if not passes_on(model) or _has_hooks(model):
            return model
        model = model.get_submodule("module")


def require_layers(model: nn.Module) -> None:
    """Raise `InvalidInput` if `model` is no module, or what it wraps is in a form without layers that could be changed."""
    is_program = isinstance(model, torch.export.ExportedProgram)
    if not is_program:
        require_module(model)
        model = innermost(model)
    if is_program or (isinstance(model, fx.GraphModule) and is_aten_graph(model)):
        raise InvalidInput(
            "the model is the graph of torch.export, which calls torch's operators in place of layers: give the module that it was made "
            "from, and export the result. `repfx.fuse` alone takes such a graph, too."
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise InvalidInput(
            "the model is compiled by TorchScript, so its layers can't be changed: give the module that it was made from, and "
            "compile the result."
        )


def is_aten_graph(model: fx.GraphModule) -> bool:
    """Whether a graph calls torch's operators, and no module that holds parameters."""
    calls = any(isinstance(node.target, torch._ops.OpOverload) for node in model.graph.nodes)
    targets = [str(node.target) for node in model.graph.nodes if node.op == "call_module"]
    return calls and not any(True for path in targets for _ in model.get_submodule(path).parameters())
