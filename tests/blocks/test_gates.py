"""Gates: through every rewrite, closed paths don't run and open paths are part of the kernel."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import repfx
from repfx.blocks.block import ORIGIN, RepBlock
from repfx.blocks.cropped_conv import CroppedConv
from repfx.blocks.gates import GATES
from repfx.errors import InvalidInput, UnknownName
from repfx.passes.fuse import Fuse
from repfx.passes.gate import gate, ungate
from repfx.records.journal import replay
from repfx.testing import randomize_batch_norm

STYLES = sorted(GATES)


def plain_net() -> nn.Sequential:
    """Two convs with BatchNorms."""
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
    )


def net(spec: Any = "odbb") -> nn.Sequential:
    """Two blocks with random gates in float64."""
    torch.manual_seed(0)
    model = plain_net()
    expanded = repfx.expand(model, spec, preserve=False).double()
    randomize_batch_norm(expanded)
    assert isinstance(expanded, nn.Sequential)
    return expanded


def gated(style: str, spec: Any = "odbb", *, origin: bool = False) -> nn.Sequential:
    model = net(spec)
    for site in ("0", "3"):
        gate(model, site, style, origin=origin)
    for name, parameter in model.named_parameters():
        if name.endswith("alpha"):
            parameter.detach().normal_()
    return model


def block(model: nn.Module, site: str = "3") -> RepBlock:
    found = model.get_submodule(site)
    assert isinstance(found, RepBlock)
    return found


def choose(model: nn.Module, site: str, *names: str, modes: tuple[bool, ...] = (True, False)) -> None:
    gates = block(model, site).gates
    assert gates is not None
    gates.choose(names, modes)


def layer(model: nn.Module, path: str) -> Any:
    """Return a submodule, typed as Any."""
    return model.get_submodule(path)


def images() -> Tensor:
    return torch.randn(3, 4, 7, 9, dtype=torch.float64)


def assert_close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def by_hand(branches: RepBlock, x: Tensor, names: tuple[str, ...]) -> Tensor:
    """A gated block's output computed from its formula: IRepNAS, eq. 6 and 7, or RepNAS with open gates of 1."""
    gates = branches.gates
    assert gates is not None
    total: Tensor = branches.origin(x)
    for name in names:
        alpha = torch.sigmoid(layer(gates, f"of.{name}").alpha) if gates.style == "sigmoid" else 1.0
        beta = torch.sigmoid(layer(gates, "block").alpha) if gates.style == "sigmoid" else 1.0
        total = total + beta * alpha * branches.branches[name](x)
    return total


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("training", [True, False])
def test_a_block_is_the_sum_of_its_open_paths(style: str, training: bool) -> None:
    model = gated(style).train(training)
    names = ("1x1", "kx1", "identity")
    choose(model, "3", *names)
    x = torch.randn(3, 8, 7, 9, dtype=torch.float64)
    assert_close(model[3](x), by_hand(copy.deepcopy(block(model)), x, names))


@pytest.mark.parametrize("style", STYLES)
def test_what_is_closed_does_not_run(style: str) -> None:
    model = gated(style)
    choose(model, "3", "1x1")
    ran = []
    for name, branch in block(model).branches.items():
        branch.register_forward_hook(lambda *_, name=name: ran.append(name))
    model(images()).sum().backward()
    assert ran == ["1x1"]
    assert all(parameter.grad is None for parameter in block(model).branches["1xk"].parameters())


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("names", [("1x1", "kx1"), (), ("1x1-kxk", "1x1-avg", "identity")])
def test_fuse_absorbs_gates(style: str, names: tuple[str, ...]) -> None:
    model = gated(style).eval()
    choose(model, "3", *names)
    x = images()
    fused = repfx.fuse(model)
    assert_close(fused(x), model(x))
    assert sum(isinstance(module, nn.Conv2d) for module in fused.modules()) == 2
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())


@pytest.mark.parametrize("rate", [None, 0.3])
def test_factors_of_a_whole_block_leave_nothing_behind(rate: float | None) -> None:
    """Only convs and ReLUs are left, although the 1×1 and the 1×1–average alone would merge to a conv with more weights than both."""
    kinds = ["1x1", "1x1-avg"]
    if rate is None:
        model = gated("sigmoid", kinds).eval()
    else:
        plain = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)).double()
        model = randomize_batch_norm(repfx.expand(plain, kinds, attach_rate=rate, preserve=False)).eval()  # type: ignore[assignment]
    x = images()
    fused = repfx.fuse(model)
    assert_close(fused(x), model(x))
    left = [module for module in fused.modules() if not list(module.children())]
    assert {type(module).__name__ for module in left} <= {"Conv2d", "ReLU"}
    assert sum(isinstance(module, nn.Conv2d) for module in left) == sum(
        isinstance(m, RepBlock) for m in model.modules()
    )


