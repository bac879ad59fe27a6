"""Statistics measured on data: they are right, from anything that yields batches, and nothing else changes."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import repfx
from repfx.errors import InvalidInput
from repfx.measuring.calibration import PartialSum, calibrate_norms, measure_inputs, measure_sums, run
from repfx.records.modes import in_eval_mode
from repfx.testing import randomize_batch_norm, relative_error
from tests.inline_net import image, same_state
from tests.small_net import SmallNet, batch, small_net

SIZES = (6, 3, 1)


def batches() -> list[Tensor]:
    """Batches of unequal sizes."""
    return [batch(size, seed) for seed, size in enumerate(SIZES)]


def same_net() -> SmallNet:
    """A net with the same weights at each call."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return small_net()


def mixed_modes() -> SmallNet:
    """A net with the same weights at each call, whose modules alternate between training and eval mode."""
    net = same_net()
    for index, module in enumerate(net.modules()):
        module.training = index % 2 == 0
    return net


@torch.no_grad()
def into_norm2(x: Tensor) -> Tensor:
    """Inputs of `norm2` in eval mode, ``(channels, positions)``."""
    net = same_net().eval()
    entered: Tensor = net.depthwise(torch.relu(net.plain(torch.relu(net.norm(net.stem(x))))))
    return entered.transpose(0, 1).flatten(1)


# ---- calibrate_norms


def test_statistics_are_the_mean_over_the_batches() -> None:
    """The first BatchNorm stays in eval mode, so the second gets the inputs it will get later. The variance is unbiased, like torch's."""
    net = mixed_modes()
    calibrate_norms(net, [net.norm2], batches())
    expected = [into_norm2(x) for x in batches()]
    assert relative_error(net.norm2.running_mean, torch.stack([e.mean(1) for e in expected]).mean(0)) < 1e-12  # type: ignore[arg-type]
    assert relative_error(net.norm2.running_var, torch.stack([e.var(1) for e in expected]).mean(0)) < 1e-12  # type: ignore[arg-type]
    assert int(net.norm2.num_batches_tracked or 0) == len(SIZES)


def test_calibrating_twice_is_calibrating_once() -> None:
    net = mixed_modes()
    calibrate_norms(net, [net.norm2], [batch(4, 9) * 50])
    calibrate_norms(net, [net.norm2], batches())
    once = mixed_modes()
    calibrate_norms(once, [once.norm2], batches())
    assert same_state(net.state_dict(), once.state_dict())


@pytest.mark.parametrize("momentum", [0.2, None, 1.0])
def test_all_else_stays(momentum: float | None) -> None:
    net = mixed_modes()
    net.norm2.momentum = momentum
    before = copy.deepcopy(net.state_dict())
    modes = [module.training for module in net.modules()]
    random = torch.get_rng_state()
    calibrate_norms(net, [net.norm2], batches())
    changed = {name for name, tensor in net.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"norm2.running_mean", "norm2.running_var", "norm2.num_batches_tracked"}
    assert modes == [module.training for module in net.modules()]
    assert net.norm2.momentum == momentum
    assert all(parameter.grad is None for parameter in net.parameters())
    assert torch.equal(random, torch.get_rng_state())


def test_a_norm_that_no_data_reach_keeps_its_statistics() -> None:
    """A mask head runs on the boxes that were found, of which there may be none."""
    net, x = mixed_modes(), batch()
    before = copy.deepcopy(net.norm2.state_dict())
    calibrate_norms(net, [net.norm2], [x[:0]])
    assert same_state(net.norm2.state_dict(), before)
    calibrate_norms(net, [net.norm2], [x])
    expected = copy.deepcopy(net.norm2.state_dict())
    calibrate_norms(net, [net.norm2], [x[:0], x, x[:0]])
    assert same_state(net.norm2.state_dict(), expected)
    assert not net.norm2._forward_pre_hooks


def test_no_norms_are_no_obstacle() -> None:
    net = mixed_modes()
    before = copy.deepcopy(net.state_dict())
    calibrate_norms(net, [], batches())
    assert same_state(before, net.state_dict())


# ---- what gives batches


class Pair(NamedTuple):
    image: Tensor
    label: int


FORMS: dict[str, Callable[[], Any]] = {
    "list": batches,
    "tuple": lambda: tuple(batches()),
    "generator": lambda: iter(batches()),
    "tuples": lambda: [(x, torch.zeros(len(x))) for x in batches()],
    "lists, as a loader gives them": lambda: [[x, torch.zeros(len(x))] for x in batches()],
    "named tuples": lambda: [Pair(x, 3) for x in batches()],
    "tuples of one": lambda: [(x,) for x in batches()],
    "keyword arguments": lambda: [{"x": x} for x in batches()],
    "ordered keyword arguments": lambda: [OrderedDict(x=x) for x in batches()],
    "loader with labels": lambda: DataLoader(TensorDataset(torch.cat(batches()[:2]), torch.zeros(9)), batch_size=6),
    "loader of tensors": lambda: DataLoader(torch.cat(batches()[:2]), batch_size=6),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("form", FORMS)
def test_batches_come_in_any_form(form: str) -> None:
    given = batches()[:2] if form.startswith("loader") else batches()
    net, expected = same_net(), same_net()
    calibrate_norms(net, [net.norm2], FORMS[form]())
    calibrate_norms(expected, [expected.norm2], given)
    assert same_state(net.state_dict(), expected.state_dict())


def test_batches_come_to_the_model() -> None:
    seen = []
    model = small_net().to("meta")
    model.stem.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].device.type))
    run(model, [batch(), (batch(), None), {"x": batch()}])
    assert seen == ["meta"] * 3


