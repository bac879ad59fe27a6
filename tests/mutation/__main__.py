"""Run mutants and print how many were killed, by wing.

python -m tests.mutation               all
python -m tests.mutation algebra onnx  these wings
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import asdict

from tests.mutation.mutants import Mutant, read_mutants
from tests.mutation.outcome import outcome_of, prepare


def print_table(mutants: list[Mutant]) -> bool:
    """Print each mutant that isn't killed, and the table. Return whether all are killed."""
    prepare()
    killed: Counter[str] = Counter()
    for mutant in mutants:
        outcome = outcome_of(mutant, mutant.tests)
        killed[mutant.wing] += outcome.killed
        if not outcome.killed:
            print(f"{mutant.wing}: {mutant.name}: {outcome}", flush=True)
    of_all = Counter(mutant.wing for mutant in mutants)
    print(f"{'wing':<12} killed  of all")
    for wing, count in [*of_all.items(), ("together", len(mutants))]:
        print(f"{wing:<12} {killed.total() if wing == 'together' else killed[wing]:>6}  {count:>6}")
    return killed.total() == len(mutants)


def serve() -> None:
    """Answer each line of the standard input, the name of a mutant, with its outcome as JSON.

    An empty name asks for every fifth test without a mistake: it must pass in a fork, too.
    """
    prepare()
    mutants = {mutant.name: mutant for mutant in read_mutants()}
    every_test = tuple(dict.fromkeys(test for mutant in mutants.values() for test in mutant.tests))
    for line in sys.stdin:
        mutant = mutants[line.strip()] if line.strip() else None
        outcome = outcome_of(mutant, every_test[::5] if mutant is None else mutant.tests)
        print(json.dumps(asdict(outcome)), flush=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["--serve"]:
        serve()
    else:
        chosen = [mutant for mutant in read_mutants() if not sys.argv[1:] or mutant.wing in sys.argv[1:]]
        sys.exit(0 if print_table(chosen) else 1)
