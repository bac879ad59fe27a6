"""`together`: a context in which everything that is squeezed in a model assembles its kernels at once, as soon as the first part runs.

Block by block, assembling takes dozens of small operations for each block, and a GPU waits for each. Together, it takes a number of
operations that grows with the number of shapes (`repfx.algebra.program`). A CPU starts an operation in no time. There, nothing is gained
by it, and the kernels of the whole model would be held at once, so each part assembles its own.

The kernels belong to one call of the model and are dropped at its end. A part assembles its own kernel, as it does outside of the model,
in all cases in which it can't be sure of the one that waits for it: its parameters or modules were changed since, it runs on another
stream, a CUDA graph is captured, something keeps track of what its code saves for the backward pass, such as activation checkpointing, or
its kernel needs more than parameters, buffers and attributes that can't change unseen.
Only a write that torch doesn't count, into the `.data` of a parameter while the model runs, isn't noticed before the next call.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, is_dataclass, replace
from enum import Enum
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils.parametrize import is_parametrized

from repfx.algebra.arithmetic import is_transformed
from repfx.algebra.assembly import WAITING, in_full
from repfx.algebra.deferred import Deferred, Recording
from repfx.algebra.kernel import Kernel
from repfx.algebra.program import Program
from repfx.records.notes import keep, kept

PLAN = "repfx_plan"
ALONE = frozenset({"cpu"})  # types of devices on which each part assembles its own kernel


@dataclass(frozen=True, eq=False)
class Part:
    """Something squeezed, which runs as one conv.

    Args:
        owner: the block or the region.
        kernel_like: what makes its kernel, as `assembled` takes it.
        weight: tensor that gives dtype and device.
        modules: all modules that the kernel is made from.
    """

    owner: object
    kernel_like: Callable[[Any], Kernel]
    weight: Tensor
    modules: Sequence[nn.Module]


@contextmanager
def together(root: nn.Module, find: Callable[[nn.Module], list[Part]]) -> Iterator[None]:
    """While the context lasts, parts of `root` assemble their kernels together.

    Inside the context of another model, and where code is recorded or transformed, nothing changes.

    Args:
        find: returns the parts that are linear now.
    """
    replica = getattr(root, "_is_replica", False)  # of nn.DataParallel, whose parameters are registered nowhere
    if WAITING.get() is not None or replica or is_transformed() or torch._C._get_tracing_state() is not None:
        yield
        return
    token = WAITING.set(_Kernels(root, find).take)
    try:
        yield
    finally:
        WAITING.reset(token)


@dataclass(frozen=True, eq=False)
class _Waiting:
    """A kernel that waits for its part, and what it was made from."""

    part: Part
    kernel: Kernel
    surface: list[object]
    versions: list[object]
    stream: object

    @property
    def is_current(self) -> bool:
        """Whether the part is as it was, and its device works through one queue: another stream wouldn't wait for the kernel."""
        if _stream(self.part.weight) != self.stream:
            return False
        return _same(_surface(self.part.modules), self.surface) and _versions(self.part) == self.versions


class _Kernels:
    """The kernels of all parts of a model in one call of it."""

    def __init__(self, root: nn.Module, find: Callable[[nn.Module], list[Part]]) -> None:
        self._root = root
        self._find = find
        self._waiting: dict[int, _Waiting] | None = None
        self._with_gradients = False

    def take(self, owner: object) -> Kernel | None:
        """Return the kernel that waits for a part, or None if the part has to assemble its own."""
        hooked = torch._C._autograd._top_saved_tensors_default_hooks(False)
        if hooked or forward_ad._current_level >= 0 or _is_captured():
            return None
        if self._waiting is None:
            self._with_gradients = torch.is_grad_enabled()
            self._waiting = {}  # stays so if this fails
            self._waiting = self._assemble()
        found = self._waiting.get(id(owner))
        if found is None or torch.is_grad_enabled() > self._with_gradients or not found.is_current:
            return None
        return found.kernel

    def _assemble(self) -> dict[int, _Waiting]:
        found = [part for part in self._find(self._root) if part.weight.device.type not in ALONE]
        parts = [part for part in found if all(map(_is_plain, _tensors(part.modules)))]
        if not parts:
            return {}
        surfaces, versions = [_surface(part.modules) for part in parts], [_versions(part) for part in parts]
        plan = _plan_of(self._root, parts, surfaces)
        if len(plan.kernels) < 2:
            return {}
        with _in_full(plan.tensors):
            outputs = iter(_computed(plan.program, plan.tensors))
        waiting = {}
        for i, kernel in plan.kernels.items():
            made = replace(kernel, weight=next(outputs), bias=None if kernel.bias is None else next(outputs))
            waiting[id(parts[i].owner)] = _Waiting(parts[i], made, surfaces[i], versions[i], _stream(parts[i].weight))
        return waiting


