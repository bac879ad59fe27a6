"""Searches for the branches that help: the space of gated paths, candidates scored as plain nets, and a search's part in a run.

Imports `change` and the wings above it (order: docs/architecture.md).
Begin with `base`.
"""
