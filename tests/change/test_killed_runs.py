"""A run that is killed at any moment resumes bit for bit."""

from __future__ import annotations

import random
import signal
from multiprocessing import get_context
from pathlib import Path

import pytest

from tests.programs.killable import PER_EPOCH, STEPS, train

# Processes of their own, forked from one that has loaded torch once.
FORKS = get_context("forkserver")
FORKS.set_forkserver_preload(["torch._dynamo", "tests.programs.killable"])


class Life:
    """A run in its own process, which reports each step once the step is saved."""

    def __init__(self, schedule: str, folder: Path) -> None:
        self.steps, tell = FORKS.Pipe(duplex=False)
        self.process = FORKS.Process(target=train, args=(schedule, folder, tell.send))
        self.process.start()
        tell.close()

    def go_until(self, step: int) -> list[int]:
        """Return the steps that the run took, up to at least `step`."""
        went = [self.steps.recv()]
        while went[-1] < step:
            went.append(self.steps.recv())
        return went


@pytest.mark.slow_one_in(2)
@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["dyrep", "repan", "repnas", "des"])
def test_killed_again_and_again_it_ends_with_the_same_bits(tmp_path: Path, schedule: str) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    steps: list[int] = []
    train(schedule, whole, steps.append)  # in this process, so that sets have another order than in the killed runs
    assert steps[-1] == STEPS
    chance = random.Random(schedule)
    # kill right before a rewrite, right after one, and at a random step
    for step in (PER_EPOCH - 1, 2 * PER_EPOCH, chance.randrange(2 * PER_EPOCH + 1, STEPS - 3)):
        life = Life(schedule, killed)
        went = life.go_until(step)
        life.process.kill()
        life.process.join()
        assert life.process.exitcode == -signal.SIGKILL
        assert went[-1] == step
    last = Life(schedule, killed)
    assert last.go_until(STEPS)[0] > PER_EPOCH
    last.process.join(60)
    assert last.process.exitcode == 0
    assert (killed / "run.ckpt").read_bytes() == (whole / "run.ckpt").read_bytes()
    assert [path.name for path in killed.iterdir() if not path.name.startswith(".")] == ["run.ckpt"]
