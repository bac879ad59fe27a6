"""`Picture`: SVG with a title and a note, for a page or a file of its own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from repfx.pages.chart import add_line, add_text
from repfx.pages.rendering import TEMPLATES, svg
from repfx.records.target_file import staged

_NAMESPACE = "http://www.w3.org/2000/svg"
_MARGIN, _ROW, _LINE, _LETTER = 16, 20, 28, 7


@dataclass(frozen=True)
class Key:
    """The name of a curve, and the CSS classes by which it is drawn."""

    name: str
    style: str


@dataclass(frozen=True)
class Picture:
    """One picture.

    Args:
        name: name of its file, without the ending.
        title: what it shows.
        note: how to read it.
        drawings: the picture as SVG without colours of its own: one, or one for each width of a page, the widest one last.
        keys: the curves of the picture. A page lists them beside it, and a file has them beneath.
    """

    name: str
    title: str
    note: str
    drawings: tuple[str, ...]
    keys: tuple[Key, ...] = ()

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
        width, height = map(float, root.attrib["viewBox"].split()[2:])
        for name, size in (("width", width), ("height", height + _add_keys(root, self.keys, width, height))):
            root.set(name, f"{size:g}")
        root.set("viewBox", f"0 0 {root.attrib['width']} {root.attrib['height']}")
        return ElementTree.tostring(root, encoding="unicode") + "\n"


def _add_keys(svg: ElementTree.Element, keys: Sequence[Key], width: float, top: float) -> float:
    """Add the keys beneath a picture, in as many rows as they need. Return the height of the rows."""
    left, bottom = float(_MARGIN), top + _ROW / 2
    for key in keys:
        room = _LINE + 6 + _LETTER * len(key.name) + _MARGIN
        if left > _MARGIN and left + room > width:
            left, bottom = float(_MARGIN), bottom + _ROW
        add_line(svg, f"curve {key.style}", left, bottom - 4, left + _LINE, bottom - 4)
        add_text(svg, "note", left + _LINE + 6, bottom, key.name)
        left += room
    return bottom + _ROW / 2 - top if keys else 0.0


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
