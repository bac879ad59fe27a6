"""The commands of `repfx`, one file each. A command parses its arguments, calls the library and prints the result.

Imports all wings above it (order: docs/architecture.md) and the packages of the `cli` extra.
Begin with `app`, which has the list of commands.
"""

from repfx.commands.app import app as app
