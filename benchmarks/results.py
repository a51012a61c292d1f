"""What benchmarks print, and dated results: one JSON file per benchmark and day, with the commit and the machine of it."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def commit() -> str:
    """The commit of this checkout; `+changes` where files other than results differ from it, `unknown` outside a checkout."""
    try:
        return _git("rev-parse", "--short=12", "HEAD") + ("+changes" if _git(*DIFFERING) else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


DIFFERING = ("diff", "HEAD", "--name-only", "--", ":/", ":(exclude,top)benchmarks/results")


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def machine() -> dict[str, Any]:
    """Processor, cores, memory, GPU and the versions that a figure depends on. No host name."""
    import torch

    cpu = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), ""
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "processor": cpu or platform.machine(),
        "cores": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": round(memory, 1),
        "load": round(os.getloadavg()[0], 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "timm", "accelerate", "deepspeed")},
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def provenance() -> dict[str, Any]:
    """Day, commit and machine, with the load that it has: to be asked before a benchmark begins."""
    return {"date": datetime.date.today().isoformat(), "commit": commit(), "machine": machine()}


def save(name: str, figures: dict[str, Any], command: str, began: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write `folder/YYYY-MM-DD-NAME.json`; a later result of the same day replaces it. `began`: `provenance` at its start."""
    record = {"name": name, **began, "command": command}
    path = folder / f"{began['date']}-{name}.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**record, "figures": figures}, indent=1, allow_nan=False) + "\n")
    return path


def tell(figures: dict[str, Any], only_json: bool) -> None:
    """Print a benchmark's figures; the last line is one JSON object."""
    if not only_json:
        for name, value in figures.items():
            sys.stdout.write(f"{name:24} {value}\n")
    sys.stdout.write(json.dumps(figures) + "\n")


def newest(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """The newest result of each benchmark by name; names are sorted."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("????-??-??-*.json"))]
    return dict(sorted({record["name"]: record for record in found}.items()))
