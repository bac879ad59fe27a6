"""The best epoch of a run so far, and whether the run has gone without a better one for too long."""

from __future__ import annotations

from repfx.training.runs.history import Epoch, History


def accuracy_of(epoch: Epoch) -> float | None:
    """Return the accuracy by which epochs are compared: that of the averaged model if there is one; None if it wasn't measured."""
    return epoch.accuracy if epoch.ema_accuracy is None else epoch.ema_accuracy


def best_of(history: History) -> Epoch | None:
    """Return the first epoch of those with the highest accuracy; None if none was measured.

    >>> best_of(History((Epoch(0), Epoch(1, accuracy=0.5), Epoch(2, accuracy=0.7), Epoch(3, accuracy=0.7)))).epoch
    2
    """
    tested = [epoch for epoch in history.epochs if accuracy_of(epoch) is not None]
    return max(tested, key=lambda epoch: accuracy_of(epoch) or 0.0, default=None)


def is_over(history: History, patience: int) -> bool:
    """Tell whether the last epoch was tested, and the best one came `patience` epochs before it. A patience of 0 never ends.

    >>> history = History((Epoch(1, accuracy=0.7), Epoch(2, accuracy=0.5), Epoch(3, accuracy=0.6)))
    >>> is_over(history, 2), is_over(history, 3), is_over(history, 0)
    (True, False, False)
    """
    best, last = best_of(history), history.epochs[-1]
    waited = 0 if best is None else last.epoch - best.epoch
    return bool(patience) and accuracy_of(last) is not None and waited >= patience


def story_of_end(history: History, patience: int) -> str:
    """Say in one sentence why a run ended before its last epoch."""
    best = best_of(history)
    assert best is not None
    last = history.epochs[-1].epoch
    return f"stopped after epoch {last}: none of the last {patience} was better than epoch {best.epoch}, {accuracy_of(best):.2%}"
