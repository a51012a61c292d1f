"""Where a finished fold lies, and what its files say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from roadwork.errors import UserError

COMPLETE = "COMPLETE"


def fold_path(folder: Path, fold: int) -> Path:
    """Where a fold's adapter lies when it is done."""
    return folder / f"fold-{fold}"


def is_done(folder: Path, fold: int) -> bool:
    """True where the fold's folder is complete."""
    return (fold_path(folder, fold) / COMPLETE).is_file()


def read_fold(path: Path) -> dict[str, Any]:
    """fold.json of a finished fold: its epochs and what it was made from. Raises UserError where it is damaged."""
    found = _read(path / "fold.json")
    if not (
        isinstance(found, dict)
        and isinstance(found.get("folds"), dict)
        and isinstance(found["folds"].get("num_folds"), int)
        and isinstance(found.get("base"), str)
    ):
        raise _damaged(path / "fold.json", "it does not say what the fold was made from")
    return found


def read_held_out(path: Path) -> list[dict[str, Any]]:
    """held_out.json of a finished fold: id, fold, label and probability of each photo. Raises UserError for damage."""
    rows = _read(path / "held_out.json")
    if not (isinstance(rows, list) and all(isinstance(row, dict) and "id" in row for row in rows)):
        raise _damaged(path / "held_out.json", "it is no list of photos")
    return rows


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(path, str(error)) from None


def _damaged(path: Path, why: str) -> UserError:
    return UserError(f"{path} is damaged ({why}); remove {path.parent} and run launch/dora_folds.py again")
