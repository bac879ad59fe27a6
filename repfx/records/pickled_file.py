"""Files of `torch.save`, read without running code in them."""

from __future__ import annotations

import os
import pickle
import re
from typing import Any

import torch

from repfx.errors import InvalidInput

_NAMED = re.compile(r"(?:GLOBAL|global|class|function) `?([\w.]+\.[\w.]+)`?")


def load_pickled(path: str | os.PathLike[str]) -> Any:
    """Return the tensors and plain values of a file that `torch.save` wrote, on the CPU.

    Raises:
        InvalidInput: the file is damaged or of another kind, or it holds objects that only its own code can make.
        OSError: the file can't be read.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except pickle.UnpicklingError as error:
        named = _NAMED.search(str(error).replace("Weights only load failed", ""))
        what = f"an object of {named[1]}" if named else "more than tensors and plain values"
        raise InvalidInput(
            f"{os.fspath(path)!r} can't be read as weights: it is damaged, or it holds {what}, which only code could make again; "
            "save the weights alone, by torch.save(model.state_dict(), …)."
        ) from None
    except Exception as error:  # whatever zip files and pickles can fail with
        raise InvalidInput(
            f"{os.fspath(path)!r} can't be read as weights: it is no whole file of torch.save."
        ) from error
