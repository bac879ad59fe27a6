"""A progress bar on stderr while an experiment runs, and the changes of the model's structure; where stderr is no terminal, these alone."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import groupby

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from repfx.records.journal import Action
from repfx.training.history import History
from repfx.training.loop import Step, Watcher

_STAGES = {
    "expand": "expanding",
    "train": "training",
    "fuse": "fusing, and checking it",
    "export": "exporting to ONNX, and checking it",
    "test": "running the test images",
    "measure": "measuring",
}


_LINES = 12  # more changes than this at a time are told in short


@contextmanager
def shown_progress(*, quiet: bool = False) -> Iterator[Watcher]:
    """A watcher that shows what it hears."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    if quiet:
        yield Watcher()
        return
    if not console.is_terminal:
        yield Watcher(on_epoch=_Teller(partial(print, file=sys.stderr, flush=True)))
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

        tell = _Teller(partial(progress.console.print, markup=False))

        def on_epoch(history: History) -> None:
            nonlocal tested
            accuracy = history.epochs[-1].accuracy
            tested = tested if accuracy is None else f", accuracy {accuracy:.2%}"
            tell(history)

        yield Watcher(on_stage, on_step, on_epoch)


def busy(doing: str) -> AbstractContextManager[object]:
    """A spinner on stderr beside what goes on; nothing where stderr is no terminal."""
    return Console(stderr=True).status(f"{doing} …")


class _Teller:
    """Tells what was done after each epoch, once; what was told before an interruption isn't told again."""

    def __init__(self, say: Callable[[str], object]) -> None:
        self.say = say
        self.told: int | None = None

    def __call__(self, history: History) -> None:
        epochs = history.epochs
        if self.told is None and len(epochs) > 1:
            self.told = len(epochs)
        for entry in epochs[self.told or 0 :]:
            _tell(entry.epoch, entry.actions, self.say)
        self.told = len(epochs)


def _tell(epoch: int, actions: Sequence[Action], say: Callable[[str], object]) -> None:
    """Each change in a line; of many at a time, those of a kind together."""
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
