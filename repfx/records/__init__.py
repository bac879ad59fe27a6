"""What a model carries beside its tensors, and how it is written: notes, journal, report, provenance, files.

Imports `repfx.errors` and nothing else of repfx. Begin with `journal` (what was done to a structure) and `report` (what a verb did).
"""
