"""A progress bar on stderr while an experiment runs, and the changes of the model's structure; where stderr is no terminal, these alone."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from repfx.experiment import Watcher
from repfx.journaling import Action
from repfx.training import Step

_STAGES = {
    "expand": "expanding",
    "train": "training",
    "fuse": "fusing, and checking it",
    "export": "exporting to ONNX, and checking it",
    "test": "running the test images",
    "measure": "measuring",
}


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
        yield Watcher(on_action=lambda epoch, action: print(_told(epoch, action), file=sys.stderr, flush=True))
        return
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("loading", total=None, note="")

        def on_stage(stage: str) -> None:
            if stage in ("expand", "train"):
                progress.update(task, description=_STAGES[stage])
                return
            progress.update(task, description="trained")
            progress.console.print(f"[dim]{_STAGES[stage]} …")

        def on_step(step: Step) -> None:
            note = f"epoch {step.epoch}, loss {step.loss:.3f}"
            progress.update(task, completed=step.number, total=step.total, note=note)

        yield Watcher(
            on_stage, on_step, lambda epoch, action: progress.console.print(_told(epoch, action), markup=False)
        )


def _told(epoch: int, action: Action) -> str:
    return f"{f'after epoch {epoch}' if epoch else 'at the beginning'}: {action}"
