"""The commands for the papers' printed rows: each resolves to a job whose net, branches, schedule and budget fit together."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from repfx.cli import main
from repfx.commands import sweep as sweep_command
from repfx.commands import train as train_command
from repfx.search.base import Search
from repfx.search.space import Space
from repfx.training.experiment import Experiment
from repfx.training.named_recipes import shipped_recipes
from repfx.training.run_folder import spec_of
from repfx.training.sweep import Sweep
from tests.training.test_recipes import convs_in, expandable, schedule_of

PAGE = Path(__file__).parents[2] / "docs" / "papers" / "rows.md"
LINES = re.findall(r"^repfx (?:train|sweep) .*$", PAGE.read_text(), re.MULTILINE)


class Asked(Exception):
    """The jobs of a command, raised before any of them is trained."""

    def __init__(self, jobs: list[Experiment]) -> None:
        super().__init__()
        self.jobs = jobs


def jobs_of(line: str, monkeypatch: pytest.MonkeyPatch) -> list[Experiment]:
    """The jobs of a command, which trains nothing here."""

    def run(experiment: Experiment, watcher: object) -> None:
        raise Asked([experiment])

    def run_sweep(sweep: Sweep, out: Path, watched: object) -> None:
        raise Asked([sweep.experiment(point, out) for point in sweep.points])

    monkeypatch.setattr(train_command, "run", run)
    monkeypatch.setattr(sweep_command, "run_sweep", run_sweep)
    with pytest.raises(Asked) as asked:
        main(shlex.split(line)[1:])
    return asked.value.jobs


@pytest.mark.parametrize("line", LINES)
def test_a_row_s_command_asks_for_what_fits_together(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for asked in jobs_of(line, monkeypatch):
        convs = convs_in(asked.model, asked)
        if asked.schedule is None:
            if str(asked.spec).endswith(".json"):  # a search has yet to find it
                continue
            spec = spec_of(asked.spec)
            assert bool(expandable(spec, convs)) == (spec != [])
            continue
        schedule: Any = schedule_of(asked)
        expanded = expandable(schedule.spec, convs)
        assert len(expanded) > 8
        if isinstance(schedule, Search):
            own = ["origin"] if schedule.origin else []
            paths = [(site, path) for site, kinds in expanded.items() for path in [*own, *kinds]]
            assert 0 < Space(tuple(paths)).budget(schedule.budget) < len(paths)


def test_no_row_is_there_twice_and_each_recipe_of_a_paper_has_one() -> None:
    assert len(LINES) == len(set(LINES)) > 50
    named = {name for line in LINES for name in shlex.split(line) if name in shipped_recipes()}
    others = {"plain-resnet101-cifar100"}  # a teacher
    others |= {
        name for name in shipped_recipes() if re.match(r"(plain|acb|dbb)-(vgg16|resnet18)-cifar100", name)
    } - named
    assert set(shipped_recipes()) - named - others == {"repvgg-vgg16-cifar10"}
