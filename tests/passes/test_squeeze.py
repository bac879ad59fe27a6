"""Squeezed blocks: one conv, assembled in forward, with the same outputs, gradients and state; what isn't linear runs as before."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import repfx
from repfx.blocks.block import RepBlock
from repfx.blocks.presets import PRESETS
from repfx.blocks.windows.covariance import WindowCovariance
from repfx.passes.gate import gate
from repfx.passes.squeeze import Squeeze
from repfx.testing import randomize_batch_norm, relative_error
from tests.random_numbers import numbers_from

pytestmark = pytest.mark.usefixtures("as_on_a_gpu")


def net(channels: int = 6) -> Any:
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 5, padding=2, groups=channels),
    )


X = torch.randn(2, 3, 11, 14, dtype=torch.float64, generator=numbers_from(5))


def expanded(spec: Any = "dyrep", model: nn.Module | None = None) -> Any:
    """An expanded model in float64, with random statistics, scales and weights instead of the initial ones."""
    found = repfx.expand(model or net(), spec, preserve=False).double()
    randomize_batch_norm(found)
    for path, module in found.named_modules():
        if path.endswith(".scale"):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return found


def outputs_and_gradients(model: nn.Module, x: Tensor = X) -> dict[str, Tensor]:
    """Return the output of one step, and by name the gradients of the parameters and of `x`."""
    x = x.clone().requires_grad_()
    parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
    y = model(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
    gradients = torch.autograd.grad((y * weights).sum(), [x, *parameters.values()], allow_unused=True)
    named = {name: each for name, each in zip(["input", *parameters], gradients) if each is not None}
    return {"output": y.detach(), **named}


def assert_alike(model: nn.Module, reference: nn.Module) -> None:
    found, expected = outputs_and_gradients(model), outputs_and_gradients(reference)
    assert found.keys() == expected.keys()
    worst = {name: (found[name] - expected[name]).abs().max() for name in expected}
    assert all(bool(w <= 1e-10 * (1 + expected[name].abs().max())) for name, w in worst.items()), worst


class _Convs(TorchDispatchMode):
    """Counts convs on activations: their input has a batch of two, which no kernel here has."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "convolution" in str(function) and args[0].shape[0] == len(X):
            self.count += 1
        return function(*args, **(kwargs or {}))


def convs_on_activations(model: nn.Module) -> int:
    convs = _Convs()
    with convs:
        model(X)
    return convs.count


SPECS = [*PRESETS, "all"]


def spec_of(name: str) -> Any:
    if name == "all":
        kinds = ["1x1", "1xk", "kx1", "kxk", "1x1-kxk", "1x1-avg", "identity", "separable", "frequency-prior"]
        return repfx.Spec(kinds, norm="scale")
    return name


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("spec", SPECS)
def test_a_squeezed_model_has_the_outputs_and_gradients_of_frozen_statistics(spec: str, training: bool) -> None:
    model = expanded(spec_of(spec))
    squeezed = repfx.squeeze(copy.deepcopy(model), statistics="frozen").train(training)
    for module in model.train(training).modules():
        if isinstance(module, (nn.BatchNorm2d, WindowCovariance)):
            module.eval()
    assert_alike(squeezed, model)
    assert convs_on_activations(squeezed) == 3
    assert convs_on_activations(model) > 3


def test_branches_without_batch_norm_are_squeezed_in_training_mode() -> None:
    """Blocks without BatchNorms in their branches are squeezed, and the BatchNorm after the sum still updates its statistics."""
    model = expanded("orepa").train()
    reference = copy.deepcopy(model)
    assert repfx.report(repfx.squeeze(model)).skipped == ()
    assert_alike(model, reference)
    assert all(torch.allclose(a, b) for a, b in zip(model.state_dict().values(), reference.state_dict().values()))
    assert convs_on_activations(model) == 3


@pytest.mark.parametrize("spec", ["dyrep", repfx.Spec(["1x1"], norm="none")])
def test_statistics_that_are_held_stay(spec: Any) -> None:
    """Frozen statistics don't change, also those of a BatchNorm behind a block."""
    model = repfx.squeeze(expanded(spec), statistics="frozen").train()
    before = copy.deepcopy(model.state_dict())
    model(X)
    assert all(torch.equal(now, before[name]) for name, now in model.state_dict().items())


