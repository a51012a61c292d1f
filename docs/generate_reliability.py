"""Writes what docs/reliability.md counts: `python docs/generate_reliability.py [--check]`.

The column `cases` is how many cases pytest collects of the tests that a row names; the table of kills is the newest dated
result of the kill drill. The rest of the page is written by hand. `--check` writes nothing and ends with status 1 where
the page is stale.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "reliability.md"
sys.path.insert(0, str(ROOT))

from benchmarks.results import newest  # noqa: E402 - the repository is put on the path above
from benchmarks.tables import origin  # noqa: E402
from docs.generated_page import write_or_check  # noqa: E402

BEGIN, END = "<!-- kills: written by python docs/generate_reliability.py -->", "<!-- end of kills -->"
TEST = re.compile(r"tests/[\w/]+\.py::\w+")
COUNTS = {
    "inside": "a checkpoint was incomplete then",
    "torn": "and stayed so",
    "relaunched": "started again at once",
    "orphans": "processes that lived on",
    "checkpoints_lost": "complete checkpoints lost",
}


def collected(page: str) -> Counter[str]:
    """Cases of each test of the files that a page names, as pytest collects them; SystemExit where it cannot."""
    files = sorted({name.partition("::")[0] for name in TEST.findall(page)})
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "--import-mode=importlib", "--collect-only", "-q"]
    done = subprocess.run([*command, *files], cwd=ROOT, capture_output=True, text=True, timeout=900)
    if done.returncode:
        raise SystemExit(f"the tests that docs/{PAGE.name} names cannot be collected:\n{done.stdout}{done.stderr}")
    return Counter(found[0] for line in done.stdout.splitlines() if (found := TEST.match(line)))


def counted(page: str, cases: Mapping[str, int]) -> str:
    """The page with the column `cases` filled: the last one of each row that names tests."""

    def row(found: re.Match[str]) -> str:
        return f"{found[1]} {sum(cases.get(name, 0) for name in TEST.findall(found[1]))} |"

    return re.sub(r"^(\|.*::.*\|) *\d* *\|$", row, page, flags=re.MULTILINE)


def kills(result: Mapping[str, Any] | None) -> Iterator[str]:
    """The block of the kill drill."""
    if result is None:
        yield "No dated result of the kill drill lies in `benchmarks/results/` yet."
        return
    found = result["figures"]
    yield (
        f"{found['kills']} kills in runs of {found['steps']} steps on two processes ({origin(result)}). Not counted: "
        f"{found['missed_the_write']} that missed the write at which they were aimed, and {found['after_the_end']} for "
        "which the training had ended before their instant. The last process of a job was gone "
        f"{found['longest_end_s']:g} s after its kill, or sooner.\n"
    )
    yield "| where | victim | kills | " + " | ".join(COUNTS.values()) + " |"
    yield "|" + "---|" * (3 + len(COUNTS))
    for line in found["rows"]:
        yield "| " + " | ".join(str(line[key]) for key in ("where", "victim", "kills", *COUNTS)) + " |"
    yield (
        f"\n{found['curves']} runs were brought to their end under these kills and compared with the undisturbed one, bit "
        f"for bit: {found['differing_curves']} differ. Samples lost or doubled: {found['samples_lost_or_doubled']}. "
        f"Launches refused: {found['refused']}."
    )


def wanted(page: str, cases: Mapping[str, int], result: Mapping[str, Any] | None) -> str:
    """The page as it should be; SystemExit where it has no one place for the counts."""
    block = "\n".join(kills(result))
    text, times = re.subn(
        f"{re.escape(BEGIN)}\n.*?{re.escape(END)}", lambda _: f"{BEGIN}\n\n{block}\n\n{END}", page, flags=re.DOTALL
    )
    if times != 1:
        raise SystemExit(f"docs/{PAGE.name} must hold one block between {BEGIN} and {END}; it holds {times}")
    return counted(text, cases)


def main(arguments: list[str] | None = None) -> int:
    """Write the page, or say whether it is stale."""
    page = PAGE.read_text(encoding="utf-8")
    return write_or_check(PAGE, wanted(page, collected(page), newest().get("kills")), __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