def test_a_generator_is_read_once_and_no_further() -> None:
    seen: list[int] = []

    def produce() -> Iterator[Tensor]:
        for index, x in enumerate(batches()):
            seen.append(index)
            yield x

    net = small_net()
    calibrate_norms(net, [net.norm2], produce())
    assert seen == [0, 1, 2]


# ---- measure_inputs


def test_moments_of_what_enters_are_over_all_positions_of_all_batches() -> None:
    """Moments of several modules are measured at once, for batches of any sizes."""
    net = mixed_modes()
    stem, norm2 = measure_inputs(net, [net.stem, net.norm2], batches())
    entered = torch.cat([into_norm2(x) for x in batches()], 1)
    assert relative_error(norm2.mean, entered.mean(1)) < 1e-12
    assert relative_error(norm2.variance, entered.var(1, correction=0)) < 1e-12
    pixels = torch.cat(batches()).transpose(0, 1).flatten(1)
    assert relative_error(stem.mean, pixels.mean(1)) < 1e-12
    assert relative_error(stem.variance, pixels.var(1, correction=0)) < 1e-12


@pytest.mark.parametrize("offset", [0.0, 1e6], ids=["centred", "far from zero"])
def test_a_mean_far_from_zero_costs_no_digits_of_the_variance(offset: float) -> None:
    identity = nn.Sequential(nn.Identity())
    x = image(5, 4, 9, 10) + offset
    (moments,) = measure_inputs(identity, [identity[0]], [x[:2], x[2:]])
    assert relative_error(moments.variance, (x - offset).var((0, 2, 3), correction=0)) < 1e-9


def test_an_empty_batch_adds_nothing() -> None:
    net, x = same_net(), batch()
    (moments,) = measure_inputs(net, [net.norm2], [x[:0], x, x[:0]])
    (expected,) = measure_inputs(net, [net.norm2], [x])
    assert torch.equal(moments.mean, expected.mean)
    assert torch.equal(moments.variance, expected.variance)
    with pytest.raises(InvalidInput, match="never reached"):
        measure_inputs(net, [net.norm2], [x[:0]])


def test_a_module_that_is_called_twice_is_measured_in_both_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.norm(x) + self.norm(x * 3)
            return output

    net, x = Twice().double(), image()
    (moments,) = measure_inputs(net, [net.norm], [x])
    both = torch.cat([x, x * 3]).transpose(0, 1).flatten(1)
    assert relative_error(moments.variance, both.var(1, correction=0)) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_measuring_is_in_float64_and_touches_nothing(dtype: torch.dtype) -> None:
    net = mixed_modes().to(dtype)
    before, modes = copy.deepcopy(net.state_dict()), [module.training for module in net.modules()]
    (moments,) = measure_inputs(net, [net.stem], [x.to(dtype) for x in batches()])
    pixels = torch.cat(batches()).to(dtype).double()
    assert relative_error(moments.mean, pixels.mean((0, 2, 3))) < 1e-9
    assert same_state(before, net.state_dict())
    assert modes == [module.training for module in net.modules()]
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_what_enters_a_linear_layer_is_measured_by_its_features() -> None:
    net, x = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)).double(), image(7, 4)
    (moments,) = measure_inputs(net, [net[1]], [x[:3], x[3:]])
    assert relative_error(moments.mean, net[0](x).mean(0)) < 1e-12


# ---- failures


