"""Tracing: what becomes an island and what stays as it is; the model itself is not changed."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import repfx
from repfx.errors import InvalidInput
from repfx.testing import randomize_batch_norm
from repfx.tracing.trace import trace
from tests.inline_net import Net, convs, error_of, fused_exactly, image, norms, ready, reasons, same_state


def pair(**keywords: Any) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, **keywords), nn.BatchNorm2d(4))


class Block(nn.Module):
    """Conv and BatchNorm, with attributes that a parent may read."""

    kind = "block"

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.size = 7

    @property
    def sizes(self) -> tuple[int, int]:
        return (self.size, 2)

    def forward(self, x: Any) -> Any:
        return self.norm(self.conv(x))


def islands(model: nn.Module) -> list[str]:
    return [island.path for island in trace(model).islands]


# ---- whole or in islands


@pytest.mark.slow
def test_dropout_and_the_like_keep_both_modes() -> None:
    model = ready(Net(lambda m, x: m.act(m.block(x)), block=pair(), act=nn.Sequential(nn.ReLU(), nn.Dropout(0.5))))
    fused = repfx.fuse(model)
    assert islands(model) == [""]
    assert isinstance(fused.get_submodule("act.1"), nn.Dropout)
    x = image()
    assert torch.equal(fused.eval()(x), fused(x))
    assert bool((fused.train()(x) == 0).sum() > x.numel() / 4)


def differs_by_mode(m: Any, x: Any) -> Any:
    return m.block(x) * 2 if m.training else m.block(x)


def constant_differs_by_mode(m: Any, x: Any) -> Any:
    return m.block(x) * torch.tensor(2.0 if m.training else 1.0, dtype=torch.float64)


def random_constant(m: Any, x: Any) -> Any:
    return m.block(x) + 1e-30 * torch.randn(1, dtype=torch.float64)


def decides_by_data(m: Any, x: Any) -> Any:
    return m.block(x) if float(x.sum()) < 1e9 else x


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (differs_by_mode, "different things in training and in eval mode"),
        (constant_differs_by_mode, "different things in training and in eval mode"),
        (random_constant, "draws random numbers in code"),
        (decides_by_data, "can't be traced: float()"),
    ],
)
def test_what_has_no_single_graph_is_fused_in_islands(function: Any, reason: str) -> None:
    model = Net(function, block=Block())
    assert islands(model) == ["block"]
    fused = fused_exactly(model, image())
    assert type(fused) is Net
    assert (convs(fused), norms(fused)) == (["block.conv"], [])
    assert reason in reasons(fused)


def test_in_training_mode_an_island_s_parent_still_does_what_it_did() -> None:
    model = ready(Net(differs_by_mode, block=Block()))
    fused = repfx.fuse(model)
    x = image()
    assert torch.equal(fused.train()(x), 2 * fused.eval()(x))


def test_what_a_parent_reads_of_a_child_survives() -> None:
    def forward(m: Any, x: Any) -> Any:
        if float(x.sum()) > 1e9:
            return x
        return m.block(x) * m.block.size * m.block.sizes[1] * len(m.block.kind)

    model = Net(forward, block=Block())
    fused = fused_exactly(model, image())
    assert norms(fused) == []
    loaded = pickle.loads(pickle.dumps(fused.block))
    saved = Net(forward, block=loaded)
    for again in (copy.deepcopy(fused), copy.copy(fused), saved):
        assert error_of(again, model, image()) < 1e-9
        assert error_of(repfx.fuse(again), model, image()) < 1e-9
        assert error_of(repfx.restore(again).eval(), model, image()) < 1e-9
        assert repfx.check_equivalent(model, again, image()).equivalent


def test_a_sequence_in_code_that_can_t_be_traced_stays_a_sequence() -> None:
    def forward(m: Any, x: Any) -> Any:
        if float(x.sum()) > 1e9:
            return m.layers(x)
        for layer in m.layers:
            x = layer(x)
        return x + m.layers[0](x) + m.mixed[1](m.mixed[0](x)) + len(m.layers)

    inner = nn.Sequential(pair(), nn.ReLU(), *pair())
    model = Net(forward, layers=inner, mixed=nn.Sequential(Block(), pair()))
    fused = fused_exactly(model, image())
    assert type(fused.layers) is nn.Sequential
    assert (len(fused.layers), norms(fused)) == (4, [])
    assert convs(fused) == ["layers.0.0", "layers.2", "mixed.0.conv", "mixed.1.0"]
    assert isinstance(fused.get_submodule("layers.0.1"), nn.Identity)


def test_blocks_in_code_that_can_t_be_traced_become_convs_at_their_paths() -> None:
    def forward(m: Any, x: Any) -> Any:
        return m.layers(m.norm(m.conv(x))) if float(x.sum()) < 1e9 else x

    original = ready(Net(forward, conv=nn.Conv2d(4, 4, 3), norm=nn.BatchNorm2d(4), layers=pair(bias=False)))
    expanded = ready(repfx.expand(original, "dbb"), seed=1)
    fused = fused_exactly(expanded, image())
    assert convs(fused) == ["conv", "layers.0"]
    restored = repfx.restore(fused)
    restored.norm = original.norm
    assert restored.state_dict().keys() == original.state_dict().keys()
    assert restored.layers(image()).shape == (2, 4, 9, 10)


class Reaching(nn.Module):
    """A module whose forward can't be traced and calls a conv inside a child."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.other = nn.Sequential(Block())

    def forward(self, x: Tensor) -> Tensor:
        if float(x.sum()) > 1e9:
            return x
        output: Tensor = self.block(x) + self.block.conv(x)
        return output


