"""All code in the README and the docs runs, page by page, as a reader would type it; links resolve, and tables are right."""

from __future__ import annotations

import doctest
import json
import pkgutil
import re
import shlex
import sys
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import typer

import repfx
from docs.hooks.gallery import RECORDS
from docs.hooks.tables import TABLE, TABLES, with_tables
from repfx import passes
from repfx.blocks.branch import KINDS
from repfx.blocks.presets import PRESETS
from repfx.change.schedule import SCHEDULES
from repfx.commands import app
from repfx.data.dataset import DataSource
from repfx.records.journal import ACTIONS
from repfx.records.plain_values import flat, from_plain
from repfx.rewriting.rule import PASSES, RULES
from repfx.training.experiment import Experiment
from repfx.training.models import ModelReference
from repfx.training.named_recipes import shipped_recipes
from repfx.training.recipe import AuxiliaryHead, Distillation, QuantizationAware, Recipe
from repfx.training.recipe_file import read_recipe

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = [*PAGES, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
QUOTE = re.compile(r"^<!-- file: (\S+) -->\n\Z", re.MULTILINE)
LINK = re.compile(r"\[[^\]]+\]\(([^)\s]+)\)")
DOCTEST_FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS

REGISTRIES: dict[str, MutableMapping[str, Any]] = {
    "presets": PRESETS,
    "branches": KINDS,
    "passes": PASSES,
    "schedules": SCHEDULES,
    "recipes": shipped_recipes(),
}


@dataclass(frozen=True)
class Block:
    """One fenced block of a page: its language, its code, and the line on which the code starts.

    `file` is the file of the repository that the block shows, where the line before it is `<!-- file: … -->`.
    """

    language: str
    code: str
    line: int
    file: str | None = None


def blocks_of(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text = page.read_text()
    blocks = []
    for found in FENCE.finditer(text):
        before = text[: found.start()]
        quote = QUOTE.search(before)
        blocks.append(Block(found[1], found[2], before.count("\n") + 1, quote[1] if quote else None))
    return blocks


def code_of(page: Path) -> list[Block]:
    """The blocks of a page that run: all code but the files that the page shows."""
    return [block for block in blocks_of(page) if block.language in ("python", "pycon") and block.file is None]


def named(page: Path) -> str:
    """The id of a page's test."""
    return str(page.relative_to(ROOT))


# Pages whose code needs other people's tools, with what they import: `tests/tools/test_pages.py` runs them.
TOOL_PAGES = {
    "docs/how-to/monai.md": "monai",
    "docs/how-to/segmentation-models.md": "segmentation_models_pytorch",
    "docs/how-to/transformers.md": "transformers",
    "docs/how-to/ultralytics.md": "ultralytics",
    "docs/how-to/other-runtimes.md": "litert_torch",  # last, because JAX, which it imports, warns of processes that fork afterwards
}
PAGES_WITH_CODE = [page for page in PAGES if code_of(page) and named(page) not in TOOL_PAGES]
# These train or export several models of the sizes that their readers have.
SLOW_PAGES = [
    "README.md",
    "docs/how-to/deploy.md",
    "docs/how-to/detectors.md",
    "docs/how-to/lightning.md",
    "docs/how-to/quantization-aware-training.md",
    "docs/how-to/quantize.md",
    "docs/how-to/timm.md",
    "docs/how-to/torchvision.md",
    "docs/search.md",
    "docs/tutorial.md",
]


@pytest.fixture
def registries_restored() -> Iterator[None]:
    """Undo what a page registers: some show how to register something."""
    registries = [*REGISTRIES.values(), RULES]
    before = [dict(registry) for registry in registries]
    yield
    for registry, kept in zip(registries, before):
        registry.clear()
        registry.update(kept)


def run(page: Path, block: Block, namespace: dict[str, Any]) -> None:
    """Execute a `python` block, or compare what a `pycon` block shows with what comes out."""
    if block.language == "python":
        exec(compile("\n" * block.line + block.code, str(page), "exec"), namespace)
        return
    example = doctest.DocTestParser().get_doctest(block.code, namespace, named(page), str(page), block.line)
    runner = doctest.DebugRunner(optionflags=DOCTEST_FLAGS)
    try:
        runner.run(example, clear_globs=False)
    except doctest.DocTestFailure as failure:
        where = f"{named(page)}:{block.line + failure.example.lineno + 1}"
        pytest.fail(f"{where}: the page shows\n{failure.example.want}\nbut it is\n{failure.got}")
    namespace.update(example.globs)


@pytest.mark.usefixtures("registries_restored")
@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[pytest.mark.slow] * (named(page) in SLOW_PAGES)) for page in PAGES_WITH_CODE],
    ids=map(named, PAGES_WITH_CODE),
)
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    module = ModuleType(f"page of {page.stem}")  # dataclasses look up the module that they are defined in
    monkeypatch.setitem(sys.modules, module.__name__, module)
    namespace = vars(module)
    assert code_of(page)
    for block in code_of(page):
        run(page, block, namespace)


@pytest.mark.parametrize("page", TEXTS, ids=named)
def test_every_block_names_a_language_that_is_run_or_is_no_code(page: Path) -> None:
    assert {block.language for block in blocks_of(page)} <= {"python", "pycon", "sh", "text", "toml"}


@pytest.mark.parametrize("page", [page for page in PAGES if "```toml" in page.read_text()], ids=named)
def test_the_recipes_that_a_page_shows_can_be_read(page: Path, tmp_path: Path) -> None:
    for block in blocks_of(page):
        if block.language == "toml":
            (tmp_path / "shown.toml").write_text(block.code)
            assert from_plain(Experiment, read_recipe(tmp_path / "shown.toml")) != Experiment()