def test_a_schedule_holds_the_statistics_inside_blocks_alone() -> None:
    model = expanded(repfx.Spec(["1x1"], norm="none")).train()
    Squeeze.apply(model, [Squeeze("0")], None)
    before = model[1].running_mean.clone()
    model(X)
    assert not torch.equal(model[1].running_mean, before)


def test_parameters_and_state_are_the_same_objects() -> None:
    model = expanded()
    parameters = dict(model.named_parameters())
    keys = list(model.state_dict())
    assert repfx.squeeze(model, statistics="frozen") is model
    assert all(parameters[name] is each for name, each in model.named_parameters())
    assert list(model.state_dict()) == keys


def test_blocks_that_take_statistics_are_left_alone_in_training_mode_with_the_reason() -> None:
    model = expanded().train()
    reference = copy.deepcopy(model)
    skipped = repfx.report(repfx.squeeze(model)).skipped
    assert [(skip.path, skip.rule) for skip in skipped] == [(path, "squeeze") for path in ("0", "3", "6")]
    assert "'origin.norm' takes its statistics from the batch" in skipped[0].reason
    assert_alike(model, reference)
    assert repfx.report(repfx.squeeze(model.eval())).skipped == ()
    assert convs_on_activations(model) == 3
    assert_alike(model, reference.eval())


def test_a_squeezed_block_that_is_no_longer_linear_runs_branch_by_branch() -> None:
    model = expanded().eval()
    reference = copy.deepcopy(model)
    repfx.squeeze(model).train()
    assert_alike(model, reference.train())
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), reference.state_dict().values()))


def test_unsqueeze_is_the_way_back() -> None:
    model = expanded().train()
    reference = copy.deepcopy(model)
    repfx.unsqueeze(repfx.squeeze(model, statistics="frozen"))
    assert [m.training for m in model.modules()] == [m.training for m in reference.modules()]
    assert_alike(model, reference)
    assert [action.kind for action in repfx.journal(model)] == [
        kind for kind in ("expand", "squeeze", "unsqueeze") for _ in range(3)
    ]


def test_norms_that_a_user_put_into_eval_mode_stay_there() -> None:
    model = expanded().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    reference = copy.deepcopy(model)
    repfx.squeeze(model)
    assert repfx.report(model).skipped == ()
    assert_alike(model, reference)
    repfx.unsqueeze(model)
    assert not any(module.training for module in model.modules() if isinstance(module, nn.BatchNorm2d))


def test_some_sites_by_a_pattern() -> None:
    model = repfx.squeeze(expanded().eval(), "[03]")
    assert [model[site].squeezed for site in (0, 3, 6)] == [True, True, False]


@pytest.mark.parametrize("style", ["straight_through", "sigmoid"])
def test_gates_get_their_gradients_and_closed_paths_stay_out(style: str) -> None:
    model = expanded(["1xk", "kx1", "1x1"])
    gate(model, "3", style)
    model[3].gates.choose(["1x1", "kx1"], modes=[True])
    model[3].gates.choose(["1xk"], modes=[False])
    for gate_ in model[3].gates.of.values():
        nn.init.constant_(gate_.alpha, 0.4)
    model.double()
    for training in (True, False):
        squeezed = repfx.squeeze(copy.deepcopy(model), statistics="frozen").train(training)
        for module in model.train(training).modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        assert_alike(squeezed, model)


def test_a_rate_that_attaches_the_branches_is_part_of_the_kernel() -> None:
    model = repfx.expand(net(), "acb", attach_rate=0.0).double()
    randomize_batch_norm(model)
    for block in (model[0], model[3], model[6]):
        block.attach_rate.fill_(0.3)
    assert_alike(repfx.squeeze(copy.deepcopy(model), statistics="frozen"), model.eval())