def test_a_layer_that_such_code_takes_from_inside_a_child_stays() -> None:
    fused = fused_exactly(Reaching(), image())
    assert norms(fused) == ["block.norm", "other.0.norm"]
    assert "reaches for its 'conv'" in reasons(fused)


@pytest.mark.parametrize("kind", ["forward", "before", "backward"])
def test_a_module_with_a_hook_is_called_as_it_is(kind: str) -> None:
    block = Block()
    seen: list[nn.Module] = []
    register: Any = {
        "forward": block.register_forward_hook,
        "before": block.register_forward_pre_hook,
        "backward": block.register_full_backward_hook,
    }[kind]
    register(lambda module, *_: seen.append(module))
    model = ready(nn.Sequential(block, nn.ReLU(), *pair()))
    fused = repfx.fuse(model)
    assert norms(fused) == ["0.norm"]
    x = image().requires_grad_()
    fused(x).sum().backward()
    assert len(seen) == 1
    assert error_of(fused, model, image()) < 1e-9


def test_a_model_with_a_hook_keeps_it() -> None:
    model = Net(lambda m, x: m.block(x), block=Block())
    model.register_forward_hook(lambda module, inputs, output: output + 1)
    assert norms(fused_exactly(model, image())) == []


# ---- the forward's signature, constants


def test_an_argument_with_a_default_stands_for_it() -> None:
    class Masked(Block):
        def forward(self, x: Any, mask: Any = None, *, factor: float = 2.0) -> Any:
            x = super().forward(x) * factor
            return x if mask is None else x * mask

    model = ready(Masked())
    fused = repfx.fuse(model)
    x = image()
    assert error_of(fused, model, x) < 1e-9
    assert torch.equal(fused(x, None), fused(x))
    assert torch.equal(fused(x, factor=2.0), fused(x))
    for arguments, keywords in [((x, x), {}), ((x,), {"factor": 3.0})]:
        with pytest.raises(InvalidInput, match="can't be called with another value"):
            fused(*arguments, **keywords)
    again = copy.deepcopy(fused)
    assert torch.equal(again(x), fused(x))


class AnyFurther(Block):
    """A block that ignores further arguments, such as blocks of a family that shares one signature."""

    def forward(self, x: Any, *further: Any, factor: float = 2.0, shift: float = 1.0, **named: Any) -> Any:
        return super().forward(x) * factor + shift


class ReadsFurther(Block):
    def forward(self, x: Any, scale: Any, /, *further: Any, factor: Any, **named: Any) -> Any:  # type: ignore[override]
        return super().forward(x) * scale * factor + further[0] - named["minus"]


def test_further_arguments_are_not_taken_for_those_with_a_default() -> None:
    model = ready(AnyFurther())
    fused = fused_exactly(model, image())
    assert norms(fused) == []
    x = image()
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((x, 2.0), {}),
        ((x, x, None), {"other": 3}),
        ((x,), {"factor": 2.0, "shift": 1.0}),
    ]
    for arguments, keywords in calls:
        assert torch.allclose(fused(*arguments, **keywords), model(*arguments, **keywords), rtol=1e-12)
    for keyword in ("factor", "shift"):
        with pytest.raises(InvalidInput, match=f"traced with {keyword}="):
            fused(x, **{keyword: 5.0})


