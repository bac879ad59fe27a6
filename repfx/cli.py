"""The console script `repfx`: runs a command; an error becomes one line on stderr and exit code 2."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from repfx.errors import Interrupted, RepfxError

_FOR_TRAINING = ("accelerate", "PIL", "sklearn", "tomli", "tomli_w", "torchvision")
_WAIT_POLICY = "OMP_WAIT_POLICY"
_SHORT_WAITS = {_WAIT_POLICY: "PASSIVE", "GOMP_SPINCOUNT": "1000"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line on `arguments` (default: those of the process).

    Raises:
        SystemExit: always; code 0 if all went well, 2 for an error of the input or of a file, 130 after an interruption.
    """
    if arguments is None and sys.argv[1:2] in (["train"], ["sweep"]):
        _restart_without_spinning()
    try:
        from repfx.commands.app import run_app

        sys.exit(run_app(arguments))
    except ModuleNotFoundError as error:
        needs = f"the command line needs packages that repfx alone does not ({error.name} is missing)"
        extra = "train" if error.name in _FOR_TRAINING else "cli"
        _fail(f"{needs}: pip install 'repfx[{extra}]'")
    except KeyboardInterrupt:
        _fail("interrupted.", 130)
    except RepfxError as error:
        _fail(str(error), 130 if isinstance(error, Interrupted) else 2)
    except OSError as error:
        about = "" if error.filename is None else f"{str(error.filename)!r}: "
        _fail(f"{about}{error.strerror or error}.")


def _restart_without_spinning() -> None:
    """Restart the process with settings that let torch's threads sleep if they wait for each other for long.

    OpenMP reads these settings only when torch is imported, so the process must start again. Without them the threads spin for
    milliseconds, and one other busy process makes training ten times slower.
    """
    if sys.platform == "linux" and _WAIT_POLICY not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **_SHORT_WAITS})


def _fail(message: str, code: int = 2) -> None:
    print(f"repfx: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)
