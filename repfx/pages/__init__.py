"""HTML pages about a training run and about a model. Each page is one file that loads no other file and needs no network.

Imports all wings above it (order: docs/architecture.md) and Jinja2 from the `report` extra.
Begin with `run_page`.
"""