def test_further_arguments_arrive_where_they_did() -> None:
    model = ready(ReadsFurther())
    fused = repfx.fuse(model)
    x, further = image(), torch.arange(10.0).double()
    expected = model(x, 3.0, further, 7, factor=x, minus=2.0)
    assert norms(fused) == []
    for again in (fused, copy.deepcopy(fused), repfx.fuse(fused)):
        assert torch.allclose(again(x, 3.0, further, 7, factor=x, minus=2.0), expected, rtol=1e-12)
    with pytest.raises(TypeError, match="factor"):
        fused(x, 3.0, further, minus=2.0)


def test_arguments_by_keyword_alone_need_no_order() -> None:
    class Keywords(Block):
        def forward(self, x: Any, *, factor: float = 2.0, shift: Any) -> Any:  # type: ignore[override]
            return super().forward(x) * factor + shift

    class Mixed(Block):
        def forward(self, x: Any, factor: float = 2.0, *, shift: Any) -> Any:  # type: ignore[override]
            return super().forward(x) * factor + shift

    x = image()
    for model, left in ((ready(Keywords()), []), (ready(Mixed()), ["norm"])):
        fused = repfx.fuse(model)
        assert norms(fused) == left
        assert torch.allclose(fused(x, shift=x), model(x, shift=x), rtol=1e-12)
        assert torch.allclose(fused(x, factor=2.0, shift=1), model(x, factor=2.0, shift=1), rtol=1e-12)
    assert "can't take 'shift' by keyword alone" in reasons(fused)


def test_a_tensor_in_the_place_of_a_default_is_refused_in_words() -> None:
    class Shifted(Block):
        def forward(self, x: Any, shift: Any = 1.0) -> Any:
            return super().forward(x) + shift

    fused = repfx.fuse(ready(Shifted()))
    with pytest.raises(InvalidInput, match=r"traced with shift=1\.0"):
        fused(image(), torch.ones(2))


def test_two_inputs_and_a_dict_of_outputs() -> None:
    class Two(Block):
        def forward(self, x: Any, y: Any) -> Any:  # type: ignore[override]
            return {"sum": self.norm(self.conv(x)) + y, "list": [y]}

    model = ready(Two())
    x, y = image(), image()
    fused = repfx.fuse(model)
    assert torch.allclose(fused(x, y)["sum"], model(x, y)["sum"], rtol=1e-12)
    assert fused(x, y=y)["list"][0] is y


def test_constants_are_kept_and_not_saved() -> None:
    def forward(m: Any, x: Any) -> Any:
        return F.relu(m.block(x - m.mean) * torch.tensor(2.0, dtype=torch.float64)) + torch.arange(10.0).double()

    model = ready(Net(forward, block=pair(), mean=torch.full((4, 1, 1), 0.5, dtype=torch.float64)))
    fused = fused_exactly(model, image())
    assert fused.state_dict().keys() == {"block.0.weight", "block.0.bias"}
    for again in (copy.deepcopy(fused), repfx.fuse(fused)):
        assert error_of(again, model, image()) < 1e-9
    plain = ready(Net(lambda m, x: m.block(x).relu() + m.mean, block=pair(), mean=torch.full((4, 1, 1), 0.5).double()))
    restored = repfx.restore(repfx.fuse(plain))
    assert restored.state_dict().keys() == plain.state_dict().keys()


def test_what_the_forward_never_uses_stays_in_the_state_dict() -> None:
    model = ready(
        Net(
            lambda m, x: m.block(x),
            block=Block(),
            unused=nn.Linear(2, 2),
            parameter=nn.Parameter(torch.ones(1)),
            buffer=nn.Buffer(torch.ones(1)),
            transient=nn.Buffer(torch.ones(1), persistent=False),
        )
    )
    model.block.extra = nn.Parameter(torch.ones(2))
    model.block.deep = nn.Sequential(nn.Sequential(nn.BatchNorm1d(2)))
    before = model.state_dict()
    restored = repfx.restore(repfx.fuse(model))
    assert restored.state_dict().keys() == before.keys()
    assert torch.equal(restored.transient, torch.ones(1))
    model.load_state_dict(restored.state_dict(), strict=True)


# ---- the model is untouched