@pytest.mark.slow
def test_fuse_takes_what_is_open_in_eval_mode() -> None:
    model = gated("straight_through")
    choose(model, "3", "1x1", modes=(True,))
    choose(model, "3", "kx1", "identity", modes=(False,))
    x = images()
    expected = model.eval()(x)
    assert_close(repfx.fuse(model)(x), expected)
    assert_close(repfx.fuse(model.train()).eval()(x), expected)


def test_a_closed_origin_does_not_run_and_is_fused_away() -> None:
    model = gated("straight_through", origin=True).eval()
    choose(model, "3", "1x1", "identity")
    x = torch.randn(3, 8, 7, 9, dtype=torch.float64)
    branches = block(model).branches
    assert_close(model[3](x), branches["1x1"](x) + branches["identity"](x))
    assert_close(repfx.fuse(model)(images_ := images()), model(images_))


def test_straight_through_is_one_with_the_slope_of_a_sigmoid() -> None:
    model = gated("straight_through").eval()
    one = layer(block(model), "gate.of.1x1")
    one.alpha.detach().fill_(0.3)
    one.noise.fill_(-1.1)
    assert one.factor().item() == 1.0
    x = torch.randn(3, 8, 7, 9, dtype=torch.float64)
    model[3](x).sum().backward()
    slope = torch.sigmoid(torch.tensor(-0.8, dtype=torch.float64))
    assert one.alpha.grad is not None
    assert_close(one.alpha.grad, block(model).branches["1x1"](x).sum().detach() * slope * (1 - slope))


@pytest.mark.parametrize("style", STYLES)
def test_drop_absorbs_the_gate_of_an_open_branch(style: str) -> None:
    model = gated(style).eval()
    x = images()
    expected = model(x)
    choose(model, "3", "1x1", "1xk", "identity")
    expected = model(x)
    repfx.drop(model, "3", "1xk")
    assert_close(model(x), expected)
    repfx.drop(model, "3", "kx1")  # closed
    assert_close(model(x), expected)
    assert [action.to_dict()["closed"] for action in repfx.journal(model)[-2:]] == [False, True]
    for name in list(block(model).branches):
        repfx.drop(model, "3", name)
    assert isinstance(model[3], nn.Conv2d)
    assert_close(model(x), expected)


@pytest.mark.parametrize("style", STYLES)
def test_drop_measures_the_moments_of_gated_branches(style: str) -> None:
    model = gated(style)
    choose(model, "3", "1x1", "1xk")
    x = images()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 1.0
    before = model.train()(x)  # after this, running and batch statistics are equal but for n / (n - 1)
    repfx.drop(model, "3", "1xk", calibrate=[x])
    torch.testing.assert_close(model.train()(x), before, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("spec", ["odbb", repfx.Spec(["1x1", "1xk"], norm="scale"), repfx.Spec(["1x1"], norm="none")])
def test_ungate_keeps_the_function(style: str, spec: Any) -> None:
    model = gated(style, spec).eval()
    x = images()
    expected = model(x)
    ungate(model, "3")
    assert block(model).gates is None
    assert_close(model(x), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("style", "origin"), [("sigmoid", False), ("straight_through", False), ("straight_through", True)]
)
def test_the_action_fuse_and_restore_absorb_gates(style: str, origin: bool) -> None:
    model = gated(style, origin=origin).eval()
    choose(model, "3", *(["origin"] if origin else []), "1x1", "kx1")
    x = images()
    expected = model(x)
    restored = repfx.restore(repfx.fuse(model))
    assert_close(restored.eval()(x), expected)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in restored.modules()) == 2
    Fuse.apply(model, [Fuse("3")], None)
    assert isinstance(model[3], nn.Conv2d)
    assert_close(model(x), expected)


def test_ungate_lets_a_closed_origin_rest() -> None:
    model = gated("straight_through", origin=True).eval()
    choose(model, "3", "1x1", "identity")
    x = images()
    expected = model(x)
    for name in ("1x1-kxk", "1x1-avg", "1xk", "kx1"):
        repfx.drop(model, "3", name)
    ungate(model, "3")
    assert block(model).rests
    assert not any(parameter.requires_grad for parameter in block(model).origin.parameters())
    assert_close(model(x), expected)
    assert_close(repfx.fuse(model)(x), expected)
    repfx.drop(model, "3", "identity")  # what stays is active again
    assert not block(model).rests
    assert all(parameter.requires_grad for parameter in block(model).origin.parameters())
    assert_close(model(x), expected)
    repfx.drop(model, "3", "1x1")
    assert isinstance(model[3], nn.Conv2d)
    assert_close(model(x), expected)