def _stream(tensor: Tensor) -> object:
    """Return the stream on which the tensor's device works now, or None for a device without streams."""
    current = getattr(getattr(torch, tensor.device.type, None), "current_stream", None)
    return None if current is None else current(tensor.device)


def _is_captured() -> bool:
    """Whether a CUDA graph is recorded, which may run when the constants of the plan are gone."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


# ---- what to compute


@dataclass(frozen=True, eq=False)
class _Plan:
    """The plan by which the kernels of a model are assembled. It holds as long as the modules stay as they are.

    Args:
        seen: all that the plan was made from.
        kernels: kernels of deferred tensors, by the number of the part; not of parts that assemble their own.
        program: what computes their weights and biases, in this order, from `tensors`.
    """

    seen: list[object]
    kernels: dict[int, Kernel]
    program: Program
    tensors: list[Tensor]

    def __post_init__(self) -> None:
        object.__setattr__(self, "_kinds", self._kinds_now())

    def _kinds_now(self) -> list[object]:
        return [(each.dtype, each.device, each.shape) for each in self.tensors]

    def holds_for(self, seen: list[object]) -> bool:
        """Whether nothing that the plan was made from has changed, and each tensor still has its dtype, device and shape."""
        return _same(self.seen, seen) and self._kinds_now() == vars(self)["_kinds"]

    @property
    def lasts(self) -> bool:
        """Whether the plan may be kept: it holds no graph of other code, and its constants aren't made for some mode alone."""
        return all(each.is_leaf for each in self.tensors) and torch._C._len_torch_dispatch_stack() == 0

    def __deepcopy__(self, memo: object) -> None:
        """Leave a copied model without a plan: it makes its own."""


def _plan_of(root: nn.Module, parts: list[Part], surfaces: list[list[object]]) -> _Plan:
    """Return the model's plan, a new one if anything has changed."""
    seen: list[object] = [part.owner for part in parts]
    seen += (each for surface in surfaces for each in surface)
    plan = kept(root, PLAN)
    if isinstance(plan, _Plan) and plan.holds_for(seen):
        return plan
    recording = Recording()
    kernels = {i: kernel for i, part in enumerate(parts) if (kernel := _recorded(part, recording)) is not None}
    wanted: list[Any] = [each for made in kernels.values() for each in (made.weight, made.bias) if each is not None]
    plan = _Plan(seen, kernels, Program(wanted), recording.tensors)
    keep(root, PLAN, plan if plan.lasts else None)
    return plan


def _recorded(part: Part, recording: Recording) -> Kernel | None:
    """Return the kernel of a part in deferred tensors. None if the part has to assemble its own."""
    if any(map(is_parametrized, part.modules)) or not _shows_all(part.modules):
        return None
    known = len(recording.tensors)
    try:
        kernel = part.kernel_like(recording.input(part.weight))
    except Exception:  # code of others may do anything with a tensor; it is run again with tensors
        return None
    own = {id(each) for each in _tensors(part.modules)}
    if any(id(each) not in own for each in recording.tensors[known:]):
        return None
    return kernel if all(isinstance(each, Deferred) for each in (kernel.weight, kernel.bias or kernel.weight)) else None


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter)


def _tensors(modules: Sequence[nn.Module]) -> list[Tensor]:
    found = (each for module in modules for each in (*module._parameters.values(), *module._buffers.values()))
    return [each for each in found if each is not None]


def _surface(modules: Sequence[nn.Module]) -> list[object]:
    """Return what code can read of modules: their classes, attributes, tensors, children, and what lists and dicts of theirs hold."""
    found: list[object] = []
    for module in modules:
        values = vars(module).copy()
        values.pop(PLAN, None)
        found += (module, type(module), *values.values())
        for value in values.values():
            if isinstance(value, dict):
                found.extend(value.values())
            elif isinstance(value, (list, set)):
                found.extend(value)
    return found


def _shows_all(modules: Sequence[nn.Module]) -> bool:
    """Whether `_surface` shows any change of what the modules' own attributes hold, however deep it lies."""
    own = [value for each in modules for name, value in vars(each).items() if name not in _OF_EVERY_MODULE]
    held = (each for value in own for each in (value.values() if isinstance(value, dict) else _items(value)))
    return all(map(_is_fixed, held))