class Caching(Block):
    """A module that keeps what it computed, as some attention layers do, and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.cache: dict[str, Any] = {}
        self.last: Any = None

    def forward(self, x: Any) -> Any:
        if self.training:
            self.cache = {}
        if "out" not in self.cache:
            self.cache["out"] = super().forward(x)
        self.last = self.cache["out"]
        return self.last


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_untouched_bit_for_bit(training: bool) -> None:
    model = ready(nn.Sequential(Caching(), nn.Dropout(), pair())).train(training)
    model[1].train(not training)
    model[0].norm.eval()
    before = copy.deepcopy(model.state_dict())
    attributes = {path: dict(vars(module)) for path, module in model.named_modules()}
    identities = [id(tensor) for tensor in (*model.parameters(), *model.buffers(), *model.modules())]
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()

    fused = repfx.fuse(model)
    trace(model)
    repfx.sites(model)

    assert same_state(before, model.state_dict())
    assert identities == [id(tensor) for tensor in (*model.parameters(), *model.buffers(), *model.modules())]
    assert modes == [module.training for module in model.modules()]
    assert attributes == {path: dict(vars(module)) for path, module in model.named_modules()}
    assert model[0].cache == {}
    assert torch.equal(random, torch.get_rng_state())
    assert [fused.get_submodule(path).training for path in ("", "1", "0.conv")] == [training, not training, training]
    assert not any(isinstance(value, fx.Proxy) for module in fused.modules() for value in vars(module).values())


def test_parameters_that_no_rule_touches_are_shared_with_nobody() -> None:
    model = ready(nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), pair()))
    fused = repfx.fuse(model)
    with torch.no_grad():
        fused.get_submodule("0").weight.zero_()
    assert bool((model[0].weight != 0).all())


def test_what_can_t_be_copied_is_an_error() -> None:
    model = Net(lambda m, x: m.block(x), block=Block(), stream=(item for item in "abc"))
    with pytest.raises(InvalidInput, match="Net can't be copied: cannot pickle 'generator' object"):
        repfx.fuse(model)


def twice(m: Any, x: torch.Tensor) -> torch.Tensor:
    output: torch.Tensor = m.c(torch.relu(m.c(x)))
    return output


def in_a_loop(m: Any, x: torch.Tensor) -> torch.Tensor:
    """Call one conv in a loop, as detection heads do over the levels of a pyramid."""
    return torch.cat([m.c(level).flatten(1) for level in (x, x[..., ::2], x[..., ::3])], 1)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("preset", ["dbb", "qarepvgg"])
@pytest.mark.parametrize("forward", [twice, in_a_loop])
def test_a_block_that_is_called_more_than_once_becomes_one_conv(forward: Any, preset: str, norm: bool) -> None:
    layer: nn.Module = nn.Conv2d(4, 4, 3, padding=1)
    model: Any = Net(forward, c=nn.Sequential(layer, nn.BatchNorm2d(4)) if norm else layer)
    path = "c.0" if norm else "c"
    expanded: Any = repfx.expand(ready(model), preset)
    assert error_of(expanded, model, image()) < 1e-12
    assert len(expanded.get_submodule(path).branches) > 1
    fused = fused_exactly(expanded, image())
    assert convs(fused) == [path]
    assert norms(fused) == (["c.1"] if norm else [])


class ByOrder(nn.Module):
    """A module that loops over its children in order, depending on a value."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            return x
        for child in self.inner.children():
            x = child(x)
        output: Tensor = self.last(x)
        return output


def test_blocks_are_fused_where_the_code_around_goes_through_children_by_their_order() -> None:
    model = ByOrder().double().eval()
    expanded = repfx.expand(model, {"inner.0": ["1x1", "1xk"]}, preserve=False)
    randomize_batch_norm(expanded)
    x = torch.randn(2, 3, 7, 9, dtype=torch.float64)
    fused = repfx.fuse(expanded.eval())
    torch.testing.assert_close(fused(x), expanded(x), rtol=1e-9, atol=1e-9)
    assert type(fused.get_submodule("inner.0")) is nn.Conv2d


# ---- values that code iterates over


def parts_in_a_list(m: Any, x: Any) -> Any:
    parts = list(m.a(x).chunk(2, 1))
    parts.extend(m.b(parts[-1]) for _ in range(1))
    return torch.cat(parts, 1)


def first_and_rest(m: Any, x: Any) -> Any:
    first, *rest = torch.split(m.a(x), [1, 1, 2], dim=1)
    return sum(rest, first)


def counted(m: Any, x: Any) -> Any:
    parts = torch.chunk(m.a(x), chunks=4, dim=1)
    return sum(parts) / len(parts)