def test_ungate_refuses() -> None:
    model = gated("sigmoid", "qarepvgg").eval()
    choose(model, "3", "1x1")
    with pytest.raises(InvalidInput, match="drop identity first"):
        ungate(model, "3")
    with pytest.raises(InvalidInput, match="has no gates"):
        ungate(net(), "3")


def test_a_branch_without_any_number_gets_a_scale(tmp_path: Any) -> None:
    model = gated("sigmoid", "qarepvgg").eval()
    x = images()
    expected = model(x)
    for site in ("0", "3"):
        ungate(model, site)
    assert_close(model(x), expected)
    assert_close(repfx.fuse(model)(x), expected)
    repfx.save(tmp_path / "run.ckpt", model)
    plain = plain_net().double()
    # the base was expanded before it was gated, so its journal has everything
    assert_close(repfx.load(tmp_path / "run.ckpt", plain).eval()(x), expected)


def test_ungate_reaches_into_a_block_at_the_end_of_a_branch() -> None:
    model = repfx.expand(net("dbb").float(), {"3.1x1-kxk.conv2": "acb"}, preserve=False).double().eval()
    model.get_submodule("3.1x1-kxk.norm")
    del model.get_submodule("3.1x1-kxk").norm  # the block's own BatchNorm is inside it
    randomize_batch_norm(model)
    gate(model, "3", "sigmoid")
    x = images()
    expected = model(x)
    ungate(model, "3")
    assert_close(model(x), expected)


def test_nothing_leaves_a_block_in_which_nothing_runs() -> None:
    model = gated("straight_through", "acb", origin=True).eval()
    choose(model, "3")
    with pytest.raises(InvalidInput, match="no path of '3' runs"):
        repfx.drop(model, "3", "1xk")
    assert not model[3](torch.randn(1, 8, 5, 4, dtype=torch.float64)).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_what_is_learned_of_gates_has_float32_at_least(dtype: torch.dtype) -> None:
    model = net("acb").to(dtype)
    gate(model, "3")
    gates = block(model).gates
    assert gates is not None
    assert {parameter.dtype for parameter in gates.parameters()} == {torch.promote_types(dtype, torch.float32)}
    assert model(images().to(dtype)).dtype == dtype


@pytest.mark.slow
@pytest.mark.parametrize("style", STYLES)
def test_fixed_gates_compile_without_a_break(style: str) -> None:
    model = gated(style)
    choose(model, "3", "1x1", "kx1")
    x = images()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_close(compiled(x), model(x))


def test_gate_refuses() -> None:
    model = gated("sigmoid")
    with pytest.raises(InvalidInput, match="has gates already"):
        gate(model, "3")
    with pytest.raises(UnknownName, match="no style of gates 'sigmod'"):
        gate(net(), "3", "sigmod")
    with pytest.raises(InvalidInput, match="the origin can have a straight_through gate"):
        gate(net(), "3", "sigmoid", origin=True)
    with pytest.raises(UnknownName, match="no gate '2x2'"):
        choose(model, "3", "2x2")


def test_drop_refuses_what_a_closed_origin_would_have_to_absorb() -> None:
    model = gated("straight_through", origin=True)
    choose(model, "3", "1x1")
    with pytest.raises(InvalidInput, match="its own gate is closed"):
        repfx.drop(model, "3", "1x1")


@pytest.mark.parametrize("style", STYLES)
def test_the_state_knows_what_is_open(style: str) -> None:
    model = gated(style)
    choose(model, "3", "1x1", modes=(True,))
    choose(model, "3", "kx1", modes=(False,))
    again = gated(style)
    again.load_state_dict(model.state_dict())
    x = images()
    for training in (True, False):
        assert block(again).running_in(training) == block(model).running_in(training)
        assert_close(copy.deepcopy(again).train(training)(x), copy.deepcopy(model).train(training)(x))