def test_blocks_in_blocks_and_an_origin_that_rests() -> None:
    model = expanded(repfx.Spec(["1x1", "1xk"], origin=False))
    model = repfx.expand(model, {"3.1xk.conv": "acb"}, preserve=False).double()
    randomize_batch_norm(model)
    assert_alike(repfx.squeeze(copy.deepcopy(model), statistics="frozen"), model.eval())


def test_a_hook_inside_hears_what_it_always_heard() -> None:
    model = repfx.squeeze(expanded().eval())
    heard: list[Tensor] = []
    handle = model[3].branches["1x1"].register_forward_hook(lambda module, inputs, output: heard.append(output))
    model(X)
    expected = model[:3](X)
    for stage in model[3].branches["1x1"]:
        expected = stage(expected)
    assert relative_error(heard[0], expected) < 1e-12
    handle.remove()
    model(X)
    assert len(heard) == 1


@pytest.mark.slow
@pytest.mark.parametrize("change", [repfx.fuse, lambda m: repfx.drop(m, "3", "1x1")])
def test_other_verbs_find_a_squeezed_model_as_it_was(change: Callable[[nn.Module], nn.Module]) -> None:
    model = expanded().eval()
    squeezed = repfx.squeeze(copy.deepcopy(model), statistics="frozen")
    found, expected = change(squeezed), change(model)
    assert relative_error(found(X), expected(X)) < 1e-12
    assert found.state_dict().keys() == expected.state_dict().keys()


@pytest.mark.slow
def test_training_goes_on_as_with_frozen_statistics(tmp_path: Path) -> None:
    """Training goes on with the optimizer's momentum kept; a checkpoint records what is squeezed."""
    model = expanded()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    reference = copy.deepcopy(model)
    other = torch.optim.SGD(reference.parameters(), 0.01, momentum=0.9)
    repfx.squeeze(model, statistics="frozen")

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, *, frozen: bool) -> None:
        model.train()
        for module in model.modules() if frozen else ():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        for _ in range(2):
            optimizer.zero_grad()
            model(X).square().mean().backward()
            optimizer.step()

    train(model, optimizer, frozen=False)
    train(reference, other, frozen=True)
    for name, value in reference.state_dict().items():
        assert torch.allclose(model.state_dict()[name], value, rtol=1e-9, atol=1e-12), name

    repfx.save(tmp_path / "run.ckpt", model, optimizer)
    again = net().double()
    steps = torch.optim.SGD(again.parameters(), 0.01, momentum=0.9)
    repfx.load(tmp_path / "run.ckpt", again, steps)
    assert [block.squeezed and block.holds_statistics for block in (again[0], again[3], again[6])] == [True] * 3
    train(model, optimizer, frozen=False)
    train(again, steps, frozen=False)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values()))


@pytest.mark.parametrize("dimensions", [1, 3])
def test_other_dimensions(dimensions: int) -> None:
    conv: Any = {1: nn.Conv1d, 3: nn.Conv3d}[dimensions]
    norm: Any = {1: nn.BatchNorm1d, 3: nn.BatchNorm3d}[dimensions]
    model = expanded("dyrep", nn.Sequential(conv(4, 6, 3, padding=1, groups=2, padding_mode="circular"), norm(6)))
    x = torch.randn(2, 4, *(5, 6, 7)[:dimensions], dtype=torch.float64)
    squeezed = repfx.squeeze(copy.deepcopy(model), statistics="frozen")
    assert relative_error(squeezed(x), model.eval()(x)) < 1e-12


@pytest.mark.slow
def test_mixed_precision_assembles_in_full() -> None:
    model = expanded().float().eval()
    squeezed = repfx.squeeze(copy.deepcopy(model))
    with torch.autocast(X.device.type, dtype=torch.bfloat16):
        found = squeezed(X.float())
        fused = repfx.fuse(model)(X.float())
    assert found.dtype == torch.bfloat16
    assert relative_error(found.float(), fused.float()) < 1e-2


BREAKS = torch.__version__ < "2.9"  # torch 2.8 breaks the graph at a check of a part's class


