"""Verbs run in one thread and change nothing for code in others: no call of theirs fails, is recorded, or meets a wrapper."""

from __future__ import annotations

import asyncio
import copy
import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import repfx
from repfx.tracing.tracer import Tracer
from tests.inline_net import Net, error_of, fused_exactly, image, norms, ready, reasons, same_state

ROUNDS = 12


def stack(width: int = 4) -> nn.Sequential:
    """Three convs with BatchNorms."""
    layers = [(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()) for _ in range(3)]
    made: nn.Sequential = ready(nn.Sequential(*(layer for each in layers for layer in each)))
    return made


def scaled() -> nn.Module:
    """A net that calls a function of `math` with a size."""
    made: nn.Module = ready(
        Net(
            lambda self, x: self.norm(self.conv(x)) / math.sqrt(x.shape[1]),
            conv=nn.Conv2d(4, 6, (3, 1)),
            norm=nn.BatchNorm2d(6),
        )
    )
    return made


def in_place() -> dict[str, object]:
    """Everything that a tracer might replace where other threads find it."""
    return {
        "call": nn.Module.__call__,
        "getattr": nn.Module.__getattr__,
        "autocast": torch.autocast.__enter__,
        "sqrt": math.sqrt,
        "names": sorted(vars(math)),
        "own names": sorted(globals()),
    }


@contextmanager
def served(*models: nn.Module) -> Iterator[list[int]]:
    """Run forward passes and autocast in another thread meanwhile; each must give the same as before. Yields the number of passes."""
    x, stop, count = image(), threading.Event(), [0]
    expected = [model(x) for model in models]

    def serve() -> None:
        while not stop.is_set():
            for model, output in zip(models, expected, strict=True):
                assert torch.equal(model(x), output)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert torch.mm(torch.ones(2, 3), torch.ones(3, 2)).dtype == torch.bfloat16
            assert math.sqrt(9) == 3.0
            count[0] += len(models)

    with ThreadPoolExecutor(1) as pool:
        serving = pool.submit(serve)
        try:
            yield count
        finally:
            stop.set()
            serving.result()


VERBS: dict[str, Callable[[nn.Module], Any]] = {
    "fuse": repfx.fuse,
    "sites": repfx.sites,
    "expand": lambda model: repfx.expand(model, "acb"),
    "squeeze": lambda model: repfx.squeeze(repfx.expand(model, "acb")),
    "drop": lambda model: repfx.drop(repfx.expand(model, "acb"), "0", "1xk"),
    "restore": lambda model: repfx.restore(repfx.fuse(model)),
}


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_a_thread_that_serves_sees_nothing_of_verbs_in_another_one(verb: str) -> None:
    before = in_place()
    with served(stack(), scaled()) as count:
        for _ in range(ROUNDS):
            VERBS[verb](stack())
    assert count[0] > 0
    assert in_place() == before


def test_threads_that_fuse_at_once_get_what_one_thread_gets() -> None:
    before, x = in_place(), image()

    def fuse(_: int) -> list[float]:
        models = [make() for _ in range(ROUNDS) for make in (stack, scaled)]
        return [error_of(repfx.fuse(model), model, x) for model in models]

    with served(stack(), scaled()), ThreadPoolExecutor(4) as pool:
        errors = [error for errors in pool.map(fuse, range(4)) for error in errors]
    assert len(errors) == 4 * 2 * ROUNDS
    assert max(errors) < 1e-9
    assert in_place() == before


@pytest.mark.slow
def test_threads_that_fuse_the_same_model_leave_it_as_it_was() -> None:
    model = stack()
    with served(model), ThreadPoolExecutor(4) as pool:
        fused = list(pool.map(repfx.fuse, [model] * 4 * ROUNDS))
    assert max(error_of(each, model, image()) for each in fused) < 1e-9
    assert not any(norms(each) for each in fused)


def test_an_event_loop_serves_while_another_thread_fuses() -> None:
    model, x = stack(), image()
    expected = model(x)

    async def serve() -> int:
        tasks = [asyncio.create_task(asyncio.to_thread(repfx.fuse, stack())) for _ in range(4)]
        count = 0
        while not all(task.done() for task in tasks):
            assert torch.equal(model(x), expected)
            count += 1
            await asyncio.sleep(0)
        assert not any(norms(task.result()) for task in tasks)
        return count

    assert asyncio.run(serve()) > 0


class Halt:
    """Lets a thread wait in the middle of code that is traced there."""

    def __init__(self) -> None:
        self.reached, self.released = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.reached.set()
        assert self.released.wait(60)


HALT = Halt()


class Halting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, (3, 1))
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(x))
        HALT()
        return y * math.sqrt(x.shape[1])


