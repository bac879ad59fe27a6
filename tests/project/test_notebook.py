"""The notebook of the docs is stored as it ran, runs again, and becomes a page."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from docs.hooks.notebook import as_markdown
from tests.project.test_docs import FENCE, LINK, ROOT

URL = re.compile(r"https?://\S+")
NOTEBOOK = ROOT / "docs" / "tutorial.ipynb"


@pytest.fixture
def notebook() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts_of(value: Any) -> Iterator[str]:
    """All text of a notebook, without pictures."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, child in value.items():
            yield from () if name == "image/png" else texts_of(child)
    elif isinstance(value, list):
        for child in value:
            yield from texts_of(child)


def test_it_is_stored_as_it_ran_from_top_to_bottom(notebook: Any) -> None:
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert not re.findall(r"(?<![\w.])/\w+/", URL.sub("", "\n".join(texts_of(notebook)))), "a path of some machine"
    assert NOTEBOOK.stat().st_size < 150_000


def test_its_links_resolve(notebook: Any) -> None:
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    links = LINK.findall(text)
    assert links
    assert not [link for link in links if "://" not in link and not (NOTEBOOK.parent / link).exists()]


def test_its_page_holds_all_of_it(notebook: Any) -> None:
    page = as_markdown(notebook)
    blocks = [block[2].rstrip("\n") for block in FENCE.finditer(page) if block[1] == "python"]
    assert blocks == [cell.source for cell in code_cells(notebook)]
    assert page.startswith("# ")
    assert page.count("data:image/png;base64,") == 3
    assert "outputs agree" in page


def test_its_page_loads_nothing_from_elsewhere(notebook: Any) -> None:
    page = as_markdown(notebook)
    assert "[Open in Colab](https://colab.research.google.com/github/" in page
    assert not re.findall(r"!\[[^\]]*\]\((?!data:)", page)


@pytest.mark.slow
def test_it_runs(notebook: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    assert (tmp_path / "digits.onnx").exists()