_OF_EVERY_MODULE = frozenset({*vars(nn.Module()), PLAN})
_FIXED = (
    bool,
    int,
    float,
    complex,
    str,
    type(None),
    Tensor,
    nn.Module,
    Enum,
    type,
    FunctionType,
    torch.dtype,
    torch.device,
)


def _items(value: object) -> Iterable[object]:
    return value if isinstance(value, (list, set)) else (value,)


def _is_fixed(value: object) -> bool:
    """Whether nothing inside an object can be exchanged; what is a module or tensor is looked at by itself."""
    if isinstance(value, (tuple, frozenset)):
        return all(map(_is_fixed, value))
    if is_dataclass(value) and type(value).__dataclass_params__.frozen:  # type: ignore[union-attr]
        return all(map(_is_fixed, vars(value).values()))
    return isinstance(value, _FIXED)


def _versions(part: Part) -> list[object]:
    """Return what changes with the numbers of a part."""
    return [(each.data_ptr(), _version(each), each.requires_grad) for each in _tensors(part.modules)]


def _version(tensor: Tensor) -> int:
    """Return the number of writes into a tensor. Those into tensors of inference mode aren't counted."""
    return 0 if tensor.is_inference() else tensor._version


def _same(first: list[object], second: list[object]) -> bool:
    """Whether two lists have the same objects."""
    return len(first) == len(second) and all(map(operator.is_, first, second))


# ---- computing it


def _in_full(tensors: Sequence[Tensor]) -> ExitStack:
    """Return a context without autocast on any device of the tensors."""
    stack = ExitStack()
    for each in {each.device.type: each for each in tensors}.values():
        stack.enter_context(in_full(each))
    return stack


def _computed(program: Program, tensors: list[Tensor]) -> Sequence[Tensor]:
    if torch.is_grad_enabled() and any(each.requires_grad for each in tensors):
        return _Computed.apply(program, *tensors)  # type: ignore[no-any-return]
    return program(tensors)


class _Computed(torch.autograd.Function):
    """The outputs of a program, whose graph stays apart from the graph of the model.

    So a part of the outputs can go through the backward pass without the others, as it can if each part assembles its own kernel. The
    first backward pass takes the graph of the forward pass along. Any further one, and one that is differentiated itself, computes anew.
    """

    @staticmethod
    def forward(ctx: Any, program: Program, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.program, ctx.tensors, ctx.versions = program, tensors, [*map(_version, tensors)]
        ctx.trained = [each.requires_grad for each in tensors]
        ctx.graph = _graph(program, tensors, ctx.trained)
        trained = {index for index, needs in enumerate(ctx.trained) if needs}
        outputs = tuple(each.detach() for each in ctx.graph[1])
        ctx.mark_non_differentiable(*(each for each, needs in zip(outputs, program.needs) if not needs & trained))
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        given = {index: each for index, each in enumerate(gradients) if each is not None}
        reached = {index for each in given for index in ctx.program.needs[each]}
        wanted = [index for index in sorted(reached) if ctx.needs_input_grad[1 + index]]
        if not wanted:  # code behind the model may give no gradient to any kernel
            return None, *(None for _ in ctx.tensors)
        graph, ctx.graph = ctx.graph, None
        differentiable = torch.is_grad_enabled()
        with _in_full(ctx.tensors):
            if differentiable or graph is None:
                _require_unchanged([(ctx.tensors[index], ctx.versions[index]) for index in reached])
                graph = _graph(ctx.program, ctx.tensors, ctx.trained, apart=not differentiable)
            found = torch.autograd.grad(
                [graph[1][index] for index in given],
                [graph[0][index] for index in wanted],
                list(given.values()),
                create_graph=differentiable,
                allow_unused=True,
            )
        by_index = dict(zip(wanted, found))
        return None, *(by_index.get(index) for index in range(len(ctx.tensors)))


def _graph(
    program: Program, tensors: Sequence[Tensor], trained: Sequence[bool], *, apart: bool = True
) -> tuple[list[Tensor], Sequence[Tensor]]:
    """Run a program on the same tensors. Return its inputs and outputs.

    Args:
        trained: which tensors get gradients, whatever they require by now.
        apart: whether to do it in a graph of its own.
    """
    with torch.enable_grad():
        inputs = [
            each.detach().requires_grad_(needs) if apart or each.requires_grad != needs else each
            for each, needs in zip(tensors, trained)
        ]
        return inputs, program(inputs)


def _require_unchanged(needed: Sequence[tuple[Tensor, int]]) -> None:
    if any(_version(each) != version for each, version in needed):
        raise RuntimeError(
            "a parameter of a squeezed model was changed in place between its forward and its backward pass"
        )
