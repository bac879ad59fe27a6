"""`write_page`: fill a template and write it as one HTML file."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import repfx
from repfx.errors import InvalidInput
from repfx.pages.changes import when
from repfx.records.number_text import duration, engineering, grouped, percent, plural
from repfx.records.target_file import staged

TEMPLATES = Path(__file__).with_name("templates")


def write_page(template: str, path: str | os.PathLike[str], **shown: Any) -> None:
    """Fill a template and write the page. The file appears whole or not at all. All text is escaped.

    Args:
        template: file name of the template.
        path: the file to write; must end in ``.html``.
        shown: values for the template, by the names that it uses.

    Raises:
        InvalidInput: jinja2 is missing, or the path can't be written.
    """
    page = _environment().get_template(template).render(shown, version=repfx.__version__)
    with staged(path, ".html") as (_, staging):
        staging.write_text(page, encoding="utf-8")


def svg(text: str) -> Any:
    """Mark SVG as safe, so that a template puts it into the page without escaping."""
    _jinja2()
    from markupsafe import Markup

    return Markup(text)


@cache
def _environment() -> Any:
    jinja2 = _jinja2()
    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {"engineering": engineering, "percent": percent, "duration": duration, "grouped": grouped}
    found.globals |= {"plural": plural, "when": when}
    return found


def _jinja2() -> Any:
    try:
        import jinja2
    except ImportError as error:
        raise InvalidInput("a page needs jinja2, which is missing: pip install 'repfx[report]'.") from error
    return jinja2