MEASURES: dict[str, Callable[[SmallNet, Any], object]] = {
    "calibrate_norms": lambda net, data: calibrate_norms(net, [net.norm2], data),
    "measure_inputs": lambda net, data: measure_inputs(net, [net.norm2], data),
}
BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "nothing": (list, "calibrate gave no batch"),
    "an exhausted generator": (lambda: iter(()), "calibrate gave no batch"),
    "wrong channels": (
        lambda: [batch(), torch.zeros(1, 5, 9, 11).double()],
        "batch 1 of calibrate doesn't fit SmallNet",
    ),
    "wrong dtype": (lambda: [batch().float()], "batch 0 of calibrate doesn't fit SmallNet"),
    "an empty tuple": (lambda: [()], "batch 0 of calibrate doesn't fit"),
    "no tensor": (lambda: ["image.png"], "batch 0 of calibrate doesn't fit"),
    "a list of inputs": (
        lambda: [[batch()[0], batch()[0]]],
        "the first entry of batch 0 of calibrate doesn't fit SmallNet: .* a list that is one input goes inside a tuple",
    ),
    "another keyword": (lambda: [{"image": batch()}], "batch 0 of calibrate doesn't fit .*'image'"),
}


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("bad", BAD)
def test_a_failure_says_which_batch_and_leaves_modes_and_hooks(bad: str, measure: str) -> None:
    data, message = BAD[bad]
    net = mixed_modes()
    modes, momentum = [module.training for module in net.modules()], net.norm2.momentum
    with pytest.raises(InvalidInput, match=message):
        MEASURES[measure](net, data())
    assert modes == [module.training for module in net.modules()]
    assert net.norm2.momentum == momentum
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_data_that_never_arrive_measure_nothing() -> None:
    net = small_net()
    net.add_module("elsewhere", nn.BatchNorm2d(8))
    with pytest.raises(InvalidInput, match="never reached 'elsewhere'"):
        measure_inputs(net, [net.get_submodule("elsewhere")], batches())


def test_an_error_of_the_data_themselves_is_the_caller_s() -> None:
    def broken() -> Iterator[Tensor]:
        yield batch()
        raise OSError("the disk is gone")

    net = mixed_modes()
    modes = [module.training for module in net.modules()]
    with pytest.raises(OSError, match="the disk is gone"):
        calibrate_norms(net, [net.norm2], broken())
    assert modes == [module.training for module in net.modules()]


def test_eval_mode_ends_with_the_block() -> None:
    net = mixed_modes()
    modes = [module.training for module in net.modules()]
    with in_eval_mode(net):
        assert not any(module.training for module in net.modules())
        run(net, [batch()])
    assert modes == [module.training for module in net.modules()]
    assert randomize_batch_norm(net) is net


# ---- measure_sums


def test_a_sum_is_measured_as_batch_norms_in_training_mode_give_it() -> None:
    model: Any = repfx.expand(SmallNet(), {"stem": ["1x1", "1xk"]}).double()
    randomize_batch_norm(model)
    block = model.stem
    chosen = {block.origin: 1.0, block.branches["1xk"]: -0.5}
    state = copy.deepcopy(model.state_dict())
    (found,) = measure_sums(model, [PartialSum(block, chosen)], batches())
    assert same_state(model.state_dict(), state)
    assert all(module.training for module in model.modules())
    outputs = []
    for x in batches():
        copied = copy.deepcopy(block).train()
        outputs.append(copied.origin(x) - 0.5 * copied.branches["1xk"](x))
    mean = torch.stack([output.mean((0, 2, 3)) for output in outputs]).mean(0)
    variance = torch.stack([output.var((0, 2, 3), correction=0) for output in outputs]).mean(0)
    assert torch.allclose(found.mean, mean)
    assert torch.allclose(found.variance, variance)


def test_a_block_can_give_out_a_part_while_it_is_listened_to() -> None:
    model: Any = repfx.expand(SmallNet(), {"stem": ["1x1"], "depthwise": ["1x1"]}).double()
    randomize_batch_norm(model)
    plain: Any = copy.deepcopy(model)
    plain.stem = plain.stem.origin
    x = batches()
    alone = [PartialSum(net.depthwise, {net.depthwise.origin: 1.0}) for net in (model, plain)]
    first = PartialSum(model.stem, {model.stem.origin: 1.0}, instead=model.stem.origin)
    (_, found), (expected,) = measure_sums(model, [first, alone[0]], x), measure_sums(plain, [alone[1]], x)
    assert torch.allclose(found.mean, expected.mean)
    assert torch.allclose(found.variance, expected.variance)


def test_a_sum_over_nothing_counts_for_nothing() -> None:
    """A mask head runs on the boxes that were found, of which there may be none."""
    model: Any = repfx.expand(SmallNet(), {"stem": ["1x1"]}).double()
    block, x = model.stem, batches()[1]
    with_nothing, found, nothing = ([x[:0], x], [x], [x[:0]])
    both = [measure_sums(model, [PartialSum(block, {block.origin: 1.0})], data)[0] for data in (with_nothing, found)]
    assert torch.equal(both[0].mean, both[1].mean)
    assert torch.equal(both[0].variance, both[1].variance)
    with pytest.raises(InvalidInput, match="never reached 'stem'"):
        measure_sums(model, [PartialSum(block, {block.origin: 1.0})], nothing)


def test_a_block_that_is_never_reached_is_not_measured() -> None:
    model: Any = repfx.expand(SmallNet(), {"stem": ["1x1"]}).double()
    model.add_module("elsewhere", repfx.expand(SmallNet(), {"stem": ["1x1"]}).double())
    block = model.elsewhere.stem
    with pytest.raises(InvalidInput, match=r"never reached 'elsewhere\.stem'"):
        measure_sums(model, [PartialSum(block, {block.origin: 1.0})], batches())
    assert not block._forward_hooks