def test_a_file_that_a_page_shows_is_shown_as_it_is() -> None:
    shown = [block for page in PAGES for block in blocks_of(page) if block.file is not None]
    assert [block.file for block in shown] == ["passes/rules/fold_batch_norm.py"]
    for block in shown:
        assert block.code == (ROOT / str(block.file)).read_text()


@pytest.mark.parametrize("page", TEXTS, ids=named)
def test_links_to_files_resolve(page: Path) -> None:
    links = [link.split("#")[0] for link in LINK.findall(FENCE.sub("", page.read_text())) if "://" not in link]
    missing = [link for link in links if link and not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize(
    "page", [page for page in PAGES if "<!-- table: " in page.read_text()], ids=lambda page: page.stem
)
def test_the_tables_of_a_page_are_as_they_would_be_written_now(page: Path) -> None:
    """`python -m docs.hooks.tables` writes them."""
    assert page.read_text() == with_tables(page.read_text())


@pytest.mark.parametrize(("table", "registry"), REGISTRIES.items())
def test_a_generated_table_names_everything_registered(table: str, registry: dict[str, object]) -> None:
    assert registry
    named_there = re.findall(r"^\| `([^`]+)`", TABLES[table](), re.MULTILINE)
    assert sorted(named_there) == sorted(registry)


def test_the_table_of_keys_explains_all_that_a_recipe_can_hold() -> None:
    model = ModelReference("torchvision:resnet18", 10, {"width": 1})
    training = Recipe(
        optimizer_options={"eps": 1e-7},
        warm_up=0.0,
        distillation=Distillation(model, "t.pt"),
        auxiliary=AuxiliaryHead("layer3"),
        qat=QuantizationAware(1),
        channels_last=True,
    )
    whole = Experiment(
        model,
        DataSource(options={"label": "fine"}),
        "dbb",
        {"name": "repan"},
        training,
        Path("begin.pt"),
        image_size=32,
        baseline="plain",
    )
    keys = {re.sub(r"(options|schedule)\..*", r"\1", key) for key in flat(whole.values)}
    rows = re.findall(r"^\| `([\w.]+)` \| .* \| (.+) \|$", TABLES["recipe_keys"](), re.MULTILINE)
    assert sorted(name for name, _ in rows) == sorted(keys)


def test_every_table_that_a_page_asks_for_exists() -> None:
    asked = {name for page in PAGES for name in TABLE.findall(page.read_text())}
    assert asked == set(TABLES)


def test_the_gallery_has_the_record_of_each_command_that_it_shows() -> None:
    shown = re.findall(r"^repfx train .*$", (ROOT / "docs" / "gallery.md").read_text(), re.MULTILINE)
    records = json.loads(RECORDS.read_text())
    assert shown == [record["command"] for record in records.values()]
    assert [f"--out runs/{name}" for name in records] == [line[line.index("--out") :] for line in shown]


def is_public(value: object) -> bool:
    """Whether an attribute of `repfx` is one of its own verbs or values, and not a module or something of Python's."""
    return not isinstance(value, ModuleType) and getattr(value, "__module__", "").startswith("repfx")


def names_of_the_reference() -> list[str]:
    """Full names of everything that the reference page shows."""
    return re.findall(r"^::: (repfx\.[\w.]+)$", (ROOT / "docs" / "reference.md").read_text(), re.MULTILINE)


def test_the_reference_lists_every_public_name() -> None:
    public = {f"repfx.{name}" for name in dir(repfx) if is_public(getattr(repfx, name))}
    public |= {f"{cls.__module__}.{cls.__name__}" for cls in (*SCHEDULES.values(), *ACTIONS.values())}
    verbs = {name for name in PASSES.keys() - RULES.keys() if f"repfx.{name}" not in public}
    public |= {f"{getattr(passes, name).__module__}.{name}" for name in verbs} | {
        "repfx.errors",
        "repfx.testing",
        "repfx.testing.strategies",
    }
    listed = names_of_the_reference()
    assert len(listed) == len(set(listed))
    assert not public - set(listed)


def test_what_the_reference_lists_exists_and_says_what_it_is() -> None:
    silent = [name for name in names_of_the_reference() if not (pkgutil.resolve_name(name).__doc__ or "").strip()]
    assert not silent


def shell_commands() -> list[str]:
    """Every line of a page's `sh` blocks that calls repfx, without any command before `&&`."""
    lines = [
        line
        for page in PAGES
        for block in blocks_of(page)
        if block.language == "sh"
        for line in block.code.splitlines()
    ]
    return sorted({line.rpartition("&& ")[2] for line in lines if line.rpartition("&& ")[2].startswith("repfx ")})


@pytest.mark.parametrize("line", shell_commands())
def test_the_commands_that_pages_show_exist_with_their_options(line: str) -> None:
    group: Any = typer.main.get_command(app)
    name, *arguments = shlex.split(line)[1:]
    context = group.commands[name].make_context(name, arguments)
    assert context.params


def test_the_page_of_the_command_line_shows_every_command() -> None:
    group: Any = typer.main.get_command(app)
    headings = re.findall(r"^## `repfx (\w+)`$", (ROOT / "docs" / "command-line.md").read_text(), re.MULTILINE)
    assert sorted(headings) == sorted(group.commands)


@pytest.mark.parametrize("marker", ["main-job", "tests"])
def test_the_readme_marks_the_commands_that_ci_runs(marker: str) -> None:
    (block,) = re.findall(
        rf"^<!-- {marker} -->\n```sh\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL
    )
    assert f"run_readme {marker}\n" in (ROOT / ".ci" / "run").read_text()
    assert block.startswith("pip install ")
