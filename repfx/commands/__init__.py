"""The commands of `repfx`, one file each: they parse, call and print.

Imports everything above it, and the packages of the `cli` extra. Begin with `app`.
"""

from repfx.commands import fuse, inspect, list_names, report, train
from repfx.commands.app import app as app
