"""What `make demo` came to: `python -m benchmarks.demo [--run runs/demo] [--json]`.

Nothing is run: MCC of every system on the embedded benchmark's held-out test groups, with its interval over groups, from
the run's evaluation.json, and the seconds of each stage as the pipeline noted them. `minutes` is their sum.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.results import tell


def main(argv: list[str] | None = None) -> int:
    """Read and print; the last line is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="run folder with evaluation.json")
    parser.add_argument("--json", action="store_true", help="only the JSON line")
    options = parser.parse_args(argv)
    if not (options.run / "evaluation.json").is_file():
        parser.error(f"{options.run} holds no evaluation.json: run `make demo`, or give the --run that has one")
    tell(read(options.run), options.json)
    return 0


def read(run: Path) -> dict[str, Any]:
    """All figures of a run that the pipeline brought to its end."""
    evaluation = json.loads((run / "evaluation.json").read_text())
    stages = {path.stem: json.loads(path.read_text())["seconds"] for path in sorted(run.glob("stages/*.json"))}
    figures: dict[str, Any] = {"chosen": evaluation["chosen"], "split": evaluation["split"]}
    for row in evaluation["systems"]:
        low, high = row["mcc_interval"] or (None, None)
        found = {"mcc": row["mcc"], "low": low, "high": high}
        names = [row["name"], *(["chosen"] if row["chosen"] else [])]
        figures |= {
            f"{name}_{key}": value if value is None else round(value, 4)
            for name in names
            for key, value in found.items()
        }
        figures |= {key: row[key] for key in ("n", "groups")}
    return figures | {"minutes": round(sum(stages.values()) / 60, 2), "stages_s": stages}


if __name__ == "__main__":
    sys.exit(main())
