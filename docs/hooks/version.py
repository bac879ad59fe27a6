"""Name the version of repfx on each page; a hook of the docs' build."""

from __future__ import annotations

from mkdocs.config.defaults import MkDocsConfig


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the version into the foot of each page (called by MkDocs)."""
    import repfx

    config.copyright = f"repfx {repfx.__version__}"
    return config
