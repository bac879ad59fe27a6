"""A progress bar on stderr while an experiment runs; nothing where stderr is no terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from repfx.experiment import Watcher
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
    if quiet or not console.is_terminal:
        yield Watcher()
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

        yield Watcher(on_stage, on_step)