@pytest.mark.skipif(BREAKS, reason="torch 2.8 breaks the graph")
@pytest.mark.parametrize(
    ("spec", "training"),
    [
        ("dilated", True),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [("dyrep", True), ("orepa", True), ("orepa", False)]),
    ],
)
def test_it_compiles_without_a_break(spec: str, training: bool) -> None:
    model = repfx.squeeze(expanded(spec), statistics="frozen").train(training)
    gate(model, "6", "sigmoid") if spec == "dilated" else gate(model, "3", "sigmoid")
    expected = outputs_and_gradients(copy.deepcopy(model))
    torch.compiler.reset()
    found = outputs_and_gradients(torch.compile(model, fullgraph=True, backend="aot_eager"))  # type: ignore[arg-type]
    assert [name.removeprefix("_orig_mod.") for name in found] == list(expected)
    for ours, theirs in zip(found.values(), expected.values()):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.slow
def test_what_has_no_kernel_is_left_alone_with_the_reason() -> None:
    model = expanded().eval()
    model[3].branches["1x1"].conv.register_forward_hook(lambda *_: None)
    (skip,) = repfx.report(repfx.squeeze(model)).skipped
    assert (skip.path, "Conv2d has hooks" in skip.reason) == ("3", True)
    assert not model[3].squeezed


@pytest.mark.slow
def test_a_part_that_is_exchanged_later_runs_as_it_is() -> None:
    class Doubled(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    for compiled in (False, True)[: 1 if BREAKS else 2]:
        model = repfx.squeeze(expanded("acb", nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).eval())
        reference = repfx.unsqueeze(copy.deepcopy(model))
        for each in (model, reference):
            each[0].branches["1xk"].conv.__class__ = Doubled
        torch.compiler.reset()
        run: Any = torch.compile(model, fullgraph=True, backend="eager") if compiled else model
        assert relative_error(run(X), reference(X)) < 1e-12


def test_on_the_meta_device_it_runs_too() -> None:
    assert repfx.squeeze(expanded("orepa")).to("meta")(X.to("meta")).shape == (2, 6, 6, 7)


def test_a_squeezed_block_says_so() -> None:
    assert repfx.squeeze(expanded(), statistics="frozen")[0].extra_repr() == "squeezed, statistics held"


def test_what_is_dropped_from_a_block_that_holds_statistics_trains_again() -> None:
    model = repfx.squeeze(expanded("acb").train(), statistics="frozen")
    for branch in ("1xk", "kx1"):
        repfx.drop(model, "3", branch)
    assert model[4].training


class Measured(nn.Module):
    """A module whose code can't be traced and uses names that blocks have, such as `train` and `scale`."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.second = nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).train if not len(x) else self.first(x)
        scale = torch.stack([float(y.detach().mean()) * y]).squeeze(0)
        found: Tensor = self.second(scale / max(1.0, float(scale.detach().norm())))
        return found.take(torch.arange(found.numel())).reshape(found.shape)


def test_code_around_that_has_words_of_blocks_reads_nothing_of_them() -> None:
    model = repfx.expand(Measured(), "orepa", preserve=False).double().eval()
    fused = repfx.fuse(model)
    assert not any(isinstance(module, RepBlock) for module in fused.modules())
    assert relative_error(fused(X), model(X)) < 1e-12


def test_refusals() -> None:
    with pytest.raises(repfx.errors.InvalidInput, match=r"has no block, and no layers .* statistics='frozen' lets"):
        repfx.squeeze(net())
    with pytest.raises(repfx.errors.UnknownName, match="no block or conv at 'layer1"):
        repfx.squeeze(expanded(), "layer1.*")
    with pytest.raises(repfx.errors.UnknownName, match="statistics 'batch'"):
        repfx.squeeze(expanded(), statistics="batch")


@pytest.mark.parametrize("statistics", [None, "frozen"])
def test_a_model_whose_layers_have_no_size_yet_is_refused(statistics: str | None) -> None:
    model = nn.Sequential(nn.LazyConv2d(8, 3), nn.ReLU())
    options = {} if statistics is None else {"statistics": statistics}
    with pytest.raises(repfx.errors.InvalidInput, match=r"'0\.weight' has no size yet: run the model once"):
        repfx.squeeze(model, **options)
