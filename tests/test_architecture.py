"""The shape of the project: who may import whom, what a fresh machine needs, how long files get."""

import ast
import dataclasses
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from albef_core.config import Recipe

ROOT = Path(__file__).parents[1]
PACKAGES = ("albef_core", "pipelines", "jobs")
FOLDERS = (*PACKAGES, "benchmarks", "tests")


def source_files(*folders: str) -> list[Path]:
    return sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))


def imported(file: Path) -> Iterator[str]:
    """Yield the first part of every module that the file imports, at any depth of its code."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]


def test_the_import_contracts_hold() -> None:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"]

    process = subprocess.run(
        [*command, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert process.returncode == 0, process.stdout + process.stderr


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("albef_core", {"ray", "mlflow", "pipelines", "jobs", "tyro"}),
        ("pipelines", {"jobs", "tyro", "command_line"}),
    ],
)
def test_arrows_point_one_way_even_inside_functions(package: str, forbidden: set[str]) -> None:
    jobs = {file.stem for file in source_files("jobs")} if package == "pipelines" else set()
    own = {file.stem for file in source_files(package)}

    wrong = [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in source_files(package)
        for name in imported(file)
        if name in forbidden | (jobs - own)
    ]

    assert not wrong


def test_mlflow_has_one_door() -> None:
    doors = {"tracking.py", "model_store.py", "served_model.py", "doctor_mlflow.py"}
    doors |= {"promote.py", "promote_report.py", "history.py"}

    wrong = [f.name for f in source_files(*PACKAGES) if "mlflow" in imported(f)]

    assert set(wrong) <= doors


IMPORT_ALL = """
import importlib, pkgutil, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {absent}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
package = importlib.import_module({package!r})
names = [m.name for m in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
for name in names:
    importlib.import_module(name)
print(len(names))
"""


def test_albef_core_imports_where_ray_and_mlflow_are_absent() -> None:
    # timm, which brings torchvision and torch's compiler, is there for starting weights on the hub.
    absent = {"ray", "mlflow", "pipelines", "timm"}
    program = IMPORT_ALL.format(package="albef_core", absent=absent)

    process = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert process.returncode == 0, process.stderr
    assert int(process.stdout) >= 10


@pytest.mark.parametrize("absent", ["mlflow", "torch"])
def test_a_crawl_without_a_run_starts_without(absent: str) -> None:
    program = f"import sys, pipelines.crawl; sys.exit({absent!r} in sys.modules)"

    process = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize(
    "module", ["captions", "tokenizer", "masking", "randaugment", "preprocess", "config", "errors"]
)
def test_what_data_tasks_use_starts_without_torch(module: str) -> None:
    program = f"import sys, albef_core.{module}; sys.exit('torch' in sys.modules)"

    process = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize(
    "module",
    [
        "albef_core.config",
        "pipelines.config",
        "pipelines.ingest_config",
        "pipelines.crawl_config",
        "pipelines.presets",
        "pipelines.registry_config",
    ],
)
def test_configs_need_the_standard_library_only(module: str) -> None:
    # -S leaves out the site packages, so importing anything else cannot succeed.
    process = subprocess.run(
        [sys.executable, "-S", "-c", f"import {module}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )

    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_file_is_longer_than_500_lines(folder: str) -> None:
    lengths = {
        f.name: len(f.read_text(encoding="utf-8").splitlines()) for f in source_files(folder)
    }

    assert {name: length for name, length in lengths.items() if length > 500} == {}


@pytest.mark.parametrize("folder", PACKAGES)
def test_every_file_says_what_it_owns_in_ascii(folder: str) -> None:
    texts = {file: file.read_text(encoding="utf-8") for file in source_files(folder)}

    assert [f.name for f, text in texts.items() if not ast.get_docstring(ast.parse(text))] == []
    assert [f.name for f, text in texts.items() if not text.isascii()] == []


@pytest.mark.parametrize("folder", PACKAGES)
def test_every_test_file_is_named_after_the_source_it_tests(folder: str) -> None:
    tests = [file for file in source_files(f"tests/{folder}") if file.name.startswith("test_")]

    orphans = [str(file.relative_to(ROOT)) for file in tests if not mirrors_a_source(file)]

    assert not orphans


def mirrors_a_source(test: Path) -> bool:
    """test_model.py mirrors model.py, and so does test_model_under_load.py beside it."""
    source = ROOT / test.parent.relative_to(ROOT / "tests")
    stems = [file.stem for file in source.glob("*.py")]
    return any(f"{test.stem}_".startswith(f"test_{stem}_") for stem in stems)


def test_packages_hold_no_drawer_for_odds_and_ends() -> None:
    drawers = {"utils", "util", "common", "misc", "base", "helpers", "queue", "types", "profile"}

    assert [f.name for f in source_files(*PACKAGES) if f.stem in drawers] == []


def test_init_files_hold_a_docstring_only() -> None:
    inits = [f for f in source_files("albef_core", "pipelines") if f.name == "__init__.py"]

    assert [str(f) for f in inits if len(ast.parse(f.read_text()).body) != 1] == []


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Recipe)])
def test_the_table_of_recipes_has_a_row_for_every_field(field: str) -> None:
    table = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")

    assert re.search(rf"^\|.*`{field}`", table, flags=re.MULTILINE)
