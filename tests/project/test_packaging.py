"""Packaging: all files on disk are installed; imports point one way; `import repfx` needs only torch."""

from __future__ import annotations

import ast
import graphlib
import importlib
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS_OF_CODE = (
    "repfx",
    "repfx/*",
    "repfx/*/*",
)  # as deep as the packages are nested, because `**` doesn't follow links
MODULES = sorted(path.relative_to(ROOT) for folder in FOLDERS_OF_CODE for path in ROOT.glob(f"{folder}/*.py"))
LINKED = ("passes", "recipes")  # folders at the top level
DATA = {
    str(path.relative_to(ROOT))
    for pattern in ("repfx/pages/templates/*", "repfx/recipes/*/*.toml")
    for path in ROOT.glob(pattern)
} | {"repfx/py.typed"}
OPTIONAL = {
    "jinja2",
    "lightning",
    "matplotlib",
    "numpy",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "PIL",
    "rich",
    "safetensors",
    "sklearn",
    "timm",
    "torchao",
    "torchvision",
    "typer",
}


def test_the_packages_listed_are_the_packages_on_disk() -> None:
    assert PYPROJECT["tool"]["setuptools"]["packages"] == sorted({".".join(path.parent.parts) for path in MODULES})


def test_no_package_lies_deeper_than_the_listed_ones() -> None:
    assert not [path for folder in ("repfx", *LINKED) for path in ROOT.glob(f"{folder}/*/*/*/*.py")]


@pytest.mark.skipif((ROOT / "PKG-INFO").exists(), reason="an unpacked sdist has copies instead of links")
@pytest.mark.parametrize("name", LINKED)
def test_a_folder_at_the_top_is_linked(name: str) -> None:
    link = ROOT / "repfx" / name
    assert link.is_symlink()
    assert link.resolve() == ROOT / name


@pytest.mark.parametrize("name", LINKED)
def test_importing_through_the_link_gives_one_module(name: str) -> None:
    module = importlib.import_module(f"repfx.{name}")
    assert name not in sys.modules
    assert Path(str(module.__file__)).resolve().parent == (ROOT / "repfx" / name).resolve()


@pytest.mark.slow
def test_import_repfx_needs_torch_alone() -> None:
    program = f"import torch, sys; had = set(sys.modules); from repfx import *; print(*({OPTIONAL} & (set(sys.modules) - had)))"
    found = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.split() == []


EXTRAS: dict[str, list[str]] = PYPROJECT["project"]["optional-dependencies"]
PINNED = [
    texts for extra, texts in EXTRAS.items() if extra not in ("zoo", "tools", "datasets")
]  # the tools have pins of their own
ASKED = [Requirement(text) for texts in (PYPROJECT["project"]["dependencies"], *PINNED) for text in texts]


def pins(name: str) -> dict[str, set[str]]:
    """The versions of each package in a file of constraints. Several versions of one package are for different Pythons."""
    found: dict[str, set[str]] = {}
    for line in (ROOT / name).read_text().splitlines():
        if line[0] != "#":
            pin = Requirement(line)
            found.setdefault(pin.name, set()).add(str(pin.specifier).removeprefix("=="))
    return found


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-oldest.txt"])
def test_every_pin_satisfies_what_pyproject_asks_for(name: str) -> None:
    pinned = pins(name)
    for requirement in ASKED:
        if requirement.name == "repfx":
            continue
        assert requirement.name in pinned, f"{name} doesn't pin {requirement.name}"
        assert all(requirement.specifier.contains(version) for version in pinned[requirement.name]), requirement


def test_every_tool_is_pinned_in_a_file_of_its_own() -> None:
    pinned, others = pins("constraints-tools.txt"), pins("constraints.txt")
    for requirement in map(Requirement, EXTRAS["tools"]):
        assert all(requirement.specifier.contains(version) for version in pinned[requirement.name]), requirement
    assert not pinned.keys() & others.keys(), "one package, pinned twice"


