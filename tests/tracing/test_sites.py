"""`sites`: which convs a model has, where they are, and what a spec would do."""

from __future__ import annotations

import torch
from torch import nn

import repfx
from tests.small_net import small_net


def test_a_plain_model() -> None:
    table = repfx.sites(small_net())
    assert [site.path for site in table] == ["stem", "plain", "depthwise"]
    assert [site.norm for site in table] == ["norm", None, "norm2"]
    assert str(table["depthwise"].conv) == "7×7 8→8 depthwise"
    assert len(table) == 3


def test_what_a_spec_would_do_is_what_expand_does() -> None:
    planned = repfx.sites(small_net(), "repvgg")
    expanded = repfx.sites(repfx.expand(small_net(), "repvgg"))
    assert [site.note for site in planned] == [
        "would get 1x1; not identity: 3 channels go in and 8 come out",
        "would get 1x1, identity",
        "would get 1x1, identity",
    ]
    assert [site.branches for site in expanded] == [("1x1",), ("1x1", "identity"), ("1x1", "identity")]


def test_the_table_says_why_a_conv_was_left_alone() -> None:
    model = repfx.expand(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ConvTranspose2d(8, 8, 2)), ["1x1"])
    lines = str(repfx.sites(model)).splitlines()
    assert "the window is 1×1 already" in lines[1]
    assert "to a transposed conv only one of equal sizes can be added" in lines[2]
    assert str(repfx.sites(nn.Sequential(nn.Conv2d(3, 8, 1)))).endswith("(plain)")


def test_a_batch_norm_belongs_to_a_conv_only_if_nobody_else_uses_it() -> None:
    class Shares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            output: torch.Tensor = self.norm(y) + y
            return output

    assert repfx.sites(Shares())["conv"].norm is None
