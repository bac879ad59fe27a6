"""The commands of `repfx`, one file each. A command parses its arguments, calls the library and prints the result.

Imports all wings above it (order: docs/architecture.md) and the packages of the `cli` extra.
Begin with `app`.
"""

from repfx.commands import (
    completion,
    evaluate,
    fuse,
    inspect,
    list_names,
    predict,
    profile,
    recipe,
    report,
    sweep,
    train,
)
from repfx.commands.app import app as app
