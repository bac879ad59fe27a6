"""The pages about other people's tools: their code runs as a reader would type it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.project.test_docs import ROOT, TOOL_PAGES, code_of, run

pytestmark = pytest.mark.tools


@pytest.mark.parametrize("name", TOOL_PAGES)
def test_the_code_of_a_page_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(TOOL_PAGES[name])
    page, threads = ROOT / name, torch.get_num_threads()
    monkeypatch.chdir(tmp_path)
    module = ModuleType(f"page_of_{page.stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # a class that is pickled is looked up there
    for block in code_of(page):
        run(page, block, vars(module))
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
