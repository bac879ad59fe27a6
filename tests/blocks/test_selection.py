"""Patterns of site paths: which one fits, which one counts, and which ones fit nothing."""

from __future__ import annotations

from typing import Any

import pytest

import repfx
from repfx.blocks.presets import PRESETS
from repfx.blocks.selection import Selection
from repfx.blocks.spec import Spec
from repfx.errors import InvalidInput, UnknownName
from tests.small_net import batch, small_net

PATHS = ["stem", "layer1.0.conv1", "layer1.0.conv2", "layer1.10.conv1", "layer2.0.conv1", "head.conv"]

FITS: list[tuple[str, list[str]]] = [
    ("*", PATHS),
    ("stem", ["stem"]),
    ("layer1.*", PATHS[1:4]),
    ("layer1.0.*", PATHS[1:3]),
    ("*.conv1", ["layer1.0.conv1", "layer1.10.conv1", "layer2.0.conv1"]),
    ("layer?.0.conv1", ["layer1.0.conv1", "layer2.0.conv1"]),
    ("layer[2-9].*", ["layer2.0.conv1"]),
    ("layer[!2].0.conv1", ["layer1.0.conv1"]),
    ("*conv", ["head.conv"]),
    ("Stem", []),
    ("layer1", []),
    ("conv1", []),
]


@pytest.mark.parametrize(("pattern", "expected"), FITS)
def test_a_pattern_fits_whole_paths(pattern: str, expected: list[str]) -> None:
    """A star also matches dots, a prefix alone is no match, and case matters."""
    selection = Selection.of({pattern: "acb"})
    assert [path for path in PATHS if selection.spec_for(path) is not None] == expected


def test_the_first_pattern_that_fits_counts() -> None:
    specs: dict[str, Any] = {"layer1.0.*": "acb", "layer*": ["1x1"], "*": PRESETS["dbb"].spec}
    chosen = [Selection.of(specs).spec_for(path) for path in PATHS]
    acb, dbb = PRESETS["acb"].spec, PRESETS["dbb"].spec
    assert chosen == [dbb, acb, acb, Spec(["1x1"]), Spec(["1x1"]), dbb]
    reverse = Selection.of(dict(reversed(specs.items())))
    assert [reverse.spec_for(path) for path in PATHS] == [dbb] * len(PATHS)


@pytest.mark.parametrize(
    "spec", ["acb", ["1xk", "kx1"], ("1xk", "kx1"), Spec(["1xk", "kx1"])], ids=lambda s: type(s).__name__
)
def test_one_spec_is_for_all(spec: Any) -> None:
    selection = Selection.of(spec)
    assert all(selection.spec_for(path) == PRESETS["acb"].spec for path in PATHS)
    assert not any(selection.names(path) for path in PATHS)


def test_a_number_is_the_path_of_a_layer_in_a_sequence() -> None:
    selection = Selection.of({0: "acb"})  # type: ignore[dict-item]
    assert selection.names("0")
    assert selection.spec_for("10") is None


def test_only_an_exact_path_names_a_site() -> None:
    selection = Selection.of({"layer1.0.conv1": "acb", "layer1.0.conv*": "dbb"})
    assert [path for path in PATHS if selection.names(path)] == ["layer1.0.conv1"]


CONVS = dict.fromkeys(PATHS, "3×3 8→8")


def test_what_all_patterns_fit_is_used() -> None:
    Selection.of({"layer1.0.conv1": "acb", "*": "dbb", "*.conv": "acb"}).require_used(CONVS)
    with pytest.raises(InvalidInput, match=r"'\*' fits no site; there are 0"):
        Selection.of("acb").require_used({})


BAD: list[tuple[Any, type[Exception], str]] = [
    (
        {"layer2.conv1": "acb"},
        InvalidInput,
        r"'layer2\.conv1' fits no site \(nearest: 'layer2\.0\.conv1'\); there are 6: stem, ",
    ),
    ({"*": "acb", "Stem": "dbb"}, InvalidInput, r"'Stem' fits no site \(nearest: 'stem'\)"),
    ({"zz*": "acb"}, InvalidInput, r"'zz\*' fits no site; there are 6: stem, .*layer2\.0\.conv1, …$"),
    ({}, InvalidInput, "empty dict"),
    ({"*": "ac"}, UnknownName, "no preset 'ac'; did you mean 'acb'"),
    ({"*": {"stem": "acb"}}, InvalidInput, "not dict"),
]


@pytest.mark.parametrize(("spec", "error", "message"), BAD)
def test_what_can_t_be_used_says_so_and_names_the_nearest(spec: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Selection.of(spec).require_used(CONVS)


# ---- sites inside blocks


def test_inside_a_block_an_exact_path_is_a_site_and_a_pattern_is_none() -> None:
    expanded = repfx.expand(small_net(), {"stem": "dbb"})
    inner = "stem.1x1-kxk.conv2"
    for pattern in ("stem.*", "*.conv2", "stem.1x1-kxk.conv?"):
        with pytest.raises(InvalidInput, match=r"fits no site.*; there are 3: stem, plain, depthwise"):
            repfx.expand(expanded, {pattern: "acb"})
    nested = repfx.expand(expanded, {inner: "acb"})
    assert [edit.path for edit in repfx.report(nested).applied] == [inner]


def test_a_model_s_star_leaves_blocks_and_what_is_in_them() -> None:
    expanded = repfx.expand(small_net(), {"stem": "dbb"})
    before = {path for path, _ in expanded.get_submodule("stem").named_modules()}
    again = repfx.expand(expanded, {"*": "repvgg"})
    assert {path for path, _ in again.get_submodule("stem").named_modules()} == before
    assert [edit.path for edit in repfx.report(again).applied] == ["plain", "depthwise"]
    assert again(batch()).shape == (6, 4)