def part_by_part(m: Any, x: Any) -> Any:
    total = m.b(x[:, :2])
    for part in m.a(x).split((2, 2), 1):
        total = total + part
    return total


def equal_parts(m: Any, x: Any) -> Any:
    return torch.cat([part.relu() for part in m.a(x).tensor_split(2, dim=1)], 1)


def all_by_star(m: Any, x: Any) -> Any:
    return torch.add(*m.a(x).chunk(2, 1))


ITERATIONS = (parts_in_a_list, first_and_rest, counted, part_by_part, equal_parts, all_by_star)


@pytest.mark.parametrize("function", ITERATIONS)
def test_code_may_iterate_over_parts_whose_number_it_says(function: Any) -> None:
    model = Net(function, a=nn.Conv2d(4, 4, 1), b=nn.Conv2d(2, 2, 1))
    assert islands(ready(model)) == [""]
    fused_exactly(model, image())


def test_code_may_iterate_over_what_is_computed_from_parameters() -> None:
    model = Net(
        lambda m, x: sum(w * m.a(x).relu() ** n for n, w in enumerate((m.alpha * 2).softmax(0)[:2])),
        a=nn.Conv2d(4, 4, 1),
        alpha=nn.Parameter(torch.randn(3)),
    )
    assert islands(ready(model)) == [""]
    fused_exactly(model, image())


def over_the_batch(m: Any, x: Any) -> Any:
    return torch.stack([m.block(image[None])[0] for image in x.unbind(0)])


def over_chunks_of_the_input_s_size(m: Any, x: Any) -> Any:
    return torch.cat(list(m.block(x).chunk(x.shape[0], 1)))


def over_parts_of_a_size(m: Any, x: Any) -> Any:
    return torch.cat([part.relu() for part in m.block(x).split(2, 1)], 1)


@pytest.mark.parametrize("function", [over_the_batch, over_chunks_of_the_input_s_size, over_parts_of_a_size])
def test_code_that_iterates_over_as_many_parts_as_the_input_has_is_not_traced(function: Any) -> None:
    model = Net(function, block=Block())
    assert islands(ready(model)) == ["block"]
    assert "can't be traced" in reasons(fused_exactly(model, image()))


def test_a_graph_counts_the_chunks_that_its_code_counted() -> None:
    """`chunk` gives fewer parts than it is asked for if there are not enough channels."""
    fused = repfx.fuse(ready(Net(counted, a=nn.Conv2d(4, 3, 1))))
    with pytest.raises(InvalidInput, match="traced with 4 chunks, and its input has 3"):
        fused(image())


class ReadsParameters(nn.Module):
    """A conv and a BatchNorm, written with the layers' parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        n: Any = self.norm
        y = F.conv2d(x, self.conv.weight, self.conv.bias)
        return F.batch_norm(y, n.running_mean, n.running_var, n.weight, n.bias, self.training).relu()


def calls_of(work: Callable[[], object]) -> int:
    """Count the calls of functions that work makes."""
    count = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def test_a_parameter_is_found_as_quickly_in_a_deep_model() -> None:
    calls = [calls_of(partial(trace, nn.Sequential(*(ReadsParameters() for _ in range(n))))) for n in (10, 40)]
    assert calls[1] < 4.2 * calls[0]


class ReadsASequence(nn.Module):
    """Linear layers in a sequence, and code that can't be traced and uses one of them by itself."""

    def __init__(self, read: Callable[[nn.Sequential, Tensor], Tensor]) -> None:
        super().__init__()
        self.layers, self._read = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), read

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x) if float(x.sum()) < 1e9 else x
        return y + self._read(self.layers, x)


READS: dict[str, Callable[[nn.Sequential, Tensor], Tensor]] = {
    "by index": lambda layers, x: layers[0](x),
    "in a loop": lambda layers, x: sum((layer(x) for layer in layers), x),
    "its weight": lambda layers, x: F.linear(x, layers.get_parameter("0.weight")),
}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("read", READS)
def test_linear_layers_that_code_uses_one_by_one_stay_two(read: str, inside: bool) -> None:
    """That they stay is no loss worth reporting."""
    reads = ReadsASequence(READS[read])
    model = Net(lambda m, x: m.reads(x) + x if float(x.sum()) < 1e9 else x, reads=reads) if inside else reads
    fused = fused_exactly(model, image(3, 6))
    assert not repfx.report(fused).skipped
    assert not repfx.report(fused).applied
