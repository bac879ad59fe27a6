"""Architectures drawn at random, each to be trained by itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import repfx
from repfx.errors import InvalidInput
from repfx.search.random_nets import random_nets
from repfx.testing import assert_same_map
from tests.small_net import batch, small_net


def test_they_differ_keep_to_the_budget_and_depend_on_the_seed() -> None:
    nets = random_nets(small_net(), 8, 25, seed=3)
    assert len(set(map(str, nets))) == 25
    for net in nets:
        codes = [site.code for site in net.sites.values()]
        assert "".join(codes).count("1") == 8
        assert all("1" in code for code in codes), "a site has no path"
        assert not any(site.importance for site in net.sites.values())
    assert list(map(str, random_nets(small_net(), 8, 25, seed=3))) == list(map(str, nets))
    assert list(map(str, random_nets(small_net(), 8, 25, seed=4))) != list(map(str, nets))


def test_each_is_built_again_from_its_file_and_shares_weights_as_repnas_does(tmp_path: Path) -> None:
    model = small_net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    (found,) = random_nets(model, 0.5, 1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert {site.weights for site in found.sites.values()} == {"shared"}
    found.save(tmp_path / "net.json")
    built = repfx.expand(model, str(tmp_path / "net.json"))
    assert_same_map(repfx.fuse(built.eval()), built, batch())


def test_own_convs_always_run_if_asked_to() -> None:
    for found in random_nets(small_net(), 3, 5, spec=["1x1", "1xk", "kx1"], origin=False):
        assert all(site.code[0] == "1" for site in found.sites.values())
        assert sum(site.code[1:].count("1") for site in found.sites.values()) == 3


def test_there_may_not_be_so_many() -> None:
    with pytest.raises(InvalidInput, match="only 1 different"):
        random_nets(small_net(), 1.0, 2)
