"""The built site: it loads nothing from elsewhere, and it can be read and searched from a folder, without a server."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

import repfx

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ELSEWHERE = re.compile(r"(?:[a-z]+:)?//")


class Links(HTMLParser):
    """The addresses that a page loads, and those that it links to."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.linked: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.loaded += [str(found[name]) for name in ("src", "srcset", "data", "poster") if name in found]
        if "href" in found:
            (self.linked if tag == "a" else self.loaded).append(str(found["href"]))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})
    return out


def pages(site: Path) -> Iterator[Path]:
    found = sorted(
        page for page in site.rglob("*.html") if page.name != "404.html"
    )  # a server's answer, so it has absolute links
    assert len(found) > 40
    yield from found


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    outside = {link for page in pages(site) for link in Links(page).loaded if ELSEWHERE.match(link)}
    styles = "".join(style.read_text(encoding="utf-8") for style in site.rglob("*.css"))
    outside |= {link for link in re.findall(r"(?:url\(|@import)\s*[\"']?([^\"')]+)", styles) if ELSEWHERE.match(link)}
    assert not outside


def test_every_link_inside_the_site_leads_to_a_file(site: Path) -> None:
    for page in pages(site):
        links = Links(page)
        inside = {
            link.partition("#")[0].partition("?")[0]
            for link in links.loaded + links.linked
            if not re.match(r"[a-z]+:", link)
        }
        assert not [link for link in inside if link and not (page.parent / link).is_file()], page


def test_every_page_names_the_version(site: Path) -> None:
    assert all(f"repfx {repfx.__version__}" in page.read_text(encoding="utf-8") for page in pages(site))


def test_the_search_has_its_index_and_its_worker_without_a_server(site: Path) -> None:
    start, index = (site / "search" / "search_index.js").read_text(encoding="utf-8").split(" = ", 1)
    assert start == "var __index"
    found = {document["location"].partition("#")[0] for document in json.loads(index)["docs"]}
    assert {"", "index.html"} & found
    assert found - {""} <= {str(page.relative_to(site)) for page in pages(site)}
    for page in pages(site):
        assert [link for link in Links(page).loaded if link.endswith("offline/iframe-worker.js")], page


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_finds_a_page_from_the_folder_alone(site: Path, tmp_path: Path) -> None:
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path}",
        "--host-resolver-rules=MAP * ~NOTFOUND",
    ]
    options += ["--virtual-time-budget=20000", "--dump-dom", f"{(site / 'index.html').as_uri()}?q=annealing"]
    shown = subprocess.run([str(CHROMIUM), *options], capture_output=True, text=True, timeout=120).stdout
    results = re.findall(r'<a href="([^"]+)" class="md-search-result__link"', shown)
    assert any(re.search(r"papers/repan\.html", link) for link in results)
