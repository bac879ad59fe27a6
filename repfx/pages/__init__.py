"""HTML pages about a training run and about a model: one file each, which needs nothing else and no network.

Imports everything above it, and Jinja2 from the `report` extra. Begin with `run_page`.
"""
