"""Tests of the tests: each mistake in the list fits the code, and makes the tests fail that are there for it."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.mutation.mutants import ROOT, Mutant, read_mutants
from tests.mutation.outcome import Outcome

MUTANTS = read_mutants()
WINGS = {
    *(
        "records",
        "algebra",
        "reading",
        "blocks",
        "branches",
        "graphs",
        "tracing",
        "rewriting",
        "measuring",
        "passes",
        "change",
    ),
    *("search", "schedules", "onnx", "data", "training", "pages", "commands"),
}
each_mutant = pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.wing}: {mutant.name}")


@each_mutant
def test_a_mistake_fits_the_code(mutant: Mutant) -> None:
    source = (ROOT / mutant.file).read_text(encoding="utf-8")
    assert ast.dump(ast.parse(mutant.mutated(source))) != ast.dump(ast.parse(source))


@each_mutant
def test_the_tests_of_a_mistake_are_there(mutant: Mutant) -> None:
    assert mutant.tests
    for test in mutant.tests:
        file, _, name = test.partition("::")
        assert name.partition("[")[0].rpartition("::")[2] in _functions_in(ROOT / file), test


def test_every_wing_has_mistakes_and_no_two_have_one_name() -> None:
    assert {mutant.wing for mutant in MUTANTS} == WINGS
    assert [name for name, count in Counter(mutant.name for mutant in MUTANTS).items() if count > 1] == []
    assert len(MUTANTS) >= 120


def test_a_text_that_does_not_occur_exactly_once_is_no_mistake() -> None:
    mutant = Mutant("records", "twice", "repfx/records/notes.py", "a", "b", ())
    with pytest.raises(ValueError, match=r"'twice': the text to replace occurs 2 times in repfx/records/notes\.py"):
        mutant.mutated("a a")


@cache
def _functions_in(path: Path) -> frozenset[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


# ---- the tests run, in forks of one process


@pytest.fixture(scope="module")
def outcome() -> Iterator[Callable[[str], Outcome]]:
    """Ask for the outcome of a mutant by its name, or of some tests without a mistake by an empty name."""
    command = [sys.executable, "-m", "tests.mutation", "--serve"]
    with subprocess.Popen(
        command, cwd=ROOT, env={**os.environ}, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as server:

        def ask(name: str) -> Outcome:
            assert server.stdin is not None
            assert server.stdout is not None
            server.stdin.write(f"{name}\n")
            server.stdin.flush()
            return Outcome(**json.loads(server.stdout.readline()))

        yield ask
        server.communicate()


@pytest.mark.slow
@pytest.mark.slow_one_in(9)
@each_mutant
def test_the_tests_see_the_mistake(mutant: Mutant, outcome: Callable[[str], Outcome]) -> None:
    found = outcome(mutant.name)
    assert found.killed, str(found)


@pytest.mark.slow
def test_the_tests_pass_without_a_mistake(outcome: Callable[[str], Outcome]) -> None:
    found = outcome("")
    assert not found.failed
    assert not found.broken