def test_the_oldest_pins_are_the_lowest_versions_of_what_users_install() -> None:
    pinned = pins("constraints-oldest.txt")
    contributors = {Requirement(text).name for extra in ("docs", "dev") for text in EXTRAS[extra]}
    for requirement in ASKED:
        if requirement.name in contributors | {"repfx"}:
            continue
        (lowest,) = [part.version for part in requirement.specifier if part.operator == ">="]
        tested = min(map(Version, pinned[requirement.name]))
        assert tested == Version(lowest), f"{requirement.name} {lowest} is asked for, {tested} is tested"


def test_every_python_that_is_named_is_allowed_and_the_lowest_is_named() -> None:
    named = [text.split(" :: ")[-1] for text in PYPROJECT["project"]["classifiers"] if " :: 3." in text]
    assert PYPROJECT["project"]["requires-python"] == f">={named[0]}"
    assert named == sorted(named, key=Version)


def test_the_changelog_knows_the_version() -> None:
    assert f"\n## {PYPROJECT['project']['version']}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_citation_has_the_version_and_the_license() -> None:
    lines = (ROOT / "CITATION.cff").read_text().splitlines()
    assert {f"{key}: {PYPROJECT['project'][key]}" for key in ("version", "license")} <= {*lines}


# --- Imports point one way ------------------------------------------------------------------------------------------

ALONE = ("errors", "__init__", "extend", "cli", "__main__")  # wings of one file


