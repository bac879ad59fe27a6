"""The console script `repfx`: runs a command; an error becomes one line on stderr and exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from repfx.errors import RepfxError

_NEEDED = "the command line needs packages that plain repfx does not"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line on `arguments`, by default those of the process.

    Raises:
        SystemExit: always; code 0 if all went well, 2 for an error of the input or of a file.
    """
    try:
        from repfx.commands import app

        app(None if arguments is None else list(arguments), prog_name="repfx")
    except ModuleNotFoundError as error:
        _fail(f"{_NEEDED} ({error.name} is missing): pip install 'repfx[cli]'")
    except (RepfxError, OSError) as error:
        _fail(str(error))


def _fail(message: str) -> None:
    print(f"repfx: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
