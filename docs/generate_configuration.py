"""Writes docs/configuration.md from the options themselves: `python docs/generate_configuration.py [--check]`.

`--check` writes nothing and ends with status 1 where the file is stale.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "configuration.md"
sys.path.insert(0, str(ROOT))

from docs.generated_page import write_or_check  # noqa: E402 - the repository is put on the path above
from roadwork import config as options  # noqa: E402

HEAD = """# Configuration

<!-- Written by `python docs/generate_configuration.py` from roadwork/config.py. Do not edit: change the code instead. -->

Every stage in `launch/` knows all options below. `--help` shows the same list, `--print_config` the values in force.

- On the command line: `--training.global_batch 64`. In a file given by `--config FILE`: nested YAML. The command line wins.
- Lists: `--model.metadata_fields '[gps, weather]'`. True and false: `--data.gps_weighted false`; `--masks.tiles`: true.
- An unknown name or a wrong type ends with status 2 and one line that names the nearest option.
- `dora_folds`, `predict`, `evaluate` and `pseudo_masks` start from `RUN/config.yaml` when `--run.dir RUN` is given without
  `--config`. So they see the options that the model was trained with.
- Besides these: `--config FILE`, `--print_config`, `--dry_run` (check and describe the run, then stop) and `--help`.
"""


def described(kind: type) -> dict[str, str]:
    """Field -> the text that stands under it in the source."""
    body = ast.parse(inspect.getsource(kind)).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for node, after in zip(body.body, body.body[1:], strict=False):
        if isinstance(node, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            assert isinstance(node.target, ast.Name)
            found[node.target.id] = " ".join(str(after.value.value).split())
    return found


def type_name(kind: Any) -> str:
    """How a person would write a type."""
    origin = typing.get_origin(kind)
    if origin is typing.Literal:
        return "one of " + ", ".join(str(value) for value in typing.get_args(kind))
    if origin in (list, tuple):
        inner = typing.get_args(kind)
        return f"list of {type_name(inner[0])}" if origin is list else f"{len(inner)} x {type_name(inner[0])}"
    return {"str": "text", "bool": "true or false", "int": "whole number", "float": "number"}[kind.__name__]


def shown(value: Any) -> str:
    """A default as it is written in YAML."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "[" + ", ".join(shown(item) for item in value) + "]"
    if isinstance(value, float):
        return f"{value:.4g}"
    return '""' if value == "" else str(value)


def rows(kind: type, prefix: str) -> Iterator[str]:
    """Table rows of the options of one section."""
    hints, words, made = typing.get_type_hints(kind), described(kind), kind()
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[field.name]):
            continue
        text = words[field.name].replace("|", "\\|")
        default = shown(getattr(made, field.name))
        yield f"| `--{prefix}{field.name}` | {type_name(hints[field.name])} | `{default}` | {text} |"


def page() -> str:
    """The whole file."""
    hints = typing.get_type_hints(options.Config)
    table = "| option | type | default | meaning |\n|---|---|---|---|\n"
    parts = [HEAD, "## Top level\n\n" + table + "\n".join(rows(options.Config, "")) + "\n"]
    for field in dataclasses.fields(options.Config):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            assert isinstance(kind, type)
            title = f"## `{field.name}`\n\n{' '.join((kind.__doc__ or '').split())}\n\n"
            parts.append(title + table + "\n".join(rows(kind, f"{field.name}.")) + "\n")
    return "\n".join(parts)


def main(arguments: list[str] | None = None) -> int:
    """Write the page, or say whether it is stale."""
    return write_or_check(PAGE, page(), __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
