"""Squeezed parts that assemble their kernels together: as each by itself, whatever happens in between, and in few operations."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import repfx
from repfx.algebra.assembly import WAITING
from repfx.algebra.kernel import Kernel
from repfx.blocks.branch import KINDS, Branch
from repfx.blocks.squeezed_form import lead
from repfx.blocks.together import PLAN
from repfx.passes.drop import drop
from repfx.passes.gate import gate
from repfx.testing import randomize_batch_norm
from tests.random_numbers import numbers_from

pytestmark = pytest.mark.usefixtures("as_on_a_gpu")

X = torch.randn(2, 3, 8, 9, dtype=torch.float64, generator=numbers_from(11))


class Counted(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls = Counter[str]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), options: Any = None) -> Any:
        self.calls[function.overloadpacket.__name__] += not function.is_view
        return function(*args, **(options or {}))


class TwoHeads(nn.Module):
    """A stem with two heads, one of which may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.first = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
        self.second = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
        self.heads = 2

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.stem(x)
        found = [self.first(x)]
        if self.heads == 2:
            found.append(self.second(x))
        return found


class Around(nn.Module):
    """Runs a module in the way of the user."""

    def __init__(self, inner: nn.Module, way: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.way = inner, way

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self.inner, x)


def squeezed(spec: Any = "dbb", model: nn.Module | None = None) -> Any:
    model = repfx.expand(model or TwoHeads(), spec, preserve=False).double()
    return repfx.squeeze(randomize_batch_norm(model), statistics="frozen").train()


def chain(count: int, channels: int = 4) -> nn.Sequential:
    """Convs of one shape, one after another."""
    layers = (
        layer
        for _ in range(count)
        for layer in (nn.Conv2d(channels, channels, 3, bias=False), nn.BatchNorm2d(channels))
    )
    return nn.Sequential(*layers)


def alone(model: nn.Module, x: Tensor = X) -> Any:
    """Run a model whose parts each assemble their own kernel."""
    token = WAITING.set(lambda owner: None)
    try:
        return model(x)
    finally:
        WAITING.reset(token)


def squares(outputs: list[Tensor]) -> Tensor:
    return torch.stack([y.square().sum() for y in outputs]).sum()


def gradients(model: nn.Module, run: Callable[[nn.Module], Any]) -> dict[str, Tensor | None]:
    model.zero_grad()
    squares(run(model)).backward()
    return {name: None if each.grad is None else each.grad.clone() for name, each in model.named_parameters()}