def wings() -> list[str]:
    """The wings of repfx in import order: the first column of the table in docs/architecture.md."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    table = text.split("<!-- wings -->")[1].split("\n\n")[1]
    return re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE)


def module_of(path: Path) -> str:
    """Turn a path into the name under which the file is imported."""
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def wing_of(module: str) -> str:
    """Return the wing of a module: `repfx.branches.full` lies in `branches`, `repfx` itself in `__init__`."""
    return module.split(".")[1] if "." in module else "__init__"


def imported_modules(source: str) -> Iterator[str]:
    """Return the modules of repfx that a file imports, also inside a function or under TYPE_CHECKING."""
    known = {module_of(path) for path in MODULES}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "repfx":
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in known else str(node.module) for name in inside)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "repfx")


def imports_below(module: str, source: str, order: Sequence[str]) -> list[str]:
    """Return the modules that a file imports from wings that come later in the import order."""
    own = order.index(wing_of(module))
    return [found for found in imported_modules(source) if order.index(wing_of(found)) > own]


def circle_in(imports: Mapping[str, Collection[str]]) -> list[str] | None:
    """Return a circle of modules that import each other, or None."""
    try:
        graphlib.TopologicalSorter(imports).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return None


def test_every_module_stands_in_a_wing_and_every_wing_has_modules() -> None:
    assert sorted(wings()) == sorted({wing_of(module_of(path)) for path in MODULES})


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_no_wing_imports_a_later_one(path: Path) -> None:
    wrong = imports_below(module_of(path), (ROOT / path).read_text(), wings())
    assert not wrong, f"{path} imports {wrong}, whose wing comes after its own in docs/architecture.md"


@pytest.mark.parametrize("wing", [wing for wing in wings() if wing not in ALONE])
def test_inside_a_wing_imports_go_in_no_circle(wing: str) -> None:
    inside = {module_of(path): (ROOT / path).read_text() for path in MODULES if wing_of(module_of(path)) == wing}
    package = f"repfx.{wing}"
    imports = {name: {*imported_modules(text)} & inside.keys() - {package} for name, text in inside.items()}
    assert circle_in(imports) is None


def test_an_import_of_a_later_wing_and_a_circle_are_seen() -> None:
    order = wings()
    late = "def late():\n    from repfx.tracing.trace import x"
    assert imports_below("repfx.algebra.kernel", late, order) == ["repfx.tracing.trace"]
    assert imports_below("repfx.rewriting.view", late, order) == []
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"a"}}) is not None
    assert circle_in({"a": {"b", "c"}, "b": {"c"}}) is None


def test_the_import_check_sees_every_form_of_import() -> None:
    forms = (
        "import repfx",
        "import repfx.algebra.kernel",
        "from repfx import algebra, fuse",
        "from repfx.passes.drop import x",
        "from repfx.passes import drop",
        "def late():\n    from repfx.cli import main",
    )
    found = [list(imported_modules(form)) for form in forms]
    kernel, drop = "repfx.algebra.kernel", "repfx.passes.drop"
    assert found == [["repfx"], [kernel], ["repfx.algebra", "repfx"], [drop], [drop], ["repfx.cli"]]


@pytest.mark.parametrize("wing", [wing for wing in wings() if wing not in ALONE])
def test_a_wing_says_what_it_holds_what_it_may_import_and_where_to_begin(wing: str) -> None:
    said = str(ast.get_docstring(ast.parse((ROOT / "repfx" / wing / "__init__.py").read_text())))
    assert "Imports " in said
    assert "Begin with " in said


def files_that_the_page_lists() -> dict[str, list[str]]:
    """The files that docs/architecture.md lists for each wing, by folder."""
    text = (ROOT / "docs" / "architecture.md").read_text().split("## What lies in each wing")[1].split("\n## ")[0]
    sections = re.findall(r"^### `([\w/]+)`\n(.*?)(?=^### |\Z)", text, re.MULTILINE | re.DOTALL)
    cells = {folder: re.findall(r"^\| (`.*?) \|", body, re.MULTILINE) for folder, body in sections}
    return {
        folder: sorted(name for cell in rows for name in re.findall(r"`(\w+)`", cell)) for folder, rows in cells.items()
    }


def test_the_page_on_architecture_lists_the_files_of_each_wing() -> None:
    on_disk: dict[str, list[str]] = {}
    for path in MODULES:
        if len(path.parts) > 2 and path.stem != "__init__" and path.parts[1] != "recipes":  # of which most are no code
            on_disk.setdefault("/".join(path.parts[1:-1]), []).append(path.stem)
    assert files_that_the_page_lists() == {folder: sorted(names) for folder, names in on_disk.items()}


def test_no_folder_is_a_heap() -> None:
    files = (path for folder in FOLDERS_OF_CODE for path in ROOT.glob(f"{folder}/*") if path.is_file())
    counts = Counter(str(path.parent.relative_to(ROOT)) for path in files)
    assert max(counts.values()) <= 20, counts


@pytest.mark.slow
def test_import_repfx_shows_verbs_values_and_wings() -> None:
    program = "import types, repfx; print(*(n for n in dir(repfx) if n[0] != '_'))"
    found = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    names = found.stdout.split()
    assert len(names) <= 45
    modules = {name for name in names if (ROOT / "repfx" / name).is_dir() or (ROOT / "repfx" / f"{name}.py").is_file()}
    assert modules <= set(wings())


# --- The wheel ------------------------------------------------------------------------------------------------------


FILES = (
    "pyproject.toml",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "mkdocs.yml",
    "constraints.txt",
    "constraints-oldest.txt",
    "constraints-tools.txt",
)
FOLDERS = (".ci", "benchmarks", "docs", "passes", "recipes", "repfx", "tests")


@pytest.mark.slow
def test_the_sdist_holds_all_that_tests_need_and_the_wheel_made_from_it_the_modules_alone(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for name in FILES:
        shutil.copy(ROOT / name, checkout)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, checkout / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(checkout)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (sdist,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    files = (path for folder in FOLDERS for path in checkout.glob(f"{folder}/**/*") if path.is_file())
    assert {str(path.relative_to(checkout)) for path in files} | {*FILES} <= packed
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == {str(path) for path in MODULES} | DATA
