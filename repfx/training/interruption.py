"""Ctrl-C and SIGTERM in a training: noticed at once, obeyed when the step is over."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def noticed_signals() -> Iterator[Callable[[], bool]]:
    """Yield a function that tells whether SIGINT or SIGTERM has come since the context began.

    A further Ctrl-C raises `KeyboardInterrupt` at once, as usual, and so does a second SIGTERM. A SIGTERM after Ctrl-C doesn't, because
    launchers send one after the other. Outside the main thread, Python lets no one handle signals, so the
    function always returns False.
    """
    received: list[int] = []

    def notice(number: int, frame: FrameType | None) -> None:
        if received and (number == signal.SIGINT or number in received):
            raise KeyboardInterrupt
        received.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.signal(number, notice) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