def assert_close(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    for name, each in expected.items():
        one = found[name]
        assert (one is None) == (each is None), name
        assert one is None or each is None or torch.allclose(one, each, rtol=1e-10, atol=1e-12), name


def forward_counts(model: nn.Module, x: Tensor = X) -> Counter[str]:
    model(x)
    counted = Counted()
    with counted:
        model(x)
    return counted.calls


@pytest.mark.parametrize("spec", ["dbb", "orepa", "repvgg"])
def test_more_blocks_of_one_shape_need_no_more_operations(spec: str) -> None:
    """What grows are the convs, and the BatchNorms that stay outside."""
    few, many = (forward_counts(squeezed(spec, chain(count)), X.new_zeros(2, 4, 15, 16)) for count in (2, 5))
    for name in few.keys() | many.keys():
        assert name in {"convolution", "native_batch_norm"} or many[name] <= few[name] + 1, name
    assert many["convolution"] == few["convolution"] + 3


def test_outputs_and_gradients_are_those_of_each_part_alone() -> None:
    model = squeezed()
    for one, other in zip(model(X), alone(model)):
        assert torch.allclose(one, other, rtol=1e-11)
    assert_close(gradients(model, lambda model: model(X)), gradients(model, alone))
    assert forward_counts(model)["rsqrt"] == 1


def test_a_change_between_two_parts_counts() -> None:
    """A hook of the user writes into a block that hasn't run yet, exchanges a parameter, or takes a branch out."""

    @torch.no_grad()
    def write(model: Any) -> None:
        model.second[0].conv.weight.mul_(2)

    def exchange(model: Any) -> None:
        model.second[0].conv.weight = nn.Parameter(model.second[0].conv.weight.detach() * 3)

    def take_out(model: Any) -> None:
        model.second[0].remove("1x1")

    for change in (write, exchange, take_out):
        model = squeezed()
        model(X)
        twin = copy.deepcopy(model)
        handle = model.first.register_forward_hook(lambda *_, change=change, model=model: change(model))
        found = model(X)
        handle.remove()
        change(twin)
        expected = alone(twin)
        assert all(torch.allclose(one, other, rtol=1e-11) for one, other in zip(found, expected)), change


@pytest.mark.parametrize("again", ["write", "double", "drop", "load", "mode", "setting"])
def test_a_change_between_two_calls_counts(again: str) -> None:
    model, x = squeezed(), X
    model(X)
    if again == "write":
        with torch.no_grad():
            model.second[0].conv.weight.mul_(2)
    elif again == "double":
        model, x = model.float(), X.float()
    elif again == "drop":
        drop(model, "second.0", "1x1")
    elif again == "load":
        model.load_state_dict(squeezed().state_dict())
    elif again == "mode":
        model.eval()
    else:
        model.second[0].norm.eps = 0.5
    for one, other in zip(model(x), alone(model, x)):
        assert one.dtype == x.dtype
        assert torch.allclose(one, other, rtol=1e-11 if x is X else 1e-4, atol=1e-12 if x is X else 1e-4)


def test_optimizer_steps_are_seen() -> None:
    model, twin = squeezed(), squeezed()
    twin.load_state_dict(model.state_dict())
    runs: list[tuple[Any, Callable[[], list[Tensor]]]] = [(model, lambda: model(X)), (twin, lambda: alone(twin))]
    for one, run in runs:
        optimizer = torch.optim.SGD(one.parameters(), 1e-4, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            squares(run()).backward()
            optimizer.step()
    for each, other in zip(model.parameters(), twin.parameters()):
        assert torch.allclose(each, other, rtol=1e-10)


@pytest.mark.parametrize("reentrant", [True, False])
def test_parts_in_a_checkpoint_run_again_by_themselves(reentrant: bool) -> None:
    model = squeezed()
    for name in ("first", "second"):
        setattr(model, name, Around(getattr(model, name), lambda head, x: checkpoint(head, x, use_reentrant=reentrant)))
    expected = gradients(model, alone)
    assert_close(gradients(model, lambda model: model(X)), expected)


def test_parts_of_the_outputs_go_back_by_themselves_and_again() -> None:
    model = squeezed()
    expected = gradients(model, alone)
    model.stem.requires_grad_(False)  # so that the heads share nothing
    model.zero_grad()
    first, second = model(X)
    first.square().sum().backward()
    assert model.second[0].conv.weight.grad is None
    second.square().sum().backward(retain_graph=True)
    second.square().sum().backward()
    model.second.zero_grad()
    loss, weight = model(X)[1].square().sum(), model.second[0].conv.weight
    once, twice = (torch.autograd.grad(loss, weight, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(once, twice)
    found = {name: each.grad for name, each in model.first.named_parameters()}
    assert_close(found, {name: expected[f"first.{name}"] for name in found})
    assert model.stem[0].conv.weight.grad is None


def test_what_did_not_run_gets_no_gradient() -> None:
    model = squeezed()
    model.heads = 1
    assert_close(gradients(model, lambda model: model(X)), gradients(model, alone))


def test_second_derivatives() -> None:
    model = squeezed()
    found = []
    for run in (model, lambda x: alone(model, x)):
        x = X.clone().requires_grad_()
        (slope,) = torch.autograd.grad(squares(run(x)), x, create_graph=True)
        weights = [each for each in model.parameters() if each.requires_grad]
        inner = torch.autograd.grad(squares(run(x)), weights[0], create_graph=True)[0]
        found.append(torch.autograd.grad(slope.square().sum() + inner.square().sum(), weights))
    for one, other in zip(*found):
        assert torch.allclose(one, other, rtol=1e-8, atol=1e-8 * float(other.abs().max()))


def test_a_parameter_that_was_changed_in_place_is_no_way_back_again() -> None:
    model = squeezed()
    loss = squares(model(X))
    loss.backward(retain_graph=True)
    with torch.no_grad():
        model.second[0].conv.weight.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place"):
        loss.backward()


def test_parts_run_by_hand_and_without_gradients() -> None:
    model = squeezed()
    hidden = model.stem(X)
    model(X)
    for grad in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with grad():
            found = model(X)[0]
        assert torch.allclose(found, model.first(hidden), rtol=1e-11)
    assert WAITING.get() is None


def test_gradients_that_are_switched_on_inside() -> None:
    """The first head runs without gradients, so the kernels are assembled without; the second one needs them."""
    model = squeezed()

    def without(head: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            return head(x)  # type: ignore[no-any-return]

    model.stem, model.first = Around(model.stem, without), Around(model.first, without)
    assert_close(gradients(model, lambda model: model(X)[1:]), gradients(model, lambda model: alone(model)[1:]))


def test_an_error_ends_it() -> None:
    model = squeezed()
    with pytest.raises(RuntimeError):
        model(X[:, :1])
    assert WAITING.get() is None


def test_frozen_parts_need_no_gradient() -> None:
    model = squeezed()
    model.first.requires_grad_(False)
    first, second = (y.grad_fn for y in model(X))
    assert (first.next_functions[1][0], second.next_functions[1][0] is None) == (None, False)  # of the kernels
    assert_close(gradients(model, lambda model: model(X)), gradients(model, alone))


def test_a_kind_that_does_what_cannot_be_recorded_assembles_its_own() -> None:
    class Normed(Branch):
        kind = "normed"

        @classmethod
        def stages(cls, site: Any, norm: Any, like: Tensor) -> Any:
            yield "conv", nn.Conv2d(site.in_channels, site.out_channels, 3, padding=1, bias=False, dtype=like.dtype)

        def forward(self, x: Tensor) -> Any:
            conv: Any = self[0]
            return conv(x) / conv.weight.norm()

        def equivalent_kernel(self, like: Tensor) -> Kernel:
            kernel = super().equivalent_kernel(like)
            return kernel.fold_affine(like.new_ones(kernel.out_channels) / kernel.weight.norm())

    try:
        model = squeezed(["normed"])
        reference = repfx.unsqueeze(copy.deepcopy(model)).eval()
        for one, other in zip(model(X), reference(X)):
            assert torch.allclose(one, other, rtol=1e-10)
    finally:
        KINDS.known.pop("normed", None)


def test_copies_make_plans_of_their_own() -> None:
    model = squeezed()
    model(X)
    assert getattr(model, PLAN) is not None
    copied = copy.deepcopy(model)
    assert getattr(copied, PLAN) is None
    assert type(copied) is type(model)
    with torch.no_grad():
        copied.second[0].conv.weight.mul_(2)
    assert torch.allclose(copied(X)[1], alone(copied)[1], rtol=1e-11)
    loaded = pickle.loads(pickle.dumps(model))
    assert type(loaded) is TwoHeads
    assert torch.allclose(loaded(X)[1], model(X)[1], rtol=1e-11)


def test_the_class_is_the_user_s_again_once_nothing_is_squeezed() -> None:
    model = squeezed()
    assert type(model) is not TwoHeads
    assert isinstance(model, TwoHeads)
    assert not model._forward_pre_hooks
    repfx.unsqueeze(model, "first.*")
    assert isinstance(model, TwoHeads)
    assert type(model) is not TwoHeads
    repfx.unsqueeze(model)
    assert type(model) is TwoHeads
    assert PLAN not in vars(model)


class CopiesItself(TwoHeads):
    def __deepcopy__(self, memo: dict[int, Any]) -> CopiesItself:
        copied = CopiesItself()
        copied.load_state_dict(self.state_dict())
        return copied.double()


def test_classes_with_copying_of_their_own_stay() -> None:
    model = CopiesItself()
    lead(model)
    assert type(model) is CopiesItself
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 3, 3)))
    before = type(traced)
    lead(traced)
    assert type(traced) is before


def test_the_state_stays_the_same() -> None:
    model = squeezed()
    before = list(model.state_dict())
    model(X)
    assert list(model.state_dict()) == before


def test_weights_of_another_dtype_and_gates() -> None:
    model = repfx.expand(TwoHeads(), "dbb", preserve=False)
    gate(model, "second.0", "sigmoid")
    repfx.squeeze(randomize_batch_norm(model.double()), statistics="frozen")
    assert_close(gradients(model, lambda model: model(X)), gradients(model, alone))
    half = squeezed().bfloat16()
    for norm in (each for each in half.modules() if isinstance(each, nn.BatchNorm2d)):
        norm.float()
    for one, other in zip(half(X.bfloat16()), alone(half, X.bfloat16())):
        assert one.dtype == torch.bfloat16
        assert torch.allclose(one, other, rtol=0.1, atol=0.5)


@pytest.mark.slow
def test_the_program_compiles_by_itself_without_a_break() -> None:
    model = squeezed()
    model(X)
    plan = vars(model)[PLAN]
    compiled: Any = torch.compile(plan.program, backend="aot_eager", fullgraph=True)
    trained = [each for each in plan.tensors if each.requires_grad]
    expected, found = plan.program(plan.tensors), compiled(plan.tensors)
    for one, other in zip(expected, found, strict=True):
        assert torch.allclose(one, other, rtol=1e-12)
    slopes = [torch.autograd.grad(squares(each), trained) for each in (expected, found)]
    for one, other in zip(*slopes):
        assert torch.allclose(one, other, rtol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("heads", [1, 2])
def test_distributed_training_has_the_same_gradients(heads: int, tmp_path: Path) -> None:
    """With one head, the other one's parameters are unused, and their hooks have to be called all the same."""
    model = squeezed()
    model.heads = heads
    expected = gradients(model, alone)
    model.zero_grad()
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=heads == 1)
        for _ in range(2):
            model.zero_grad()
            squares(parallel(X)).backward()
    finally:
        distributed.destroy_process_group()
    assert_close({name: each.grad for name, each in model.named_parameters()}, expected)
