"""The HTML pages: well-formed, self-contained, and true to the files that they are made from."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import repfx
from repfx.blocks.spec import BranchSpec
from repfx.errors import InvalidInput
from repfx.pages.changes import changes_of, deeds
from repfx.pages.columns import columns_of
from repfx.pages.comparison_page import write_comparison_page
from repfx.pages.diagram import Chip, Lane, parts_of, units_of
from repfx.pages.model_page import write_model_page
from repfx.pages.run_page import write_run_page
from repfx.pages.structure_map import structure_map
from repfx.passes.drop import Drop
from repfx.passes.expand import Expand
from repfx.passes.fuse import Fuse
from repfx.records.journal import Action
from repfx.records.number_text import percent, short
from repfx.training.run_folder import ARCHITECTURE, CHECKPOINT, HISTORY, METRICS, RECIPE, REPORT, STRUCTURE, RunFolder
from repfx.training.runs.history import Epoch, History
from tests import tiny
from tests.recorded_run import long_history, record

VOID = {"meta", "br", "wbr", "input", "hr", "img", "link"}


class Page(HTMLParser):
    """A page, parsed strictly: unbalanced tags are an error."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.words: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)
        if {"td", "th"} & set(self.open[-6:]) and self.rows:
            self.rows[-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def row(self, head: str, length: int | None = None) -> list[str]:
        """The cells of the only row that begins with `head`, in tables of `length` columns."""
        (found,) = [row for row in self.rows if row[0].strip() == head and length in (None, len(row))]
        return [cell.strip() for cell in found]

    def titles(self) -> list[str]:
        return [str(attributes["title"]) for _, attributes in self.elements if "title" in attributes]


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run of DyRep, in which branches grow."""
    out = tmp_path_factory.mktemp("runs") / "grown"
    record(out, "dyrep", 3, interval=1, until=3, depth=1)
    (out / RECIPE).write_text('epochs = 3\nnote = "</pre><script>alert(1)</script>"\n')
    return out


@pytest.fixture
def page(grown: Path, tmp_path: Path) -> Page:
    return Page(write_run_page(RunFolder(grown), tmp_path / "page.html", trust=True))


def stands_alone(page: Page) -> None:
    """Check that the page loads nothing, runs nothing and links only to places inside itself."""
    text = page.path.read_text(encoding="utf-8")
    tags = Counter(tag for tag, _ in page.elements)
    assert not tags.keys() & {"script", "link", "img", "iframe", "object", "base"}
    assert not re.search(r"https?:|//|@import|url\(", text)
    ids = [str(attributes["id"]) for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {attributes["href"] for _, attributes in page.elements if "href" in attributes} <= {f"#{id_}" for id_ in ids}
    assert "default-src 'none'" in text


# --- A run -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_s_page_is_one_whole_file(page: Page) -> None:
    stands_alone(page)
    assert {"Result", "Training", "Structure", "Cost of training", "Before and after fusing"} <= set(page.words)


def test_the_numbers_of_a_run_s_page_are_those_of_its_files(page: Page, grown: Path) -> None:
    metrics = json.loads((grown / METRICS).read_text())
    fused = page.row("fused")
    shares = [percent(metrics[name]["fused"]) for name in ("accuracy", "top5")]
    assert fused[1:5] == [*shares, "0", f"{metrics['max_error']['fused']:.1e}"]
    assert {f"{cost['macs']:,}".replace(",", "\u202f") for cost in metrics["cost"].values()} <= set(page.titles())
    history = History.from_json((grown / HISTORY).read_text())
    assert len(history.epochs) == 4
    for epoch in history.epochs:
        cells = page.row(str(epoch.epoch), 8)
        assert cells[1:3] == [
            "–" if epoch.loss is None else f"{epoch.loss:.4g}",
            "–" if epoch.accuracy is None else percent(epoch.accuracy),
        ]
        assert cells[-1] == f"{epoch.macs:,}".replace(",", "\u202f")


def test_the_map_has_each_gamma_of_the_history(grown: Path) -> None:
    epochs = History.from_json((grown / HISTORY).read_text()).epochs
    found = structure_map(epochs)
    shown = {
        (site.path, row.name, column.last.epoch): cell.text
        for site in found.sites
        for row in site.rows
        for column, cell in zip(found.columns, row.cells)
        if cell.text
    }
    told = {
        (site, name, epoch.epoch): short(gamma)
        for epoch in epochs
        for site, gammas in epoch.blocks.items()
        for name, gamma in gammas.items()
        if gamma is not None
    }
    assert shown == told
    assert told


def test_text_from_files_is_text_on_the_page(grown: Path, tmp_path: Path) -> None:
    run = tmp_path / "<b>&run"
    shutil.copytree(grown, run)
    structure = (run / STRUCTURE).read_text().replace('"repvgg"', json.dumps("<script>x</script>"))
    (run / STRUCTURE).write_text(structure)
    page = Page(write_run_page(RunFolder(run), trust=True))
    stands_alone(page)
    assert page.path == run / REPORT
    assert "<b>&run" in page.words
    assert "</pre><script>alert(1)</script>" in page.text
    assert "<script>x</script>" in page.text


@pytest.mark.parametrize(
    ("left", "there", "missing"),
    [
        ({HISTORY}, {"not finished", "Structure", "Training"}, {"Result", "Recipe"}),
        ({STRUCTURE, CHECKPOINT}, {"not finished", "layer"}, {"Result", "Training", "Structure", "Cost of training"}),
        ({METRICS}, {"Result", "Training"}, {"not finished", "Structure", "Cost of training"}),
        ({HISTORY, METRICS}, {"Result", "Structure"}, {"not finished"}),
    ],
)
def test_what_a_run_has_not_left_its_page_leaves_out(
    left: set[str], there: set[str], missing: set[str], grown: Path, tmp_path: Path
) -> None:
    for name in left:
        shutil.copy(grown / name, tmp_path / name)
    page = Page(write_run_page(RunFolder(tmp_path), trust=True))
    stands_alone(page)
    assert not missing & {word.strip() for word in page.words}
    assert there - {"layer"} <= {word.strip() for word in page.words}
    assert ("1 conv" in page.text) == ("layer" in there)
    assert ("has left no trained model yet" in page.text) == ("layer" not in there)


def test_files_of_a_real_run_are_compared(grown: Path, tmp_path: Path) -> None:
    done, begun, other = (shutil.copytree(grown, tmp_path / name) for name in ("done", "begun", "other"))
    (begun / METRICS).unlink()
    (other / RECIPE).write_text((grown / RECIPE).read_text().replace("3", "7"))
    page = Page(write_comparison_page([done, begun, other], tmp_path / "page.html"))
    stands_alone(page)
    accuracy = json.loads((grown / METRICS).read_text())["accuracy"]
    rows = {row[0].split()[0]: row[1:3] for row in page.rows if " epochs" in row[0]}
    assert rows["done"] == rows["other"] == [percent(accuracy[form]) for form in ("expanded", "fused")]
    assert rows["begun"] == [percent(accuracy["expanded"]), "–"]
    assert page.row("epochs") == ["epochs", "3", "3", "7"]
    assert page.row("0, 3") == ["0, 3", "1x1", "1x1", "1x1"]


def test_a_run_that_began_expanded_and_stays_so(tmp_path: Path) -> None:
    blocks = {"0": {"origin": 1.0, "1x1": None}}
    epochs = tuple(Epoch(number, None if not number else 0.5, blocks=blocks) for number in range(3))
    (tmp_path / HISTORY).write_text(History(epochs).to_json())
    page = Page(write_run_page(RunFolder(tmp_path), trust=True))
    assert "What was done" not in page.words
    assert "epoch 2: no γ" in page.titles()


@pytest.mark.slow
def test_what_a_search_found_is_on_the_page(tmp_path: Path) -> None:
    record(tmp_path / "run", "repnas", 2, budget=3, warm_up=0)
    page = Page(write_run_page(RunFolder(tmp_path / "run"), trust=True))
    stands_alone(page)
    sites = json.loads((tmp_path / "run" / ARCHITECTURE).read_text())["sites"]
    kept = sum(code["code"].count("1") for code in sites.values())
    assert kept == 3
    assert f"{kept} of {sum(len(code['code']) for code in sites.values())} paths are kept" in page.text
    assert page.text.count("●") == kept + 1  # and once where it is explained


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (METRICS, "[1]", "holds no metrics"),
        (METRICS, '{"accuracy": {"fused": "high"}}', "none that `repfx train` wrote"),
        (HISTORY, '{"format": 9, "epochs": []}', "has format 9"),
        (
            HISTORY,
            '{"format": 1, "epochs": [{"epoch": 0, "loss": "low"}]}',
            "has something else where a number has to be",
        ),
        (HISTORY, '{"format": 1, "epochs": [{"epoch": 0, "blocks": 3}]}', "no history"),
        ("notes.txt", "", "holds no training run"),
    ],
)
def test_a_malformed_run_is_refused_and_an_older_page_stays(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    (tmp_path / REPORT).write_text("older")
    with pytest.raises(InvalidInput, match=re.escape(message)):
        write_run_page(RunFolder(tmp_path), trust=True)
    assert (tmp_path / REPORT).read_text() == "older"


# --- What was changed when ------------------------------------------------------------------------------------------


def branches(*kinds: str) -> tuple[BranchSpec, ...]:
    return tuple(map(BranchSpec, kinds))


def epoch_with(*actions: Action) -> Epoch:
    """The third epoch of a run in which a branch of a block contains another block."""
    blocks = {"0": {"origin": 1.0, "1x1-kxk": 0.5}, "0.1x1-kxk.conv2": {"origin": 0.5, "1xk": 0.1}}
    return Epoch(3, actions=actions, blocks=blocks)


def test_a_branch_that_leaves_takes_the_blocks_in_it_along() -> None:
    found = changes_of(epoch_with(Drop("0", "1x1-kxk")))
    assert found.dropped == {"0": ("1x1-kxk",), "0.1x1-kxk.conv2": ("1xk",)}
    assert not found.grown


def test_a_fold_drops_all_branches_and_what_grows_anew_is_both() -> None:
    first, second = branches("1x1-kxk", "1x1-kxk")
    actions = Fuse("0"), Expand("0", (first, replace(second, name="1x1-kxk-2")))
    found = changes_of(epoch_with(*actions))
    assert found.dropped == {"0": ("1x1-kxk",), "0.1x1-kxk.conv2": ("1xk",)}
    assert found.grown == {"0": ("1x1-kxk", "1x1-kxk-2")}
    assert [(deed.what, deed.sites) for deed in deeds(found)] == [("fuse", ("0",)), ("grown", ("0",))]
    signs = {row.name: row.cells[0].sign for row in structure_map([epoch_with(*actions)]).sites[0].rows}
    assert signs == {"origin": "", "1x1-kxk": "↻", "1x1-kxk-2": "+"}


def test_where_epochs_share_a_column_no_change_is_lost() -> None:
    actions = {7: (Expand("0", branches("1x1")),), 9: (Drop("0", "1x1"),)}
    blocks = {n: {"0": {"origin": 1.0, "1x1": gamma}} for n, gamma in ((8, 0.5), (9, 0.25))}
    epochs = [Epoch(n, actions=actions.get(n, ()), blocks=blocks.get(n, {})) for n in range(101)]
    found = structure_map(epochs)
    assert found.step == 5
    (site,) = found.sites
    (branch,) = [row for row in site.rows if row.name == "1x1"]
    (cell,) = [cell for cell in branch.cells if cell.text or cell.sign]
    assert cell.title == "epoch 6–10: mean |γ| 0.25, dropped after epoch 9, grown after epoch 7"
    assert site.story == "grew 1x1 after epoch 7; lost 1x1 after epoch 9"
    assert sum(len(column.epochs) for column in columns_of(epochs, 25)) == 101


# --- A model, before and after --------------------------------------------------------------------------------------


class TwoPaths(nn.Module):
    """A sum of convs that repfx did not make."""

    def __init__(self) -> None:
        super().__init__()
        self.large = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
        self.small = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(self.large(x), self.small(x))


def texts(lanes: tuple[Lane, ...]) -> dict[str, list[str]]:
    return {lane.name: [chip.text for chip in lane.chips] for lane in lanes}


def chips(lanes: tuple[Lane, ...]) -> list[Chip]:
    """All chips of the lanes, also those of blocks inside blocks."""
    own = [chip for lane in lanes for chip in lane.chips]
    return own + [inner for chip in own for inner in chips(chip.lanes)]


def test_a_foreign_sum_is_drawn_as_lanes_that_become_one_conv() -> None:
    model = TwoPaths().eval()
    (unit,) = units_of(model, repfx.fuse(model)).values()
    assert texts(unit.lanes) == {"large": ["conv 3×3 4→4", "BN"], "small": ["conv 1×1 4→4", "BN"]}
    assert unit.is_sum
    assert unit.result == Chip("conv 3×3 4→4", "conv")


@pytest.mark.parametrize("spec", ["dyrep", "dilated", "qarepvgg", "mobileone"])
def test_each_conv_of_a_training_form_is_drawn_once(spec: str) -> None:
    model = repfx.expand(tiny.net(), spec).eval()
    if spec == "dyrep":
        model = repfx.expand(model, {"3.1x1-kxk.conv2": "acb"})
    fused = repfx.fuse(model)
    drawn = [chip for part in parts_of(model, fused) for group in part.groups for chip in chips(group.unit.lanes)]
    assert sum(chip.sort == "conv" for chip in drawn) == sum(
        isinstance(module, nn.Conv2d) for module in model.modules()
    )
    assert sum(chip.sort == "norm" for chip in drawn) == sum(
        isinstance(module, nn.BatchNorm2d) for module in model.modules()
    )
    assert sum(part.size for part in parts_of(model, fused)) == 2


def test_the_page_of_a_model_says_what_it_becomes_and_that_it_is_equal(tmp_path: Path) -> None:
    model = tiny.net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    check = write_model_page(model, tmp_path / "m.html", torch.randn(2, 1, 9, 7), name="<tiny>", spec={"3": "acb"})
    page = Page(tmp_path / "m.html")
    stands_alone(page)
    assert check.report is not None
    assert check.report.equivalent
    assert f"{check.report.max_error:.1e}" in page.text
    assert page.row("training form")[1:3] == ["4", "4"]
    assert page.row("fused")[1:3] == ["2", "0"]
    assert page.row("3")[1:] == ["3×3 8→16 stride 2×2", "1xk, kx1"]
    assert "no pattern of the spec names it" in page.row("0")[2]
    assert "<tiny>" in page.words
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())


def test_the_page_of_a_model_says_where_the_time_goes_if_asked(tmp_path: Path) -> None:
    model = repfx.expand(tiny.net(), "acb")
    write_model_page(model, tmp_path / "m.html", torch.randn(2, 1, 9, 7), name="tiny", timed=True)
    page = Page(tmp_path / "m.html")
    stands_alone(page)
    layers = {path: page.row(path) for path in ("0 Conv2d 3×3, 1 → 8", "3 Conv2d 3×3, 8 → 16")}
    for row in layers.values():
        assert int(row[1]) > 3
        assert all(time.endswith(" ms") for time in row[2:4])
    assert "times as quick" in page.text
    write_model_page(model, tmp_path / "m.html", torch.randn(2, 1, 9, 7), name="tiny")
    assert "times as quick" not in Page(tmp_path / "m.html").text


def test_a_model_that_can_not_run_on_the_input_gets_its_page_all_the_same(tmp_path: Path) -> None:
    model = tiny.net()
    check = write_model_page(model, tmp_path / "m.html", torch.randn(2, 3, 9, 7), name="tiny")
    assert check.report is None
    gamma = model.state_dict()["1.weight"]
    assert torch.equal(gamma, torch.ones_like(gamma)), "the user's BatchNorms got random numbers"
    page = Page(tmp_path / "m.html")
    assert "Not compared" in page.text
    assert page.row("model")[-1] == "–"


# --- Size, and how it fits ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_long_run_of_a_large_net_gives_a_page_of_modest_size(tmp_path: Path) -> None:
    history = long_history(sites=100, epochs=600)
    (tmp_path / HISTORY).write_text(history.to_json())
    page = Page(write_run_page(RunFolder(tmp_path), trust=True))
    stands_alone(page)
    assert page.path.stat().st_size < 3_000_000
    assert "a column is 25 epochs" in page.text
    grown = sum(len(names) for epoch in history.epochs for names in changes_of(epoch).grown.values())
    assert grown == 600
    labels = [str(attributes.get("aria-label", "")) for tag, attributes in page.elements if tag == "summary"]
    assert sum("grew 1x1, 1x1-kxk" in label for label in labels) == 100


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [400, 1280])
def test_no_page_scrolls_sideways(width: int, grown: Path, tmp_path: Path) -> None:
    """Pages of a short run, a long run and a model fit the width, even with everything unfolded."""
    (tmp_path / HISTORY).write_text(long_history(sites=12, epochs=90).to_json())
    pages = [
        write_run_page(RunFolder(grown), tmp_path / "grown.html", trust=True),
        write_run_page(RunFolder(tmp_path), trust=True),
    ]
    write_model_page(tiny.net(), tmp_path / "m.html", torch.randn(2, 1, 8, 8), name="long." * 40, spec="dyrep")
    pages.append(write_comparison_page([grown, tmp_path], tmp_path / "comparison.html"))
    for path in (*pages, tmp_path / "m.html"):
        fits(path, width, tmp_path)


def fits(path: Path, width: int, scratch: Path) -> None:
    """Check that a page isn't wider than a frame of this width, with everything unfolded."""
    frame = f'<iframe width="{width}" height="800" srcdoc="{html.escape(path.read_text())}"></iframe>'
    wrapper = scratch / "wrapper.html"
    wrapper.write_text(f"<!doctype html><meta charset=utf-8>{frame}<pre></pre><script>{_MEASURE}</script>")
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={scratch / 'profile'}"]
    command += ["--virtual-time-budget=5000", "--dump-dom", wrapper.as_uri()]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120)
    (measured,) = re.findall(r"<pre>(\d+ \d+ \d+)</pre>", found.stdout)
    room, needed, height = map(int, measured.split())
    assert height > 1000, "the page wasn't drawn"
    assert width - 20 <= room <= width
    assert needed <= room, f"{path.name} needs {needed} px where there are {room}"


_MEASURE = """
const frame = document.querySelector("iframe");
frame.onload = () => {
  const page = frame.contentDocument;
  for (const details of page.querySelectorAll("details")) details.open = true;
  const root = page.documentElement;
  document.querySelector("pre").textContent = [root.clientWidth, root.scrollWidth, root.scrollHeight].join(" ");
};
"""
