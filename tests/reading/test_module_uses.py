"""Uses that code makes of its layers: harmless ones cost no fusion, and all others are named in the reason."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import repfx
from repfx.reading.function_source import function_node
from repfx.reading.module_uses import uses_in
from repfx.tracing.settings import settings_in
from repfx.tracing.tracer import Tracer
from tests.inline_net import Net, convs, error_of, image, norms, ready, reasons
from tests.tracing.traps.asking import ASKING, Parts, asking
from tests.tracing.traps.keeping import Keeps
from tests.tracing.traps.without_source import Decides, Plain


def feature_pyramid(self: Any, x: Any) -> Any:
    found = [x, x]
    for index, (layer, feature) in enumerate(zip(self.layers, found)):
        found[index] = F.interpolate(layer(feature), scale_factor=2.0)
    return F.relu(found[-1])


def by_a_number(self: Any, x: Any) -> Any:
    for index in range(len(self.layers)):
        layer = getattr(self, f"layer{index}", None) or self.layers[index]
        x = layer(x)
    return x


def if_it_is_there(self: Any, x: Any) -> Any:
    residual = self.norm(x) if self.norm is not None and self.block else x
    return self.block(x) + residual


def dtype_of_the_first(self: Any, x: Any) -> Any:
    return self.block(x.to(next(self.parameters()).dtype).to(next(iter(self.block.parameters())).device))


def checkpointed(self: Any, x: Any) -> Any:
    return checkpoint(self.block, x, use_reentrant=False) if self.training else self.block(x)


def collected(self: Any, x: Any) -> Any:
    layers: list[Any] = []
    for index, layer in enumerate(self.layers):
        layers.insert(index, layer)
    layers += [self.block]
    return [layer(x) for layer in layers][-1]


def by_a_helper(self: Any, x: Any) -> Any:
    return run([self.block, *self.stage], x)


def run(layers: list[nn.Module], x: Any) -> Any:
    for layer in layers:
        x = layer(x)
    return x


def the_last_one(self: Any, x: Any) -> Any:
    for layer in self.stage:
        x = layer(x) if layer is self.stage[-1] else F.relu(layer(x))
    return x


def in_an_error(self: Any, x: Any) -> Any:
    if not isinstance(x, Tensor):
        raise TypeError(f"{type(self.block)} got {type(x)}")
    return self.block(x)


def plain_class(self: Any, x: Any) -> Any:
    return self.block(x[0] if type(x) in (list, tuple) else x)


def own_class(self: Any, x: Any) -> Any:
    return self.block(x) if type(self).__name__ == "Parts" and self.__class__ is not Net else x


HARMLESS = (
    feature_pyramid,
    by_a_number,
    if_it_is_there,
    dtype_of_the_first,
    checkpointed,
    collected,
    by_a_helper,
    the_last_one,
    in_an_error,
    plain_class,
    own_class,
)


@pytest.mark.parametrize("ask", HARMLESS)
def test_what_only_calls_layers_is_harmless(ask: Any) -> None:
    uses = uses_in(asking(Parts, ask)(), ("ask",))
    assert (uses.of_children, uses.given, uses.unread, uses.types) == ({}, {}, {}, [])


# other reasons cover these: a class that is asked for by its own name, a name that is read inside a child, and an index
COVERED = {"no identity", "without bias", "without bias by text", "in own dict"}


@pytest.mark.parametrize("name", sorted(ASKING.keys() - COVERED))
def test_what_does_more_is_named(name: str) -> None:
    uses = uses_in(asking(Parts, ASKING[name])(), ("ask",))
    assert uses.of_children or uses.given


@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("by name", "layer.__class__"),
        ("matched", "layer"),
        ("has statistics", "hasattr(layer, 'running_mean')"),
        ("other name of isinstance", "is_a(layer, nn.Conv2d)"),
        ("submodule", "self.get_submodule"),
        ("by a variable", "getattr(self.block, self.name)"),
        ("other padding", "self.conv.padding"),
        ("batch statistics", "self.block.bn.train"),
        ("one of the state", "self.stage.state_dict"),
    ],
)
def test_the_reason_names_the_use(name: str, use: str) -> None:
    model = asking(Parts, ASKING[name])()
    sites = repfx.sites(model)
    assert any(site.refusal == f"code around it uses it in a way that repfx doesn't know: {use}" for site in sites), (
        sites
    )


def test_a_conv_whose_exact_class_is_asked_for_stays_of_it() -> None:
    sites = repfx.sites(asking(Parts, ASKING["exact class"])())
    assert any(site.refusal == "code around it asks whether it is a Conv2d" for site in sites), sites


def test_only_what_is_asked_is_left_alone() -> None:
    """A question for one part says nothing of the others."""
    model = ready(asking(Parts, lambda self, x: self.stage(self.block(x)) * len(list(self.block.children())))())
    sites = repfx.sites(model)
    assert sites["block.conv"].refusal is not None
    assert [sites[path].refusal for path in ("stage.0", "stage.3")] == [None, None]


# ---- code without source


def test_traced_code_whose_source_can_t_be_read_is_expanded_all_the_same() -> None:
    model = ready(Plain())
    expanded = repfx.expand(model, "acb")
    assert isinstance(expanded.get_submodule("body.0"), repfx.RepBlock)
    assert error_of(expanded, model, image()) < 1e-9
    assert norms(repfx.fuse(model)) == []


def test_untraced_code_whose_source_can_t_be_read_keeps_its_layers() -> None:
    fused = repfx.fuse(ready(Decides()))
    assert norms(fused) == ["body.1"]
    assert "Decides.forward, whose source can't be read" in reasons(fused)


def test_a_lambda_is_read_where_it_stands_alone_in_its_line() -> None:
    harmless = Net(lambda m, x: m.layer(x), layer=nn.Conv2d(4, 4, 1))
    risky = Net(lambda m, x: m.layer(x) * len(list(m.layer.parameters())), layer=nn.Conv2d(4, 4, 1))
    assert uses_in(harmless).of_children == {}
    assert uses_in(risky).of_children == {"layer": "m.layer.parameters"}


def test_lambdas_of_one_line_that_name_the_same_are_not_told_apart() -> None:
    both = [lambda m, x: m.outer(m.inner(x)), lambda m, x: m.inner(m.outer(x))]
    alone = lambda m, x: m.outer(m.inner(x))  # noqa: E731
    assert [function_node(each) for each in both] == [None, None]
    assert function_node(alone) is not None


# ---- what is kept


def test_what_is_kept_is_named_with_its_keeper() -> None:
    fused = repfx.fuse(ready(Keeps()))
    assert len(norms(fused)) == 4
    assert "'kept' of the model keeps it as a plain attribute" in reasons(fused)


def test_what_is_kept_inside_one_graph_is_fused() -> None:
    model: Any = Net(lambda m, x: m.kept[0](x), block=nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)))
    model.kept = [model.block]
    fused = repfx.fuse(ready(model))
    assert (len(convs(fused)), norms(fused)) == (1, [])


def test_code_that_sets_another_eps_does_not_change_the_model() -> None:
    model: Any = ready(asking(Parts, ASKING["other eps"])())
    before = model.norm.eps
    repfx.fuse(model)
    assert model.norm.eps == before


def test_what_tracing_changed_is_put_back() -> None:
    """Tracing runs code that sets another eps. The next try must see the layer as it was."""
    model: Any = asking(Parts, ASKING["other eps"])()
    before = settings_in(model)
    with pytest.raises(TypeError, match="changes 'eps' of a BatchNorm2d while it runs"):
        Tracer().trace(model)
    assert model.norm.eps == before[model.norm]["eps"] == 1e-5


class Profiles(nn.Module):
    """A model that gives its layers to a function of another library, if it is asked to or always."""

    def __init__(self, always: bool, decides: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(4, 4, (3, 1)), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)])
        self.always, self.decides = always, decides

    def forward(self, x: Tensor, profile: bool = False) -> Tensor:
        if self.decides and x.sum() > 1e9:
            return x
        for layer in self.layers:
            if profile or self.always:
                self.measure(layer)
            x = layer(x)
        return x

    def measure(self, layer: nn.Module) -> int:
        return sys.getsizeof(layer)


@pytest.mark.parametrize(
    ("always", "decides", "stays"), [(False, False, False), (True, False, True), (False, True, True)]
)
def test_a_layer_may_be_given_away_where_that_does_not_happen(always: bool, decides: bool, stays: bool) -> None:
    """Only tracing can tell. Code that can't be traced may give its layers away at any time."""
    sites = repfx.sites(ready(Profiles(always, decides)))
    reason = "code around it uses it in a way that repfx doesn't know: sys.getsizeof(layer)"
    assert [site.refusal for site in sites] == [reason if stays else None] * 2
