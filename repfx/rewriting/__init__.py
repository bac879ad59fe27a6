"""Changing graphs: the view, matches, patterns, guards and rules, and the editor and pipeline that apply them.

Imports `graphs` and the wings above it (order: docs/architecture.md).
Begin with `rule`. Each rule is one file in `passes/`.
"""
