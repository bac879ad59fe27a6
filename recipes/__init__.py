"""The trainings of the papers: their plain nets in `nets`, and one TOML file for each training, in a folder for each paper.

`repfx list recipes` lists these files, and `repfx train --recipe NAME` runs one.

Imports `errors` alone, so it needs no package but torch.
Begin with `nets`.
"""
