"""Data that a model carries beside its tensors, and how it is written to files: notes, journal, report, provenance.

Imports `errors` and nothing else of repfx.
Begin with `journal` (what was done to a structure) and `report` (what a verb did).
"""
