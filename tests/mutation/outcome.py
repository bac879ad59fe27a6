"""Run the tests of one mutant in a fork of this process, which has torch imported but not repfx."""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from tests.mutation.importing import import_with_mistake
from tests.mutation.mutants import ROOT, Mutant

# What tests import that takes long. A package that isn't installed is left out.
_IMPORTED_ONCE = (
    "torch.fx",
    "torch.ao.quantization",
    "torch._dynamo",
    "hypothesis.stateful",
    "hypothesis.extra.numpy",
    "torchvision",
    "onnx",
    "onnxscript",
    "accelerate",
    "safetensors.torch",
    "sklearn.datasets",
    "matplotlib.figure",
    "typer.testing",
    "jinja2",
    "lightning",
    "timm",
)
_BYTECODE = (
    tempfile.TemporaryDirectory()
)  # forks read there what the first of them has compiled, and the checkout gets none
_LONGEST = 300  # seconds after which a run is stopped: the mistake has made it endless


@dataclass(frozen=True)
class Outcome:
    """The tests that failed and passed with the mistake, or the reason why none could run."""

    failed: tuple[str, ...] = ()
    passed: tuple[str, ...] = ()
    broken: str = ""

    @property
    def killed(self) -> bool:
        """Whether each of the mutant's tests failed. A mistake that breaks the import proves nothing."""
        return bool(self.failed) and not self.passed and not self.broken

    def __str__(self) -> str:
        if self.killed:
            return "killed"
        return self.broken or f"survived {', '.join(self.passed) or 'without a test'}"


class _Watch:
    """Notes how the tests of a run end."""

    def __init__(self) -> None:
        self.failures: list[str] = []
        self.broken = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and report.when == "setup":
            self.broken = f"{report.nodeid} can't begin: {report.longreprtext[-2000:]}"
        elif report.failed:  # in the test, or in what is checked after each test
            self.failures.append(report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.broken = f"{report.nodeid} can't be collected: {report.longreprtext[-2000:]}"


def prepare() -> None:
    """Import what takes long, and let bytecode of repfx and its tests go to a folder of this process."""
    os.environ.update(HYPOTHESIS_PROFILE="ci", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    os.environ.pop("PYTEST_ADDOPTS", None)
    os.chdir(ROOT)
    for name in _IMPORTED_ONCE:
        with suppress(ImportError):
            importlib.import_module(name)
    sys.modules["torch"].set_num_threads(1)
    sys.pycache_prefix, sys.dont_write_bytecode = _BYTECODE.name, False
    gc.collect()
    gc.freeze()  # so that forks don't look through these modules whenever they collect garbage


def outcome_of(mutant: Mutant | None, tests: Sequence[str]) -> Outcome:
    """Run these tests in a fork: with the mistake of a mutant, or as they are."""
    with tempfile.TemporaryDirectory() as name:
        result, output = Path(name, "result"), Path(name, "output")
        child = os.fork()
        if child == 0:
            _run_and_exit(mutant, tests, result, output)
        _, status = os.waitpid(child, 0)
        if not result.is_file():
            said = output.read_text(errors="replace")[-2000:] if output.is_file() else ""
            return Outcome(broken=f"the run ended with status {os.waitstatus_to_exitcode(status)}: {said}")
        values = json.loads(result.read_text())
        return Outcome(tuple(values["failed"]), tuple(values["passed"]), values["broken"])


def _run_and_exit(mutant: Mutant | None, tests: Sequence[str], result: Path, output: Path) -> None:
    """Run in the forked process, which ends here whatever happens."""
    try:
        opened = os.open(output, os.O_WRONLY | os.O_CREAT)
        for stream in (1, 2):
            os.dup2(opened, stream)
        found = _run_unchanged(tests) if mutant is None else _run_mutated(mutant, tests)
        result.write_text(json.dumps(asdict(found)))
        os._exit(0)
    finally:
        os._exit(1)


def _run_unchanged(tests: Sequence[str]) -> Outcome:
    watch = _watched(tests)
    return Outcome(tuple(watch.failures), () if watch.failures else tuple(tests), watch.broken)


def _run_mutated(mutant: Mutant, tests: Sequence[str]) -> Outcome:
    signal.alarm(_LONGEST)
    try:
        import_with_mistake(mutant)
    except Exception as error:
        return Outcome(broken=f"the mistake breaks the import: {type(error).__name__}: {error}")
    watches = {test: _watched([test]) for test in tests}
    failed = tuple(test for test, watch in watches.items() if watch.failures)
    passed = tuple(test for test, watch in watches.items() if not watch.failures)
    return Outcome(failed, passed, "".join(watch.broken for watch in watches.values()))


def _watched(tests: Sequence[str]) -> _Watch:
    """Run tests until one fails, without the options of pyproject.toml, which leave out slow tests."""
    watch = _Watch()
    options = ["-o", "addopts=", "--import-mode=importlib", "--assert=plain", "-p", "no:cacheprovider", "-x", "-q"]
    code = pytest.main([*options, *tests], plugins=[watch])
    if not watch.broken and code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        watch.broken = f"{', '.join(tests)[:200]}: pytest ended with {code!r}"
    return watch
