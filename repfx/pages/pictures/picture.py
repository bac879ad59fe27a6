"""`Picture`: SVG with a title and a note, for a page or a file of its own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from repfx.pages.rendering import TEMPLATES, svg
from repfx.records.target_file import staged

_NAMESPACE = "http://www.w3.org/2000/svg"


@dataclass(frozen=True)
class Picture:
    """One picture.

    Args:
        name: name of its file, without the ending.
        title: what it shows.
        note: how to read it.
        drawings: the picture as SVG without colours of its own: one, or one for each width of a page, the widest one last.
    """

    name: str
    title: str
    note: str
    drawings: tuple[str, ...]

    @property
    def inline(self) -> list[object]:
        """The drawings for a template, which puts them into a page as they are."""
        return [svg(drawing) for drawing in self.drawings]

    @property
    def file_text(self) -> str:
        """The text of an SVG file with the widest drawing, in the colours of a light page."""
        root = ElementTree.fromstring(self.drawings[-1])
        style = ElementTree.Element("style")
        style.text = (TEMPLATES / "picture.css").read_text(encoding="utf-8")
        root.insert(0, style)
        root.set("xmlns", _NAMESPACE)
        _, _, width, height = root.attrib["viewBox"].split()
        root.set("width", width)
        root.set("height", height)
        return ElementTree.tostring(root, encoding="unicode") + "\n"


def write_pictures(pictures: Iterable[Picture], folder: Path) -> list[Path]:
    """Write each picture as an SVG file into a folder, which is made if need be. Return the paths.

    Raises:
        InvalidInput: a file can't be written; OSError: the folder can't be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for picture in pictures:
        path = folder / f"{picture.name}.svg"
        with staged(path, ".svg") as (_, staging):
            staging.write_text(picture.file_text, encoding="utf-8")
        paths.append(path)
    return paths
