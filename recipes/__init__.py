"""What the papers trained, and how: their plain nets in `nets`, and one TOML file for each training.

`repfx list recipes` names them, `repfx train --recipe NAME` runs one.

Imports `repfx.errors` alone, so it needs no more than torch. Begin with `nets`.
"""
