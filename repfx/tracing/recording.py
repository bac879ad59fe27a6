"""How a tracer sees what code does: in its own thread alone, on its own copy of a model.

torch.fx puts wrappers into `nn.Module` itself while it traces, so the forward passes of all threads run into them. Here the wrappers lie on
the modules of the copy, which no other thread has. Functions such as `math.sqrt` have to be replaced where all threads find them. In any
other thread the replacement calls the original at once. Only one thread at a time replaces functions, so one at a time traces.
"""

from __future__ import annotations

import builtins
import inspect
import math
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from types import CodeType
from typing import Any

import torch
import torch.utils.checkpoint
from torch import fx, nn
from torch.fx import _symbolic_trace

# functions of other libraries that can't be traced and have nothing inside to rewrite
_LEAF_FUNCTIONS = {"timm.layers.padding": ("pad_same",)}
_ONE_AT_A_TIME = threading.RLock()
_CALL = "_compiled_call_impl"  # `nn.Module.__call__` runs this attribute of a module instead, if it is set
_TENSORS = ("_parameters", "_buffers")
_CHECKPOINT: Callable[..., Any] = torch.utils.checkpoint.checkpoint
_CHECKPOINT_OPTIONS = {
    parameter.name
    for parameter in inspect.signature(_CHECKPOINT).parameters.values()
    if parameter.kind is parameter.KEYWORD_ONLY
}
_ORIGINAL = "repfx_original"  # the attribute of a replacement that holds the function


@contextmanager
def calls_recorded(root: nn.Module, record: Callable[..., Any]) -> Iterator[None]:
    """Let each call of a module inside `root` be ``record(module, forward, args, kwargs)``."""
    modules = list(root.modules())
    before = [vars(module).get(_CALL) for module in modules]
    for module in modules:
        vars(module)[_CALL] = partial(_record_call, record, module)
    try:
        yield
    finally:
        for module, call in zip(modules, before, strict=True):
            vars(module)[_CALL] = call
            if call is None:
                del vars(module)[_CALL]


def _record_call(record: Callable[..., Any], module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
    return record(module, module._call_impl, args, kwargs)


class _ReadTensors(dict[str, Any]):
    """The parameters or buffers of a module. Code that reads one gets ``read(name, tensor)``; whoever lists them gets the tensors."""

    def __init__(self, tensors: dict[str, Any], read: Callable[[str, Any], Any]) -> None:
        super().__init__(tensors)
        self._read = read

    def __getitem__(self, name: str) -> Any:
        return self._read(name, super().__getitem__(name))

    def __setitem__(self, name: str, value: Any) -> None:
        if issubclass(type(value), fx.Proxy):
            raise TypeError("it changes its own tensors while it runs")
        super().__setitem__(name, value)

    def __reduce__(self) -> Any:
        return dict, (dict(self.items()),)  # code that copies a module gets an ordinary one


@contextmanager
def tensors_recorded(root: nn.Module, read: Callable[[str, Any], Any]) -> Iterator[None]:
    """Let code that reads a parameter or buffer of a module inside `root` get ``read(name, tensor)``."""
    tables = [
        (vars(module), kind, vars(module)[kind])
        for module in root.modules()
        for kind in _TENSORS
        if isinstance(vars(module).get(kind), dict)  # a scripted module has a table of its own
    ]
    for owner, kind, table in tables:
        owner[kind] = _ReadTensors(table, read)
    try:
        yield
    finally:
        for owner, kind, table in tables:
            changed = dict(owner[kind].items())
            table.clear()
            table.update(changed)
            owner[kind] = table


@contextmanager
def functions_recorded(root: nn.Module) -> Iterator[None]:
    """Let calls of some functions with proxies be recorded: those of `math`, and those that were given to `torch.fx.wrap`."""
    with _ONE_AT_A_TIME, ExitStack() as stack:
        for namespace, name, function in _wrapped_functions(root):
            stack.enter_context(_replaced(namespace, name, _in_this_thread(function)))
        yield


def _wrapped_functions(root: nn.Module) -> Iterator[tuple[dict[str, Any], str, Callable[..., Any]]]:
    """Yield each place of a function that is to be recorded: a namespace, the name there, and the function."""
    functions = {id(each) for name, each in vars(math).items() if callable(each) and not name.startswith("_")}
    for module, names in _LEAF_FUNCTIONS.items():
        functions |= {id(getattr(sys.modules[module], name)) for name in names if module in sys.modules}
    spaces = [vars(math), *(getattr(module.forward, "__globals__", {}) for module in root.modules())]
    for space in {id(space): space for space in spaces}.values():
        yield from [
            (space, name, value)
            for name, value in list(space.items())
            if id(value) in functions and not name.startswith("_")
        ]
    for (_, name), space in list(_symbolic_trace._wrapped_fns_to_patch.items()):
        found = space.get(name, getattr(builtins, name, None))
        if found is not None:
            yield space, name, found


def _in_this_thread(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that is recorded when this thread calls it with proxies. Everywhere else it is `function`."""
    function = getattr(function, _ORIGINAL, function)
    thread, recorded = threading.get_ident(), _symbolic_trace._create_wrapped_func(function)

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling() or threading.get_ident() != thread:
            return function(*args, **kwargs)
        return recorded(*args, **kwargs)

    setattr(call, _ORIGINAL, function)
    return call


@contextmanager
def checkpoints_passed_through(root: nn.Module) -> Iterator[None]:
    """Let this thread's calls of torch's `checkpoint` be calls of what they checkpoint. The numbers are the same."""
    classes = {cls for module in root.modules() for cls in type(module).__mro__}
    spaces = [vars(sys.modules[name]) for name in sorted({cls.__module__ for cls in classes}) if name in sys.modules]
    with _ONE_AT_A_TIME, ExitStack() as stack:
        for space in [vars(torch.utils.checkpoint), *spaces]:
            for name in [name for name, value in list(space.items()) if value is _CHECKPOINT]:
                stack.enter_context(_replaced(space, name, _without_checkpoint(threading.get_ident())))
        yield


def _without_checkpoint(thread: int) -> Callable[..., Any]:
    @wraps(_CHECKPOINT)
    def call(function: Any = None, *args: Any, **kwargs: Any) -> Any:
        if function is None or torch.compiler.is_dynamo_compiling() or threading.get_ident() != thread:
            return _CHECKPOINT(function, *args, **kwargs)
        return function(*args, **{name: value for name, value in kwargs.items() if name not in _CHECKPOINT_OPTIONS})

    return call


@contextmanager
def _replaced(namespace: dict[str, Any], name: str, value: object) -> Iterator[None]:
    """Replace a value in a namespace, which may lack it if it is one of Python's builtin functions."""
    missing = name not in namespace
    before = namespace.get(name)
    try:
        namespace[name] = value
        yield
    finally:
        namespace[name] = before
        if missing:
            del namespace[name]


@contextmanager
def code_recorded() -> Iterator[set[CodeType] | None]:
    """Yield a set that takes the code of all Python functions that this thread runs; None where a profiler watches it already."""
    if sys.getprofile() is not None:
        yield None
        return
    codes: set[CodeType] = set()

    def note(frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            codes.add(frame.f_code)

    sys.setprofile(note)
    try:
        yield codes
    finally:
        sys.setprofile(None)
