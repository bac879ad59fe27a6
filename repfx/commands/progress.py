"""Progress of an experiment on stderr: a bar, and the changes of the structure. Without a terminal, a line for each epoch and change."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import groupby

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from repfx.records.journal import Action
from repfx.training.loop import Step, Watcher
from repfx.training.runs.history import Epoch, History

_STAGES = {
    "expand": "expanding",
    "train": "training",
    "fuse": "fusing and checking",
    "export": "exporting to ONNX and checking",
    "test": "running the test images",
    "measure": "measuring",
    "round": "training on with numbers rounded to 8 bits",
}


_LINES = 12  # if there are more changes than this at a time, those of one kind share a line


@contextmanager
def shown_progress(*, quiet: bool = False) -> Iterator[Watcher]:
    """Yield a watcher that shows the progress of training. If `quiet`, it shows nothing."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        _Steps(),
        TimeElapsedColumn(),
        _TimeLeft(),
        TextColumn("{task.fields[note]}"),
    )
    if quiet:
        yield Watcher()
        return
    if not console.is_terminal:
        say = partial(print, file=sys.stderr, flush=True)
        yield Watcher(on_epoch=_Teller(say, results=True), on_notice=say)
        return
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("loading", total=None, note="")

        def on_stage(stage: str) -> None:
            if stage in ("expand", "train"):
                progress.update(task, description=_STAGES[stage])
                return
            progress.update(task, description="trained")
            progress.console.print(f"[dim]{_STAGES[stage]} …")

        tested = ""

        def on_step(step: Step) -> None:
            note = f"epoch {step.epoch}, loss {step.loss:.3f}{tested}"
            progress.update(task, completed=step.number, total=step.total, note=note)

        say = partial(progress.console.print, markup=False)
        tell = _Teller(say)

        def on_epoch(history: History) -> None:
            nonlocal tested
            accuracy = history.epochs[-1].accuracy
            tested = tested if accuracy is None else f", accuracy {accuracy:.2%}"
            tell(history)

        yield Watcher(on_stage, on_step, on_epoch, say)


def busy(doing: str) -> AbstractContextManager[object]:
    """Show a spinner on stderr beside the text `doing` while the context is open. Without a terminal, show nothing."""
    return Console(stderr=True).status(f"{doing} …")


class _Steps(MofNCompleteColumn):
    """How many steps of all are done, as soon as it is known how many there are."""

    def render(self, task: Task) -> Text:
        return Text() if task.total is None else super().render(task)


class _TimeLeft(TimeRemainingColumn):
    """The time that is left, as soon as it can be estimated."""

    def render(self, task: Task) -> Text:
        return Text() if task.time_remaining is None else super().render(task).append(" left")


class _Teller:
    """Prints the changes of each epoch once. A resumed run doesn't print again what it printed before the interruption.

    Args:
        results: whether the loss, the accuracy and the learning rate of each epoch are printed, too.
    """

    def __init__(self, say: Callable[[str], object], *, results: bool = False) -> None:
        self.say = say
        self.results = results
        self.told: int | None = None

    def __call__(self, history: History) -> None:
        epochs = history.epochs
        if self.told is None and len(epochs) > 1:
            self.told = len(epochs)
        for entry in epochs[self.told or 0 :]:
            if self.results and entry.loss is not None:
                self.say(_result(entry))
            _tell(entry.epoch, entry.actions, self.say)
        self.told = len(epochs)


def _result(entry: Epoch) -> str:
    accuracy = "" if entry.accuracy is None else f", accuracy {entry.accuracy:.2%}"
    average = "" if entry.ema_accuracy is None else f" ({entry.ema_accuracy:.2%} by the average)"
    rate = "" if entry.learning_rate is None else f", learning rate {entry.learning_rate:.3g}"
    return f"epoch {entry.epoch}: loss {entry.loss:.4f}{accuracy}{average}{rate}"


def _tell(epoch: int, actions: Sequence[Action], say: Callable[[str], object]) -> None:
    """Print each change on a line. If there are many, print one line for those of a kind that follow one another."""
    when = f"after epoch {epoch}" if epoch else "at the beginning"
    for kind, group in groupby(actions, lambda action: action.kind):
        alike = list(group)
        if len(actions) <= _LINES or len(alike) == 1:
            for action in alike:
                say(f"{when}: {action}")
        else:
            sites = list(dict.fromkeys(action.site for action in alike))
            named = ", ".join(sites[:3]) + (", …" if len(sites) > 3 else "")
            say(f"{when}: {kind} {len(alike)} times, at {len(sites)} sites: {named}")
