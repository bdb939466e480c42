"""The style rules that a machine can check. Each test names the places that break its rule."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tierd import __version__

ROOT = Path(__file__).parents[1]
CODE = ("tierd", "kernels", "engine", "benchmarks", "dashboards", "manual", "pages", "examples", "tests")
MODULES = sorted(file for folder in CODE for file in (ROOT / folder).rglob("*.py"))
TEXTS = [
    file
    for folder in (*CODE, "docs", "requirements", "systemd")
    for file in sorted((ROOT / folder).rglob("*"))
    if file.suffix in {".py", ".md", ".toml", ".txt", ".sh", ".c", ".json", ".yml", ".service", ".socket"}
] + [file for file in ROOT.iterdir() if file.suffix in {".md", ".toml"} or file.name == "Makefile"]
LINES_MAX = 500


def tree(file: Path) -> ast.Module:
    """The syntax tree of one module."""
    return ast.parse(file.read_text(), str(file))


def named(file: Path, line: int = 1) -> str:
    """A place as an editor opens it."""
    return f"{file.relative_to(ROOT)}:{line}"


def in_tierd() -> Iterator[Path]:
    """The daemon's and the client's modules."""
    return (file for file in MODULES if (ROOT / "tierd") in file.parents)


def test_modules_are_short() -> None:
    """A module is one noun; over 500 lines it is two."""
    assert [named(file) for file in MODULES if len(file.read_text().splitlines()) > LINES_MAX] == []


def test_every_module_says_what_it_is() -> None:
    """Each begins with a docstring."""
    assert [named(file) for file in MODULES if not ast.get_docstring(tree(file))] == []


def test_every_test_says_what_it_shows() -> None:
    """A test's name is a claim, and its docstring explains it."""
    silent = [
        named(file, node.lineno)
        for file in MODULES
        if file.name.startswith("test_")
        for node in ast.walk(tree(file))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if node.name.startswith("test_") and not ast.get_docstring(node)
    ]
    assert silent == []


def test_only_the_clock_reads_a_clock() -> None:
    """Time is an argument everywhere else."""
    reads = re.compile(r"\btime\.(monotonic|time|perf_counter)(_ns)?\b|\bfrom time import\b|\.(utc)?now\(\)")
    found = [
        named(file, number)
        for file in in_tierd()
        if file.name != "clock.py"
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if reads.search(line)
    ]
    assert found == []


@pytest.mark.parametrize("banned", ["torch", "triton", "transformers", "pickle"])
def test_the_daemon_does_without(banned: str) -> None:
    """No module of tierd imports these, at the top or anywhere else."""
    imports = re.compile(rf"^\s*(import|from) {banned}\b", flags=re.MULTILINE)
    assert [named(file) for file in in_tierd() if imports.search(file.read_text())] == []


def test_nothing_speaks_of_the_machine_it_was_written_on() -> None:
    """No path of one machine in the repository, and nothing in it needs what lies outside."""
    machine = re.compile(r"(?<![\w.])/(work|root|home/\w+|opt/(pypi|wheels))/|\.\./shared")
    allowed = {"/home/u/"}
    found = [
        named(file, number)
        for file in TEXTS
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if (match := machine.search(line)) and match[0] not in allowed and file != Path(__file__)
    ]
    assert found == []


def test_the_changelog_has_this_version() -> None:
    """A version without an entry tells its users nothing."""
    versions = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert __version__ in versions


def test_every_dependency_is_pinned() -> None:
    """What pyproject.toml asks for is in requirements/ with the one version that was tested."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [(ROOT / "requirements" / f"{name}.txt").read_text() for name in ("runtime", "torch", "engine", "dev")]
    pins = {line.split("==")[0] for text in lists for line in text.splitlines() if "==" in line}
    wanted = [
        *project["dependencies"],
        *(item for extra in project["optional-dependencies"].values() for item in extra),
    ]
    names = {re.split("[<>=]", item)[0] for item in wanted}
    # torch is pinned in install.sh, because which build depends on the machine.
    assert names - pins == {"torch"}


def test_every_warning_and_error_of_the_daemon_is_in_the_runbook() -> None:
    """Whoever reads one in the log at night finds what it means in docs/operations.md."""
    runbook = (ROOT / "docs/operations.md").read_text()
    said = {
        node.args[0].value: named(file, node.lineno)
        for file in in_tierd()
        if ROOT / "tierd/client" not in file.parents
        for node in ast.walk(tree(file))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name)
        if node.func.value.id in ("log", "logger") and node.func.attr in ("warning", "error", "exception")
        if isinstance(node.args[0], ast.Constant)
    }
    assert len(said) > 30
    assert [(place, text) for text, place in said.items() if f"`{text}`" not in runbook] == []
