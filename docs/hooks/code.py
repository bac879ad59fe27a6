"""Keep names in code, such as `--learning-rate`, on one line; a hook of the docs' build."""

from __future__ import annotations

import re
from typing import Any

COMMANDS = re.compile(r'<div class="language-sh highlight">.*?</div>', re.DOTALL)
OPTION = re.compile(r"(?<![\w-])--[\w-]+")
INLINE = re.compile(r"(?<!<span></span>)<code>([^<\n]*)</code>")
HYPHENATED = re.compile(r"(?<!\S)[^\s/-]*-[^\s/]{1,24}(?!\S)")


def on_page_content(html: str, **_: Any) -> str:
    """Mark what may not be broken at its hyphens (called by MkDocs for every page).

    >>> on_page_content("<code>repfx fuse net --also pt2</code>")
    '<code>repfx fuse net <span class="whole">--also</span> pt2</code>'
    """
    html = INLINE.sub(lambda found: f"<code>{HYPHENATED.sub(_whole, found[1])}</code>", html)
    return COMMANDS.sub(lambda found: OPTION.sub(_whole, found[0]), html)


def _whole(name: re.Match[str]) -> str:
    return f'<span class="whole">{name[0]}</span>'
