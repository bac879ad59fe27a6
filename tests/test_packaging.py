"""What is installed is what is on disk; imports point one way; `import repfx` needs torch alone."""

from __future__ import annotations

import ast
import importlib
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
MODULES = sorted(path.relative_to(ROOT) for folder in ("repfx", "repfx/*/") for path in ROOT.glob(f"{folder}/*.py"))
LINKED = ("passes", "recipes")  # folders at the top level
DATA = {
    str(path.relative_to(ROOT))
    for pattern in ("repfx/pages/templates/*", "repfx/recipes/*.toml")
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
    "torchvision",
    "typer",
}


def test_the_packages_listed_are_the_packages_on_disk() -> None:
    assert PYPROJECT["tool"]["setuptools"]["packages"] == sorted({".".join(path.parent.parts) for path in MODULES})


def test_no_package_lies_deeper_than_the_listed_ones() -> None:
    assert not [path for folder in ("repfx", *LINKED) for path in ROOT.glob(f"{folder}/*/*/*.py")]


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


def test_import_repfx_needs_torch_alone() -> None:
    program = (
        f"import torch, sys; had = set(sys.modules); import repfx; print(*({OPTIONAL} & (set(sys.modules) - had)))"
    )
    found = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.split() == []


EXTRAS: dict[str, list[str]] = PYPROJECT["project"]["optional-dependencies"]
ASKED = [Requirement(text) for texts in (PYPROJECT["project"]["dependencies"], *EXTRAS.values()) for text in texts]


def pins(name: str) -> dict[str, set[str]]:
    """The versions of each package in a file of constraints; which one of them may depend on the Python."""
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


# --- Imports point one way ------------------------------------------------------------------------------------------


def layers() -> list[str]:
    """The modules of repfx in import order: the first column of the table in docs/architecture.md."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    table = text.split("<!-- import order -->")[1].split("\n\n")[1]
    return re.findall(r"^\| `(\w+)", table, flags=re.MULTILINE)


def layer_of(module: str) -> str:
    """`repfx.branches.full` lies in the layer `branches`, `repfx` itself in `__init__`."""
    return module.split(".")[1] if "." in module else "__init__"


def imported_layers(source: str) -> Iterator[str]:
    """All layers that a file of repfx imports from, also inside a function or under TYPE_CHECKING."""
    known = set(layers())
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "repfx":
            yield from (alias.name if alias.name in known else "__init__" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("repfx."):
            yield layer_of(str(node.module))
        elif isinstance(node, ast.Import):
            yield from (layer_of(alias.name) for alias in node.names if alias.name.split(".")[0] == "repfx")


def test_every_module_stands_in_the_import_order_and_in_no_other() -> None:
    on_disk = {layer_of(".".join(path.with_suffix("").parts)) for path in MODULES}
    assert sorted(layers()) == sorted(on_disk)


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_point_one_way(path: Path) -> None:
    order = {layer: position for position, layer in enumerate(layers())}
    own = layer_of(".".join(path.with_suffix("").parts))
    later = len(order)  # what the table doesn't know is taken to come last
    imported = imported_layers((ROOT / path).read_text())
    wrong = [layer for layer in imported if order.get(layer, later) > order.get(own, later)]
    assert not wrong, f"{path} imports {wrong}, which come after {own!r} in docs/architecture.md"


def test_the_import_check_sees_every_form_of_import() -> None:
    forms = (
        "import repfx",
        "import repfx.kernel",
        "from repfx import kernel, fuse",
        "from repfx.passes.drop import x",
        "def late():\n    from repfx.cli import main",
    )
    found = [list(imported_layers(form)) for form in forms]
    assert found == [["__init__"], ["kernel"], ["kernel", "__init__"], ["passes"], ["cli"]]


# --- The wheel ------------------------------------------------------------------------------------------------------


FILES = (
    "pyproject.toml",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "CHANGELOG.md",
    "mkdocs.yml",
    "constraints.txt",
    "constraints-oldest.txt",
)
FOLDERS = (".ci", "benchmarks", "docs", "passes", "recipes", "repfx", "tests")


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
