"""Make the tutorial's notebook a page of the site; a hook of the docs' build.

A notebook is Markdown, code and the code's output, so it becomes a page like all others: its links are checked, its code looks as it
does elsewhere, and the page loads nothing from other sites. A test runs the notebook; the build doesn't.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

NOTEBOOK = "tutorial.ipynb"
REMOTE_IMAGE = re.compile(r"!\[([^\]]*)\]\(https?://[^)]+\)")
FOLDER = "notebook"  # for the page and the file to download; `tutorial` is the folder of tutorial.md


class NotebookPage(File):
    """A notebook that is shown as a page."""

    def is_documentation_page(self) -> bool:
        return True


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Replace the notebook by a page and by a copy of the notebook for download (called by MkDocs)."""
    path = Path(config.docs_dir) / NOTEBOOK
    page = NotebookPage(
        NOTEBOOK, config.docs_dir, config.site_dir, config.use_directory_urls, dest_uri=f"{FOLDER}/index.html"
    )
    title, rest = as_markdown(json.loads(path.read_text(encoding="utf-8"))).split("\n", 1)
    page.content_string = f"{title}\n\n[Download the notebook]({FOLDER}/{NOTEBOOK})\n{rest}"
    files.remove(files.src_uris[NOTEBOOK])
    files.append(page)
    files.append(File.generated(config, f"{FOLDER}/{NOTEBOOK}", content=path.read_bytes()))
    return files


def as_markdown(notebook: dict[str, Any]) -> str:
    """A notebook's cells in order, each code cell with its outputs below.

    >>> cell = {"cell_type": "code", "source": ["1 + 1"], "outputs": [{"output_type": "execute_result", "data": {"text/plain": ["2"]}}]}
    >>> print(as_markdown({"cells": [cell]}))
    ```python
    1 + 1
    ```
    <BLANKLINE>
    ```text
    2
    ```
    """
    parts = []
    for cell in notebook["cells"]:
        source = REMOTE_IMAGE.sub(r"\1", "".join(cell["source"]))  # a badge becomes its text
        parts.append(source if cell["cell_type"] == "markdown" else _fenced(source, "python"))
        parts += map(_output, cell.get("outputs", ()))
    return "\n\n".join(filter(None, parts))


def _output(output: dict[str, Any]) -> str:
    data = output.get("data", {})
    if "image/png" in data:
        return f"![What this cell draws](data:image/png;base64,{''.join(data['image/png'].split())})"
    text = "".join(output.get("text", data.get("text/plain", ())))
    return _fenced(text.rstrip(), "text") if text else ""


def _fenced(text: str, language: str) -> str:
    return f"```{language}\n{text}\n```"
