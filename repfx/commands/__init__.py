"""The commands of `repfx`, one file each: they parse, call and print."""

from repfx.commands import fuse, inspect, list_names, report, train
from repfx.commands.app import app as app