@pytest.fixture
def halted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A model that another thread is tracing, and the future of its fused form."""
    halt, model = Halt(), ready(Halting())
    monkeypatch.setitem(globals(), "HALT", halt)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(repfx.fuse, model)
        assert halt.reached.wait(60)
        try:
            yield model, halt, future
        finally:
            halt.released.set()


def finish(halted: Any) -> None:
    """Let the other thread go on. What it made must hold what its own code did, and nothing else."""
    model, halt, future = halted
    halt.released.set()
    fused = future.result()
    assert not norms(fused), reasons(fused)
    assert [node.op for node in fused.graph.nodes if node.op != "call_function"] == [
        "placeholder",
        "call_module",
        "output",
    ]
    assert error_of(fused, model, image()) < 1e-9


def test_no_class_of_torch_is_changed_while_another_thread_traces(halted: Any) -> None:
    assert nn.Module.__call__ is fx._symbolic_trace._orig_module_call
    assert nn.Module.__getattr__ is fx._symbolic_trace._orig_module_getattr
    assert torch.autocast.__enter__ is torch.amp.autocast.__enter__
    assert torch.autocast.__enter__.__module__ == "torch.amp.autocast_mode"
    assert not fx._symbolic_trace.is_fx_tracing()
    finish(halted)


def test_calls_go_straight_through_while_another_thread_traces(halted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = stack(), image()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert torch.isfinite(model(x)).all()
    with monkeypatch.context() as patch:
        patch.delattr(fx._symbolic_trace, "_find_proxy")  # nobody looks for proxies in the arguments
        assert math.sqrt(16) == 4.0
    finish(halted)


def test_a_model_is_compiled_while_another_thread_traces(halted: Any) -> None:
    model, x = scaled(), image()
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    assert error_of(compiled, model, x) < 1e-12
    finish(halted)
    assert error_of(compiled, model, x) < 1e-12


def test_a_model_is_traced_by_torch_while_another_thread_traces(halted: Any) -> None:
    model, x = scaled(), image()
    traced = fx.symbolic_trace(model)
    assert error_of(traced, model, x) < 1e-12
    finish(halted)
    assert error_of(traced, model, x) < 1e-12


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_code_that_fails_leaves_nothing_behind(error: type[BaseException]) -> None:
    def fails(self: nn.Module, x: Tensor) -> Tensor:
        torch.set_grad_enabled(False)
        torch.autocast("cpu", dtype=torch.float16).__enter__()
        raise error("interrupted")

    before, model = in_place(), Net(fails, conv=nn.Conv2d(4, 4, 1))
    tables = [(name, id(value), type(value)) for name, value in vars(model.conv).items()]
    with pytest.raises(error, match="interrupted"):
        Tracer().trace(model)
    assert in_place() == before
    assert [(name, id(value), type(value)) for name, value in vars(model.conv).items()] == tables
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")
    assert torch.get_autocast_dtype("cpu") == torch.bfloat16
    assert torch.autocast_decrement_nesting() == -1
    torch.autocast_increment_nesting()
    assert norms(fused_exactly(stack(), image())) == []


def test_tracing_inside_traced_code_ends_as_it_began() -> None:
    before, inner = in_place(), scaled()
    fused_inside: list[Any] = []

    def nested(self: nn.Module, x: Tensor) -> Any:
        fused_inside.append(repfx.fuse(inner))
        return self.norm(self.conv(x)) / math.sqrt(x.shape[1])  # type: ignore[operator]

    fused = fused_exactly(Net(nested, conv=nn.Conv2d(4, 6, (3, 1)), norm=nn.BatchNorm2d(6)), image())
    for each in (fused, fused_inside[0]):
        assert not norms(each), reasons(each)
        assert before["sqrt"] in [node.target for node in each.graph.nodes]
    assert in_place() == before


def switched_on(self: Any, x: Tensor) -> Any:
    torch.set_autocast_enabled("cpu", True)
    try:
        return self.norm(self.conv(x))
    finally:
        torch.set_autocast_enabled("cpu", False)


def off_inside(self: Any, x: Tensor) -> Any:
    with torch.autocast("cpu", enabled=False):
        return self.norm(self.conv(x))


def by_a_name(self: Any, x: Tensor) -> Any:
    with getattr(torch, "auto" + "cast")("cpu", dtype=torch.bfloat16):
        y = self.conv(x)
    return self.norm(y)


def without_gradients(self: Any, x: Tensor) -> Any:
    with torch.no_grad():
        y = self.conv(x)
    return self.norm(y)


@pytest.mark.parametrize("function", [switched_on, off_inside, by_a_name, without_gradients])
def test_modes_that_code_switches_are_seen_without_a_patch(function: Callable[..., Any]) -> None:
    model = ready(Net(function, conv=nn.Conv2d(4, 4, 3), norm=nn.BatchNorm2d(4)))
    fused = repfx.fuse(model)
    assert norms(fused) == ["norm"]
    assert "on or off" in reasons(fused)


LIVE_NORM = nn.BatchNorm2d(4, affine=False)
LIVE_LINEAR = nn.Linear(1, 4)


class Shared:
    """A class that holds a module for all models."""

    dropout = nn.Dropout()


OUTSIDE: dict[str, tuple[Callable[..., Any], str]] = {
    "a global module": (lambda self, x: LIVE_NORM(x), "it calls a BatchNorm2d that is not installed as a submodule"),
    "a module of a class": (
        lambda self, x: Shared.dropout(x),
        "it calls a Dropout that is not installed as a submodule",
    ),
    "a module with a parameter": (lambda self, x: self.kept[0](x), "parameter is not a member of this module"),
    "a sequence with a child": (
        lambda self, x: self.kept[1](x),
        "it calls a Sequential that is not installed as a submodule",
    ),
    "a global module of constants": (
        lambda self, x: x + LIVE_LINEAR(torch.ones(1, 1)).view(1, 4, 1, 1),
        "it computes with parameters that it doesn't read as attributes",
    ),
    "all parameters": (
        lambda self, x: x * sum(p.pow(2).sum() for p in self.parameters()),
        "it computes with parameters that it doesn't read as attributes",
    ),
    "parameters that are swapped": (
        lambda self, x: torch.func.functional_call(self.norm, {"weight": self.norm.weight * 2}, (x,)),
        "it changes its own tensors while it runs",
    ),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_code_that_reaches_outside_its_modules_is_left_alone(name: str) -> None:
    function, reason = OUTSIDE[name]
    norm = nn.BatchNorm2d(4)
    model = ready(Net(lambda self, x: function(self, self.norm(self.conv(x))), conv=nn.Conv2d(4, 4, (3, 1)), norm=norm))
    model.kept = [nn.PReLU(), nn.Sequential(norm)]
    state = {path: tensor.clone() for path, tensor in LIVE_NORM.state_dict().items()}
    fused = repfx.fuse(model)
    assert norms(fused) == ["norm"]
    assert reason in reasons(fused)
    assert same_state(LIVE_NORM.state_dict(), state)


SLOPE = nn.LeakyReLU(0.3)
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "a global activation": lambda self, x: SLOPE(x),
    "one in a list": lambda self, x: self.kept[0](x),
    "one in a dict, in place": lambda self, x: self.kept[1]["act"](x * 1.0),
    "a pooling made on the way": lambda self, x: nn.AvgPool2d((2, 1))(x),
    "a sequence": lambda self, x: self.kept[2](x),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_layers_outside_that_are_only_functions_are_traced(name: str) -> None:
    norm = nn.BatchNorm2d(4)
    model = ready(
        Net(lambda self, x: FUNCTIONS[name](self, self.norm(self.conv(x))), conv=nn.Conv2d(4, 4, (3, 1)), norm=norm)
    )
    model.kept = [nn.Hardsigmoid(), {"act": nn.ELU(0.7, inplace=True)}, nn.Sequential(nn.ReLU(), nn.Softplus(2))]
    fused = repfx.fuse(model)
    assert not norms(fused)
    x = torch.randn(2, 4, 7, 5, dtype=next(model.parameters()).dtype)
    assert torch.allclose(fused(x), model(x), rtol=1e-12, atol=1e-12)


def test_a_squeezed_model_calls_what_its_code_calls_now() -> None:
    model = ready(Net(lambda self, x: self.last(self.kept[0](self.first(x))), first=pair(), last=pair()))
    model.kept = [nn.LeakyReLU(0.1)]
    squeezed = repfx.squeeze(model)
    assert len(repfx.report(squeezed).applied) == 2
    squeezed.kept[0] = model.kept[0] = nn.Tanh()
    x = torch.randn(2, 4, 7, 5, dtype=next(model.parameters()).dtype)
    assert torch.allclose(squeezed(x), model(x), rtol=1e-12, atol=1e-12)


def pair() -> nn.Module:
    """Two convs that are one linear map."""
    return nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.Conv2d(4, 4, (3, 1)))


def test_a_copy_that_code_makes_of_a_module_is_an_ordinary_one() -> None:
    copies: list[nn.Module] = []

    def copying(self: Any, x: Tensor) -> Any:
        copies.append(copy.deepcopy(self.conv))
        return self.norm(self.conv(x))

    repfx.fuse(ready(Net(copying, conv=nn.Conv2d(4, 4, 3), norm=nn.BatchNorm2d(4))))
    assert copies
    for made in copies:
        assert type(vars(made)["_parameters"]) is dict
        assert torch.isfinite(made(image())).all()
