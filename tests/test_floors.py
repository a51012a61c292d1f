"""Packages stand on floors: each imports from lower ones alone, so that no import runs upwards, sideways or in a circle."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("roadwork", "shards", "launch", "benchmarks")
PART_OF = {"config_checks": "config", "config_ranges": "config"}
"""Modules that are one subject with another: they are named by its name."""


def floors() -> dict[str, int]:
    """Floor of each room, as CONTRIBUTING.md names them from the ground: semicolons part floors."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (said,) = re.findall(r"From the ground: (.*?)\.\n", text, flags=re.S)
    parts = [re.findall(r"`([\w/]+?)/?`", part) for part in said.split(";")]
    return {room: floor for floor, rooms in enumerate(parts) for room in rooms}


def room(module: str) -> str:
    """`roadwork.data.index` is in `data`, `launch.serve` in `launch`."""
    parts = module.split(".")
    name = parts[1] if parts[0] == "roadwork" and len(parts) > 1 else parts[0]
    return PART_OF.get(name, name)


def imports(text: str) -> Iterator[tuple[int, str]]:
    """(line, module) of every import, also of those within functions and for types alone."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "roadwork":
            yield from ((node.lineno, f"roadwork.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.lineno, node.module or ""


def faults(module: str, text: str, at: dict[str, int]) -> list[str]:
    """Line and reason of every import that does not lead to a lower floor."""
    mine, found = room(module), []
    for line, name in imports(text):
        theirs = room(name)
        if name == "roadwork" or name.split(".")[0] not in FOLDERS or theirs == mine:
            continue
        if at[theirs] >= at[mine]:
            found.append(f"{module}:{line} imports {name}: {theirs} is no lower than {mine}")
    return found


MODULES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py") if path.parent.name != "roadwork")
MODULES += sorted(path for path in (ROOT / "roadwork").glob("*.py") if path.stem != "__init__")


def test_every_room_has_a_floor() -> None:
    names = {room(".".join(path.relative_to(ROOT).with_suffix("").parts)) for path in MODULES}
    assert names == set(floors()), "CONTRIBUTING.md names the floors of other rooms than there are"


def test_imports_go_downwards_only() -> None:
    at, found = floors(), []
    for path in MODULES:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found += faults(module, path.read_text(encoding="utf-8"), at)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "line",
    [
        "from roadwork.training.loop import Trainer",
        "from roadwork import training",
        "import roadwork.pipeline",
        "def f():\n    from roadwork.training import loop",
        "import launch.serve",
    ],
)
def test_the_search_finds_what_it_looks_for(line: str) -> None:
    assert faults("roadwork.inference.members", line, floors())


def test_the_drawing_shows_the_same_floors() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    drawing = text.partition("```mermaid\n")[2].partition("```")[0]
    boxes = [re.findall(r"\w+", label) for label in re.findall(r'\["(.*?)"\]', drawing)]
    at = floors()
    wanted = [sorted(name for name in at if at[name] == floor) for floor in range(max(at.values()) + 1)]
    assert [sorted(box) for box in boxes] == wanted
