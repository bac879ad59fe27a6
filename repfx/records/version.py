"""The version of repfx, for files that say what wrote them."""

VERSION = "0.1.0"
