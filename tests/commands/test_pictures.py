"""The papers' pictures: each number that they show is what a reference, computed here, gives."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import repfx
from repfx.blocks.architecture import Architecture, SiteCode
from repfx.blocks.spec import BranchSpec
from repfx.errors import InvalidInput
from repfx.pages.pictures.branch_pairs import difference_map, differences
from repfx.pages.pictures.codes import code_matrices
from repfx.pages.pictures.feature_maps import feature_maps, maps_of
from repfx.pages.pictures.gradient_chart import gradient_chart, gradient_lines
from repfx.pages.pictures.picture import Picture, write_pictures
from repfx.pages.rendering import TEMPLATES
from repfx.testing import randomize_batch_norm
from repfx.training.experiment import Experiment, run
from repfx.training.models import ModelReference
from repfx.training.recipe import Recipe
from repfx.training.run_folder import CHECKPOINT, RunFolder
from repfx.training.runs.gradients import Gradients
from repfx.training.runs.history import Epoch, History
from tests.commands.test_page_charts import shapes
from tests.commands.test_pages import Page, stands_alone
from tests.recorded_run import TINY


def titles(picture: Picture) -> list[str]:
    return [str(each.text) for each in ElementTree.fromstring(picture.drawings[-1]).iter("title")]


# --- gradients --------------------------------------------------------------------------------------------------------


def small(*kinds: str) -> Any:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
    return repfx.expand(model.double(), list(kinds), preserve=False)


def test_means_are_over_the_weights_of_a_path_and_over_the_steps_in_which_it_runs() -> None:
    model, gradients = small("1x1-kxk", "1x1"), Gradients()
    wanted: dict[tuple[str, str], list[float]] = {}
    for step in range(3):
        model.zero_grad()
        model(torch.randn(2, 3, 6, 5, dtype=torch.float64)).square().sum().backward()
        if step == 1:
            for parameter in model[3].branches["1x1"].parameters():
                parameter.grad = None  # as of a path that wasn't drawn
        for site in ("0", "3"):
            block: Any = model.get_submodule(site)
            branches: Any = {name: list(branch.modules()) for name, branch in block.branches.items()}
            convs = {name: [each for each in own if isinstance(each, nn.Conv2d)] for name, own in branches.items()}
            convs["origin"] = [block.origin.conv]
            for name, own in convs.items():
                seen = [each.weight.grad.abs().flatten() for each in own if each.weight.grad is not None]
                found = torch.cat(seen or [torch.empty(0)])
                if len(found):
                    wanted.setdefault((site, name), []).append(float(found.mean()))
        gradients.add(model)
        again = Gradients()
        again.load_state_dict(json.loads(json.dumps(gradients.state_dict())))
        assert again.means() == gradients.means()
        gradients = again
    means = {(site, name): mean for site, own in gradients.means().items() for name, mean in own.items()}
    assert {len(each) for each in wanted.values()} == {2, 3}
    assert means == pytest.approx(
        {key: fmean(values) for key, values in wanted.items()}, rel=1e-6
    )  # sums are in float32
    gradients.clear()
    assert gradients.means() == {}


def test_gradients_of_a_scaled_loss_are_unscaled() -> None:
    model, scaled, plain = small("1x1"), Gradients(), Gradients()
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    loss = model(x).square().sum()
    loss.backward(retain_graph=True)
    plain.add(model)
    model.zero_grad()
    scaler.scale(loss).backward()
    scaled.add(model, scaler)
    assert scaled.means()["0"] == pytest.approx(plain.means()["0"], rel=1e-6)


EPOCHS = (
    Epoch(0, macs=1),
    Epoch(1, 1.0, gradients={"a": {"origin": 0.5, "1x1": 2.0}, "b": {"origin": 0.25, "1x1": 1.0, "1xk": 8.0}}),
    Epoch(2, 0.5, gradients={"a": {"origin": 0.5}}),
)


def test_the_chart_of_gradients_has_a_line_for_own_convs_and_for_each_branch() -> None:
    assert gradient_lines(EPOCHS) == {
        "own convs": (None, 0.375, 0.5),
        "1x1": (None, 1.5, None),
        "1xk": (None, 8.0, None),
    }
    picture = gradient_chart(EPOCHS)
    assert picture is not None
    for drawing in picture.drawings:
        assert [each.attrib["class"] for each in shapes(drawing, "curve")] == [f"curve run{n}" for n in (1, 2, 3)]
        told = [str(each[0].text).splitlines() for each in shapes(drawing, "hit")]
        assert told[0] == ["epoch 1", "own convs: 0.375", "1x1: 1.5", "1xk: 8"]
    assert gradient_chart((Epoch(0), Epoch(1, 1.0))) is None


def test_a_history_without_gradients_is_as_it_was() -> None:
    assert "gradients" not in History((Epoch(0),)).to_json()
    assert History.from_json(History(EPOCHS).to_json()) == History(EPOCHS)
    broken = History(EPOCHS).to_json().replace('"1xk": 8.0', '"1xk": "8"')
    with pytest.raises(InvalidInput, match="something else where a number has to be"):
        History.from_json(broken)


# --- branches ---------------------------------------------------------------------------------------------------------


def architecture(**sites: Sequence[float | None]) -> Architecture:
    """Sites with 1×k, k×1 and two dilated branches, whose importances are given. What is above a half is kept."""
    kinds = tuple(map(BranchSpec, ("1xk", "kx1", "dilated-1x2", "dilated-2x1")))
    codes = {site: "1" + "".join(str(int((value or 0) > 0.5)) for value in own) for site, own in sites.items()}
    return Architecture(
        {site: SiteCode("3x3", kinds, codes[site], importance=(None, *own)) for site, own in sites.items()}
    )


def test_a_difference_map_has_the_differences_of_what_a_search_learned() -> None:
    found = architecture(layer10=(0.75, 0.25, 0.5, 0.375), layer2=(0.25, None, 0.75, 0.5))
    epochs = (Epoch(1, blocks={"layer2": {"origin": 1.0, "1xk": 0.5, "kx1": 0.25}}),)
    picture = difference_map(found, epochs)
    assert picture is not None
    assert titles(picture) == [
        "layer2, 1xk − dilated-1x2: -0.5",
        "layer10, 1xk − dilated-1x2: +0.25",
        "layer10, kx1 − dilated-2x1: -0.125",
    ]
    rects = list(ElementTree.fromstring(picture.drawings[0]).iter("rect"))
    assert [each.attrib["class"] for each in rects] == ["less", "more", "less"]
    strengths = [float(each.attrib["fill-opacity"]) for each in rects]
    assert [each / strengths[0] for each in strengths] == pytest.approx([1, 0.5, 0.25], abs=0.02)


def test_without_a_search_gammas_are_compared() -> None:
    blocks: Mapping[str, Mapping[str, float | None]] = {
        "0": {"origin": 1.0, "1x1": 0.5, "1xk": 0.125, "identity": None},
        "3": {"origin": 1.0, "1x1": 0.5},
    }
    picture = difference_map(None, (Epoch(0, blocks={}), Epoch(1, blocks=blocks), Epoch(2)))
    assert picture is not None
    assert titles(picture) == ["0, 1x1 − 1xk: +0.375"]
    assert "mean |γ|" in picture.note
    assert differences({"0": {"1x1": 0.5}}) == {}
    assert difference_map(None, (Epoch(0),)) is None


def test_matrices_are_drawn_digit_by_digit() -> None:
    found = architecture(**{f"layer{place}": ((place * 3 % 8) / 8, place / 11, 1.0, 0.0) for place in range(11)})
    pictures = code_matrices(found)
    assert [picture.name for picture in pictures] == ["codes-1", "codes-2"]
    for picture, matrix in zip(pictures, found.matrices(8)):
        rects = list(ElementTree.fromstring(picture.drawings[0]).iter("rect"))
        digits = [digit for row in matrix for digit in row]
        assert [each.attrib["class"] == "more" for each in rects] == [bool(digit) for digit in digits]
        assert [title[-1] for title in titles(picture)] == [str(digit) for digit in digits]
        rows = {each.attrib["y"] for each in rects}
        assert (len(rows), len({each.attrib["x"] for each in rects})) == (len(matrix), 4)
    assert code_matrices(None) == []


# --- features ---------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5), nn.ReLU(inplace=True))
        self.last = nn.Sequential(
            nn.Conv2d(5, 4, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.last(self.stem(x))
        return output.mean((2, 3))


def expanded() -> Any:
    torch.manual_seed(0)
    net = Net().double()
    model = repfx.expand(net, "dbb", preserve=False)
    randomize_batch_norm(model, 0)
    return model.eval()


def areas(values: Tensor) -> Tensor:
    """Averages over at most 16 × 16 areas, one by one."""
    height, width = values.shape
    rows, columns = min(height, 16), min(width, 16)
    found = torch.empty(rows, columns, dtype=values.dtype)
    for row in range(rows):
        for column in range(columns):
            top, bottom = row * height // rows, math.ceil((row + 1) * height / rows)
            left, right = column * width // columns, math.ceil((column + 1) * width / columns)
            found[row, column] = values[top:bottom, left:right].mean()
    return found


def test_maps_are_mean_outputs_before_and_after_fusing() -> None:
    model = expanded()
    fused = repfx.fuse(model)
    x = torch.randn(1, 3, 20, 37, dtype=torch.float64)
    stem, last = maps_of(model, fused, x)
    with torch.no_grad():
        first = model.stem[:2](x)
        second = model.last[:2](first.relu())
    for maps, output in ((stem, first), (last, second)):
        assert maps.site.startswith("stem" if maps is stem else "last")
        wanted = areas(output.abs().mean(1)[0])
        assert maps.before.shape == (min(output.shape[2], 16), min(output.shape[3], 16))
        assert torch.allclose(maps.before, wanted, rtol=1e-9, atol=0)
        assert torch.allclose(maps.after, wanted, rtol=1e-9, atol=0)
        assert maps.error < 1e-9


def test_maps_show_where_a_fused_model_is_another() -> None:
    model = expanded()
    fused = repfx.fuse(model)
    convs = [module for module in fused.modules() if isinstance(module, nn.Conv2d)]
    with torch.no_grad():
        assert convs[-1].bias is not None
        convs[-1].bias += 0.5
    x = torch.randn(1, 3, 20, 37, dtype=torch.float64)
    stem, last = maps_of(model, fused, x)
    with torch.no_grad():
        most = float(model.last[:2](model.stem(x)).abs().max())
    assert stem.error < 1e-9
    assert last.error == pytest.approx(0.5 / most, rel=1e-9)


def test_a_drawing_of_maps_has_each_shade_at_its_place() -> None:
    model = expanded()
    picture = feature_maps(model, repfx.fuse(model), torch.randn(1, 3, 9, 14, dtype=torch.float64))
    assert picture is not None
    root = ElementTree.fromstring(picture.drawings[0])
    frames = list(root.iter("rect"))
    assert len(frames) == 4
    sides = [float(each.attrib["width"]) / float(each.attrib["height"]) for each in frames]
    assert sides == pytest.approx([14 / 9] * 2 + [7 / 5] * 2, rel=0.01)
    shades = [float(each.attrib["fill-opacity"]) for each in root.iter("path")]
    assert 1.0 in shades
    assert set(shades) <= {round(shade / 8, 2) for shade in range(1, 9)}
    with pytest.raises(InvalidInput, match=r"fails on an image \(2, 9, 14\)"):
        feature_maps(model, repfx.fuse(model), torch.randn(1, 2, 9, 14, dtype=torch.float64))
    assert feature_maps(nn.Linear(2, 2), nn.Linear(2, 2), torch.randn(1, 2)) is None


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_file_needs_no_page(tmp_path: Path) -> None:
    model = expanded()
    maps = feature_maps(model, repfx.fuse(model), torch.randn(1, 3, 9, 14, dtype=torch.float64))
    found = architecture(a=(0.75, 0.25, 0.5, 0.375))
    pictures = [maps, gradient_chart(EPOCHS), difference_map(found, ()), *code_matrices(found)]
    paths = write_pictures([picture for picture in pictures if picture is not None], tmp_path / "new")
    assert [path.name for path in paths] == ["feature-maps.svg", "gradients.svg", "branch-pairs.svg", "codes-1.svg"]
    root = ElementTree.fromstring((tmp_path / "new" / "gradients.svg").read_text())
    assert [each.text for each in root.findall(".//{*}text")][-3:] == ["own convs", "1x1", "1xk"]
    ruled = set(re.findall(r"\.([\w]+)", (TEMPLATES / "picture.css").read_text()))
    for path in paths:
        text = path.read_text()
        root = ElementTree.fromstring(text)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert "var(" not in text
        assert text.count("http") == 1
        assert float(root.attrib["width"]) > 50
        used = {name for each in root.iter() for name in each.get("class", "").split()}
        assert used - {"picture", "at-wide"} <= ruled


@pytest.mark.slow
def test_the_page_of_a_run_has_its_pictures(tmp_path: Path, repfx_command: Any) -> None:
    out, image = tmp_path / "run", tmp_path / "image.png"
    Image.fromarray((np.arange(20 * 30).reshape(20, 30) % 256).astype(np.uint8)).save(image)
    for folder, gradients in ((out, True), (tmp_path / "without", False)):
        run(
            Experiment(
                model=ModelReference(TINY),
                schedule={"name": "repnas", "spec": "ireps"},
                training=Recipe(epochs=3, gradients=gradients),
                image_size=8,
                out=folder,
            )
        )
    assert (out / CHECKPOINT).read_bytes() == (tmp_path / "without" / CHECKPOINT).read_bytes()
    history = RunFolder(out).history
    assert history is not None
    for epoch in history.epochs[1:]:
        assert {site: set(own) for site, own in epoch.gradients.items()}.keys() == epoch.blocks.keys()
        assert all(value > 0 for own in epoch.gradients.values() for value in own.values())
    told = repfx_command("report", out, "--trust", "--pictures", tmp_path / "svg", "--image", image, "--json")
    assert told.code == 0
    page = Page(Path(json.loads(told.out)["page"]))
    stands_alone(page)
    for title in (
        "Gradients of own convs and branches",
        "Differences of branch pairs",
        "Maps of features before and after fusing",
    ):
        assert title in page.words
    names = {"gradients.svg", "branch-pairs.svg", "feature-maps.svg", "codes-1.svg"}
    assert {path.name for path in (tmp_path / "svg").iterdir()} == names
    for arguments, message in (
        ([out, "--image", image], "its model can't be built again here"),
        ([out, "--trust", "--image", tmp_path / "none.png"], "can't be read as an image"),
        ([out, tmp_path / "without", "--image", image], "are for the page of one run"),
    ):
        refused = repfx_command("report", *arguments)
        assert (refused.code, refused.out) == (2, "")
        assert message in refused.err