@pytest.mark.parametrize("style", STYLES)
def test_a_journal_with_gates_is_replayed(style: str, tmp_path: Any) -> None:
    model = gated(style, origin=style == "straight_through")
    if style == "straight_through":
        choose(model, "3", "1x1", "identity")
        for name in ("1x1-kxk", "1x1-avg", "1xk", "kx1"):
            repfx.drop(model, "3", name)
    ungate(model, "3")
    base = plain_net().double()
    repfx.save(tmp_path / "run.ckpt", model)
    again = repfx.load(tmp_path / "run.ckpt", copy.deepcopy(base))
    x = images()
    assert_close(again.eval()(x), model.eval()(x))
    replay(base, repfx.journal(model))
    assert [name for name, _ in base.named_parameters()] == [name for name, _ in model.named_parameters()]


# --- Shared weights ---------------------------------------------------------------------------------------------------


def shared_net() -> nn.Sequential:
    return net(repfx.Spec(["1x1", "1xk", "kx1", "1x1-kxk", "identity"], weights="shared"))


def test_branches_take_the_centre_of_the_sites_own_weights() -> None:
    found = block(shared_net())
    weight = found.conv.weight
    convs = {name: layer(found, f"{name}.conv") for name in ("1x1", "1xk", "kx1")}
    assert all(isinstance(conv, CroppedConv) for conv in convs.values())
    assert torch.equal(convs["1x1"].weight, weight[:, :, 1:2, 1:2])
    assert torch.equal(convs["1xk"].weight, weight[:, :, 1:2, :])
    assert torch.equal(convs["kx1"].weight, weight[:, :, :, 1:2])
    assert torch.equal(layer(found, "1x1-kxk.conv2").weight, weight)
    assert not any(parameter.ndim > 1 for branch in found.branches.values() for parameter in branch.parameters())


def test_gradients_of_shared_weights_meet_in_one_place() -> None:
    model = shared_net()
    model(images()).square().sum().backward()
    assert block(model).conv.weight.grad is not None
    copied = copy.deepcopy(model)
    block(copied).conv.weight.detach().zero_()
    assert not layer(block(copied), "1x1.conv").weight.any()
    assert layer(block(model), "1x1.conv").weight.any()


def test_shared_weights_are_refused_where_modules_are_replicated() -> None:
    """`nn.DataParallel` replicates modules for each device and doesn't know what a replica reads elsewhere."""
    cropped = next(module for module in shared_net().modules() if isinstance(module, CroppedConv))
    with pytest.raises(InvalidInput, match="use DistributedDataParallel instead of DataParallel"):
        cropped._replicate_for_data_parallel()


def test_shared_weights_are_fused_and_dropped_exactly() -> None:
    model = shared_net().eval()
    x = images()
    expected = model(x)
    assert_close(repfx.fuse(model)(x), expected)
    repfx.drop(model, "3", "1xk")
    assert_close(model(x), expected)
    assert not any(isinstance(module, CroppedConv) for module in block(model).modules())


def test_a_closed_branch_leaves_the_others_sharing() -> None:
    model = shared_net().eval()
    gate(model, "3")
    choose(model, "3", "1x1", "kx1")
    x = images()
    expected = model(x)
    repfx.drop(model, "3", "1xk")
    assert_close(model(x), expected)
    assert any(isinstance(module, CroppedConv) for module in block(model).modules())


def test_shared_weights_stay_trained_while_the_origin_rests() -> None:
    model = shared_net()
    gate(model, "3", origin=True)
    choose(model, "3", "1x1")
    for name in ("1xk", "kx1", "1x1-kxk", "identity"):
        repfx.drop(model, "3", name)
    ungate(model, "3")
    model(images()).square().sum().backward()
    assert block(model).conv.weight.grad is not None
    assert not layer(block(model), "origin.norm").weight.requires_grad


def test_sharing_needs_batch_norms() -> None:
    with pytest.raises(InvalidInput, match='weights="shared" needs norm="batch_norm"'):
        repfx.Spec(["1x1"], norm="none", weights="shared")


def test_a_dilated_conv_on_other_taps_shares_nothing() -> None:
    found = block(net(repfx.Spec(["dilated-1x2", "dilated-2x2", "1xk"], weights="shared")))
    shares = {
        name: any(isinstance(m, CroppedConv) for m in branch.modules()) for name, branch in found.branches.items()
    }
    assert shares == {"dilated-1x2": False, "dilated-2x2": False, "1xk": True}


def test_what_shared_branches_add_can_t_be_taken_off_what_they_share() -> None:
    plain = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)).double()
    with pytest.raises(InvalidInput, match="gamma can't be given to branches with shared weights"):
        repfx.expand(plain, repfx.Spec(["1x1"], weights="shared"), gamma=0.1, calibrate=[images()])


def test_origin_is_a_path() -> None:
    assert ORIGIN in block(net()).running
