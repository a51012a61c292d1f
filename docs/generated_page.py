"""What the pages share that a script writes: they are written, or checked."""

from __future__ import annotations

import argparse
from pathlib import Path


def write_or_check(page: Path, wanted: str, description: str | None, arguments: list[str] | None = None) -> int:
    """The command line of a page's script: writes the page; with `--check` only says whether it is stale.

    Args:
        page: the file.
        wanted: what belongs into it.
        description: of the script, for `--help`.
        arguments: instead of the command line's.

    Returns:
        exit status: 1 where `--check` finds a stale page.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 where the page is stale")
    check = parser.parse_args(arguments).check
    if check and (not page.is_file() or page.read_text(encoding="utf-8") != wanted):
        print(f"docs/{page.name} is stale; run `python docs/generate_{page.stem}.py`")
        return 1
    if not check:
        page.write_text(wanted, encoding="utf-8")
    return 0
