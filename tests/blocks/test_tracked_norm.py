"""Blocks whose branches are divided by tracked deviations: one linear map at once, in both modes, and in every verb."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.func import functional_call, vmap

import repfx
from repfx.algebra.conv_spec import ConvSpec
from repfx.algebra.layers import is_batch_norm, is_conv_or_linear
from repfx.blocks.block import RepBlock
from repfx.blocks.branch import Branch, kind_of
from repfx.blocks.presets import PRESETS
from repfx.blocks.scales import gammas_of
from repfx.blocks.spec import BranchSpec
from repfx.blocks.stages import Norm, TrackedNorm
from repfx.blocks.windows.autocorrelation import Autocorrelation, refusal_of_windows
from repfx.blocks.windows.covariance import WindowCovariance
from repfx.errors import InvalidInput, Refused
from repfx.passes.fuse import Fuse
from repfx.passes.gate import gate
from repfx.passes.recompute import recompute
from repfx.records.journal import apply
from repfx.testing import assert_same_map, randomize_batch_norm, relative_error
from tests.blocks.test_branches import FITTING, SITES, SIZES, example, label
from tests.passes.test_squeeze import X, assert_alike, convs_on_activations, net
from tests.random_numbers import numbers_from
from tests.small_net import SmallNet, batch, small_net
from tests.two_ranks import run_on_two_ranks

pytestmark = pytest.mark.usefixtures("as_on_a_gpu")

TRACKED = [(branch, name) for branch, name in FITTING if refusal_of_windows(SIZES[name]) is None]
DBB = repfx.Spec(["1x1", "1x1-kxk", "1x1-avg"], norm="tracked")
SPEC = repfx.Spec(["1x1", "1x1-kxk", "1x1-avg", "1xk", "identity"], norm="tracked")


@torch.no_grad()
def shaken(model: Any) -> Any:
    """Give the norms of a model random statistics and factors of both signs, and its convs further weights."""
    numbers = numbers_from(3)
    for module in randomize_batch_norm(model).modules():
        for name in ("weight", "bias") if is_conv_or_linear(module) or isinstance(module, TrackedNorm) else ():
            tensor = getattr(module, name, None)
            if tensor is not None and tensor.requires_grad:
                tensor.add_(0.3 * torch.randn(tensor.shape, dtype=tensor.dtype, generator=numbers))
        if isinstance(module, TrackedNorm):
            module.weight[::2] *= -1
    return model


def tracked(spec: Any = DBB, model: nn.Module | None = None, *, train: bool = True) -> Any:
    """A model in float64 whose blocks have seen a batch."""
    found = shaken(repfx.expand((model or net()).double(), spec, preserve=False))
    if train:
        found.train()(X)
    return found


def watch_everything(model: nn.Module) -> None:
    """Let each covariance be that of the last batch alone."""
    for module in model.modules():
        if isinstance(module, WindowCovariance):
            module.every, module.momentum, module.share, module.fewest = 1, 1.0, 1.0, 1 << 40


@torch.no_grad()
def path_of(branch: BranchSpec, name: str) -> tuple[Branch, Tensor]:
    """A branch whose covariance is exactly that of an input, and the input."""
    conv, x = SITES[name]().double(), example(name)
    block: Any = repfx.expand(nn.Sequential(conv), repfx.Spec([branch], norm="tracked", layers="both"), preserve=False)[
        0
    ]
    watch_everything(shaken(block))
    block.train()(x)
    return next(iter(block.branches.values())), x


@pytest.mark.one_in(10)
@pytest.mark.parametrize(("branch", "name"), TRACKED, ids=label)
def test_a_branch_is_one_map_and_its_output_has_the_deviation_that_its_factor_says(
    branch: BranchSpec, name: str
) -> None:
    path, x = path_of(branch, name)
    kernel = path.equivalent_kernel(x)
    assert_same_map(kernel, path, x)
    norm: Any = path[-1]
    if not isinstance(norm, TrackedNorm):  # LoRA begins at zero, and nothing normalises it
        assert branch.kind == "lora"
        return
    y, linear = path(x), SIZES[name].is_linear
    variance = (y.flatten(0, -2).T if linear else y.transpose(0, 1).flatten(1)).var(1, correction=0)
    before = norm.windows.variance_of_mean if branch.kind == "1x1-avg" else norm.windows.variance
    inner = before(norm.kernels_before(x)[0]) if branch.kind == "1x1-avg" else before(_composed(norm, x))
    share = inner / (inner + norm.windows.eps)
    expected = (norm.weight * norm.windows.unit).square() * share
    torch.testing.assert_close(variance, expected, rtol=1e-9, atol=1e-12)


def _composed(norm: TrackedNorm, x: Tensor) -> Any:
    kernels = norm.kernels_before(x)
    total = kernels[0]
    for kernel in kernels[1:]:
        total = total.compose(kernel)
    return total


@pytest.mark.one_in(2)
@pytest.mark.parametrize("spec", [DBB, SPEC], ids=["dbb", "others"])
def test_it_is_squeezed_from_the_first_step(spec: Any) -> None:
    """Outputs, gradients and state are those of the branches run one by one, step after step, and in eval mode."""
    model = tracked(spec, train=False).train()
    reference = copy.deepcopy(model)
    assert repfx.report(repfx.squeeze(model, example=X)).skipped == ()
    for _ in range(6):  # with two measurements
        assert_alike(model, reference)
    assert convs_on_activations(model) == 3 < convs_on_activations(reference)
    state = reference.state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=1e-10, atol=1e-12)
    assert_alike(model.eval(), reference.eval())
    assert model[0].windows.steps == 7


def test_squeezed_with_many_channels() -> None:
    """Windows of many channels have an autocorrelation."""
    model = nn.Sequential(nn.Conv2d(3, 80, 1), nn.ReLU(), nn.Conv2d(80, 6, 3, 2, 1), nn.BatchNorm2d(6))
    found = tracked({"2": SPEC}, model)
    assert isinstance(found[2].windows, Autocorrelation)
    assert_alike(repfx.squeeze(copy.deepcopy(found)), found)


def test_statistics_that_are_held_are_tracked_no_more() -> None:
    model = repfx.squeeze(tracked(), statistics="frozen").train()
    before = copy.deepcopy(model.state_dict())
    expected = model.eval()(X)
    assert relative_error(model.train()(X), expected) < 1e-12
    assert all(torch.equal(now, before[name]) for name, now in model.state_dict().items())
    repfx.unsqueeze(model)(X)
    assert not torch.equal(model.state_dict()["0.windows.passes"], before["0.windows.passes"])


def test_a_block_in_a_larger_region_still_sees_its_input() -> None:
    """In training mode the block runs by itself; in eval mode it merges with the conv in front of it."""
    convs = [nn.Conv2d(3, 6, 1, bias=False), nn.Conv2d(6, 6, 3, padding=1, bias=False)]
    model = nn.Sequential(*convs, nn.BatchNorm2d(6))
    model = tracked({"1": DBB}, model)
    reference = copy.deepcopy(model)
    repfx.squeeze(model)
    for training in (True, False):
        assert_alike(model.train(training), reference.train(training))
    assert model[1].windows.steps == reference[1].windows.steps == 2
    assert convs_on_activations(model.eval()) == 1


@pytest.mark.one_in(2)
@pytest.mark.parametrize("spec", [DBB, SPEC], ids=["dbb", "others"])
def test_expanding_preserves_the_function_in_both_modes(spec: Any) -> None:
    """The first measurement changes nothing either. One site has no BatchNorm behind it."""
    model = randomize_batch_norm(net().double())
    expanded: Any = repfx.expand(model, spec, example=X)
    assert {path: type(expanded[path]) for path in (1, 4)} == {1: nn.BatchNorm2d, 4: nn.BatchNorm2d}
    for training in (True, False):
        expected = copy.deepcopy(model).train(training)(X)
        assert relative_error(copy.deepcopy(expanded).train(training)(X), expected) < 1e-12
    expanded.train()(X)
    model.train()(X)
    assert relative_error(expanded.eval()(X), model.eval()(X)) < 1e-12
    assert gammas_of(expanded[0]) == {"origin": pytest.approx(1.0), **dict.fromkeys(expanded[0].branches, 0.0)}


def test_branches_that_add_nothing_at_first_are_trained() -> None:
    expanded: Any = repfx.expand(net().double(), DBB).train()
    optimizer = torch.optim.SGD(expanded.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        expanded(X).square().sum().backward()
        optimizer.step()
    assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in expanded[0].parameters())


@pytest.mark.one_in(2)
@pytest.mark.parametrize("spec", [DBB, SPEC], ids=["dbb", "others"])
def test_fusing_is_exact(spec: Any) -> None:
    model = tracked(spec).eval()
    fused = repfx.fuse(model, example=X)
    assert repfx.report(fused).skipped == ()
    assert [type(each) for each in fused.modules() if is_batch_norm(each) or isinstance(each, RepBlock)] == []
    torch.testing.assert_close(fused(X), model(X), rtol=1e-10, atol=1e-12)


def test_fusing_one_site_and_restoring_its_batch_norm() -> None:
    model = tracked().eval()
    expected = model(X)
    apply(model, [Fuse("0")], None)
    assert type(model[0]) is nn.Conv2d
    torch.testing.assert_close(model(X), expected, rtol=1e-10, atol=1e-12)
    restored = repfx.restore(repfx.fuse(model))
    assert sum(map(is_batch_norm, restored.modules())) == 2
    torch.testing.assert_close(restored.eval()(X), expected, rtol=1e-10, atol=1e-12)


def test_its_own_fusing_is_exact() -> None:
    model = tracked().eval()
    expected = model(X)
    model[0].reparameterize()
    assert sum(1 for _ in model[0].modules()) == 3
    torch.testing.assert_close(model(X), expected, rtol=1e-10, atol=1e-12)


def test_dropping_branches_one_by_one() -> None:
    """The factor of the origin takes up the new deviation, and keeps its sign."""
    model = tracked().eval()
    expected, signs = model(X), model[0].tracked.weight.sign()
    weight, gamma = model[0].conv.weight, model[0].tracked.weight
    for branch in list(model[0].branches)[:-1]:
        repfx.drop(model, "0", branch)
        torch.testing.assert_close(model(X), expected, rtol=1e-10, atol=1e-12)
        assert torch.equal(model[0].tracked.weight.sign(), signs)
        assert model[0].conv.weight is weight
        assert model[0].tracked.weight is gamma
    repfx.drop(model, "0", next(iter(model[0].branches)))
    assert type(model[0]) is nn.Conv2d
    torch.testing.assert_close(model(X), expected, rtol=1e-10, atol=1e-12)


def test_a_checkpoint_resumes_bit_for_bit(tmp_path: Path) -> None:
    """The covariances and the count of steps are part of the state."""
    model: Any = repfx.expand(small_net(), DBB, preserve=False).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)

    def train(net: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> None:
        for seed in seeds:
            optimizer.zero_grad()
            net(batch(seed=seed)).square().sum().backward()
            optimizer.step()

    train(model, optimizer, range(3))
    repfx.save(tmp_path / "run.safetensors", model, optimizer)
    train(model, optimizer, range(3, 9))
    other: Any = SmallNet().double()
    fresh = torch.optim.SGD(other.parameters(), 0.05, momentum=0.9)
    other = repfx.load(tmp_path / "run.safetensors", other, fresh)
    train(other.train(), fresh, range(3, 9))
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_copies_have_covariances_of_their_own() -> None:
    model = tracked()
    copied = copy.deepcopy(model)
    copied(X)
    assert copied[0].windows.steps == 2
    assert model[0].windows.steps == 1
    assert copied[0].tracked.windows is copied[0].windows


@pytest.mark.parametrize("squeezed", [False, True])
def test_a_block_that_recomputes_measures_once(squeezed: bool) -> None:
    model = tracked(train=False).train()
    reference = copy.deepcopy(model)
    recompute(repfx.squeeze(model) if squeezed else model)
    for _ in range(5):
        assert_alike(model, reference)
    assert all(torch.allclose(a, b) for a, b in zip(model.state_dict().values(), reference.state_dict().values()))


@pytest.mark.parametrize("squeezed", [False, True])
def test_two_passes_before_one_backward_pass(squeezed: bool) -> None:
    model = tracked()
    watch_everything(model)
    if squeezed:
        repfx.squeeze(model)
    (model(X) + model(X * 2)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("squeezed", [False, True])
def test_autocast_leaves_deviations_in_float32(dtype: torch.dtype, squeezed: bool) -> None:
    model = repfx.expand(net(), DBB, preserve=False)
    x = X.float() * 300  # its square isn't a number of float16
    if squeezed:
        repfx.squeeze(model)
    exact = copy.deepcopy(model)(x)
    with torch.autocast("cpu", dtype):
        found = model(x)
    found.float().sum().backward()
    assert model.get_submodule("0.windows").covariance.dtype == torch.float32
    assert all(bool(torch.isfinite(parameter.grad).all()) for parameter in model.parameters())
    assert relative_error(found.float(), exact) < 0.05


def test_a_model_in_half_precision() -> None:
    model: Any = repfx.expand(net(), DBB, preserve=False).bfloat16()
    assert model[0].windows.covariance.dtype == torch.float32
    assert model[0].tracked.weight.dtype == torch.bfloat16
    y = model(X.bfloat16())
    assert y.dtype == torch.bfloat16
    assert repfx.squeeze(model)(X.bfloat16()).dtype == torch.bfloat16


def test_gates_multiply_what_the_norms_output() -> None:
    model = tracked()
    gate(model, "0", "sigmoid")
    assert_alike(repfx.squeeze(copy.deepcopy(model)), model)


@pytest.mark.slow
def test_a_branch_inside_a_branch() -> None:
    model = tracked()
    repfx.expand(model, {"0.1x1-kxk.conv2": repfx.Spec(["1x1"], norm="tracked")}, example=X, inplace=True)
    shaken(model)
    assert isinstance(model[0].get_submodule("1x1-kxk.conv2"), RepBlock)
    assert_alike(repfx.squeeze(copy.deepcopy(model)), model)
    torch.testing.assert_close(repfx.fuse(model.eval())(X), model(X), rtol=1e-10, atol=1e-12)


def test_linear_layers_are_tracked() -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 4)).double()
    x = torch.randn(3, 6, 5, dtype=torch.float64, generator=numbers_from(1))
    spec = repfx.Spec(["1x1-kxk", "kxk"], norm="tracked", layers="linear")
    repfx.expand(model, spec, example=x)
    block: Any = shaken(repfx.expand(model, spec, preserve=False)).train()
    y = block(x)
    torch.testing.assert_close(repfx.squeeze(copy.deepcopy(block))(x), y, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(repfx.fuse(block.eval())(x), block(x), rtol=1e-10, atol=1e-12)


def test_transforms_of_functions_read_the_covariance_and_measure_nothing() -> None:
    model = repfx.squeeze(tracked())
    parameters, before = dict(model.named_parameters()), model[0].windows.steps
    model[1].eval()
    model[4].eval()
    found = vmap(lambda x: functional_call(model, parameters, (x[None],))[0])(X)
    torch.testing.assert_close(found, model(X), rtol=1e-10, atol=1e-12)
    assert model[0].windows.steps == before + 1


SCHEDULES = [
    repfx.schedules.Fixed(DBB, squeeze_from=0),
    repfx.schedules.RepAn(spec=SPEC, cycles=2, epochs=3, warm_up=1),
]


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.name)
def test_schedules_take_them(schedule: repfx.Schedule) -> None:
    model, x = net(), X.float()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    driver = repfx.Driver(model, optimizer, schedule, calibrate=[x])
    for _ in range(5):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        driver.after_backward()
        optimizer.step()
        driver.after_epoch()
    seen = [module for module in model.modules() if isinstance(module, WindowCovariance)]
    assert len(seen) == 3
    assert all(module.steps for module in seen)
    torch.testing.assert_close(repfx.fuse(model.eval())(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_compiled_block_measures_outside_its_graph() -> None:
    model = repfx.squeeze(tracked())
    reference, counter = copy.deepcopy(model), cast(Any, CompileCounter)()
    compiled: Any = torch.compile(model, backend=counter)
    frames = []
    for _ in range(6):
        torch.testing.assert_close(compiled(X), reference(X), rtol=1e-10, atol=1e-12)
        frames.append(counter.frame_count)
    assert frames[0] == frames[-1]


@pytest.mark.slow
def test_exporting_before_fusing() -> None:
    model = tracked().eval()
    exported = torch.export.export(model, (X,)).module()
    torch.testing.assert_close(exported(X), model(X), rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_every_preset_can_be_tracked() -> None:
    """A norm is one word of a spec, whatever its branches are."""
    for name, preset in PRESETS.items():
        if callable(preset.spec.branches) or preset.spec.norm != "batch_norm":
            continue
        model = tracked(repfx.Spec(preset.spec.branches, norm="tracked"))
        assert repfx.report(repfx.squeeze(copy.deepcopy(model))).skipped == (), name


def test_weights_without_numbers_and_inference_tensors() -> None:
    with torch.device("meta"):
        empty = net()
    expanded: Any = repfx.expand(empty, DBB)
    expanded.load_state_dict(expanded.state_dict())
    given = tracked()
    expanded.load_state_dict(given.state_dict(), assign=True)
    assert_alike(expanded.eval(), given.eval())
    with torch.inference_mode():
        inside: Any = repfx.squeeze(tracked().eval())
        expected = inside(X)
    assert_same_map(copy.deepcopy(inside), lambda _: expected, X)


def test_sites_that_cannot_be_tracked_are_left_alone() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    spec = repfx.Spec(["kxk"], norm="tracked")
    expanded = repfx.expand(model, spec)
    assert [(skip.path, "transposed conv" in skip.reason) for skip in repfx.report(expanded).skipped] == [("0", True)]
    with pytest.raises(Refused, match="transposed conv"):
        repfx.expand(model, spec, strict=True)


def test_what_tracked_norms_do_not_take() -> None:
    model = repfx.expand(net(), DBB)
    with pytest.raises(InvalidInput, match="the first measurement would change what they add"):
        repfx.expand(net(), DBB, gamma=0.01, calibrate=[X.float()])
    with pytest.raises(InvalidInput, match="DyRep gives branches a first γ"):
        repfx.schedules.DyRep(spec=SPEC)
    with pytest.raises(InvalidInput, match="use DistributedDataParallel"):
        model.get_submodule("0.origin.norm")._replicate_for_data_parallel()
    with pytest.raises(InvalidInput, match="needs the covariance"):
        kind_of(BranchSpec("1x1"))(ConvSpec.of(nn.Conv2d(4, 4, 3)), Norm("tracked"), torch.empty(0))


@pytest.mark.slow
def test_two_processes_share_their_covariances() -> None:
    assert run_on_two_ranks("track_on_two_ranks").count("one covariance") == 2
