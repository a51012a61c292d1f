"""Every benchmark, one after the other: `python -m benchmarks.run_all [--only order,loader] [--quick] [--run RUN]`

Each runs in a process of its own; its JSON line goes to `benchmarks/results/` with commit, machine and date. Give the
machine to it alone: a result holds the load that it began under. Benchmarks of a run read `--run` (what `make demo`
made). One that fails is named at the end, and the others are still run; the status is then 1.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import RESULTS, ROOT, provenance, save

NOT_BENCHMARKS = {
    "__init__",
    "run_all",
    "results",
    "tables",
    "paired",
    "ablation_variants",
    "headlines",
    "references",
    "augment_errors",
    "augment_sheet",
    "loader_clock",
    "loader_peers",
    "training_run",
    "photographs",
    "photograph_set",
    "scaling_probe",
    "scaling_real",
    "step_parts",
}
"""Modules of this folder without a figure of their own, and one that needs photographs of yours."""


@dataclass(frozen=True)
class Words:
    """Arguments of a benchmark beside `--json`; RUN, SHARDS and MODEL stand for the folders that are given."""

    always: tuple[str, ...] = ()
    quick: tuple[str, ...] = ()
    gpu: tuple[str, ...] = ()
    """Besides, where CUDA is there."""


ARGUMENTS: dict[str, Words] = {
    "ablation": Words((), ("--quick",)),
    "augment": Words(gpu=("--sizes", "518,512,128")),  # 518: the sketch's views
    "buckets": Words((), ("--rounds", "1", "--steps", "1")),
    "build": Words((), ("--photos", "60", "--rounds", "1")),
    "demo": Words(("--run", "RUN")),
    "fairness": Words(("--photos", "860"), ("--photos", "240")),  # the photos of the demo
    "folds": Words(("--run", "RUN", "--shards", "SHARDS"), ("--folds", "2", "--epochs", "2")),
    "loader": Words((), ("--rounds", "1", "--batches", "10")),
    "masks": Words(),
    "order": Words((), ("--big", "1000000")),
    "serve": Words(("--model", "MODEL")),
    "tta": Words(("--run", "RUN", "--shards", "SHARDS"), ("--photos", "8", "--augmentations", "4")),
    "train_step": Words(gpu=("--profile", "--model.compile=true")),
}
"""What differs from `python -m benchmarks.NAME --json`."""


def names() -> list[str]:
    """Every benchmark of this folder, the long night last."""
    found = {path.stem for path in Path(__file__).parent.glob("*.py")} - NOT_BENCHMARKS
    return sorted(found, key=lambda name: (name == "ablation", name))


def command(name: str, options: argparse.Namespace) -> list[str]:
    """Words behind `python` that run a benchmark."""
    words = ARGUMENTS.get(name, Words())
    places = {"RUN": options.run, "SHARDS": options.shards or f"{options.run}/shards", "MODEL": f"{options.run}/model"}
    chosen = [*words.always, *(words.quick if options.quick else ())]
    chosen += words.gpu if torch.cuda.is_available() else ()
    if name == "loader" and options.peers_venv:
        chosen += ["--peers-venv", options.peers_venv]
    return ["-m", f"benchmarks.{name}", *(places.get(word, word) for word in chosen), "--json"]


def last_json_line(text: str) -> dict[str, Any] | None:
    """The object on the last line that is not empty; None where there is none."""
    try:
        found = json.loads(text.strip().splitlines()[-1])
    except (IndexError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def run(name: str, options: argparse.Namespace) -> str:
    """Run one and keep its result; an empty string, or what went wrong."""
    words = command(name, options)
    print(f"python {' '.join(words)}", flush=True)
    began = provenance()
    done = subprocess.run([sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    figures = last_json_line(done.stdout)
    if figures is None:
        return f"{name}: status {done.returncode} and no JSON line"
    told = ["DIR" if word == options.peers_venv else word for word in words]  # a place of this machine says nothing
    path = save(name, figures, f"python {' '.join(told)}", began, options.results)
    print(f"  {path}", flush=True)
    return f"{name}: status {done.returncode}" if done.returncode else ""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", help="comma-separated names (default: all)")
    p.add_argument("--quick", action="store_true", help="small forms, to see that everything runs")
    p.add_argument("--run", default="runs/demo", help="run folder with best/ and folds/")
    p.add_argument("--shards", help="default: RUN/shards")
    p.add_argument("--peers-venv", help="environment of `litdata` and `streaming`, for the loader")
    p.add_argument("--results", type=Path, default=RESULTS, help="folder of the dated results")
    return p


def main(argv: list[str] | None = None) -> int:
    """Run them one after the other; SystemExit for one that is unknown."""
    options = parser().parse_args(argv)
    wanted = options.only.split(",") if options.only else names()
    if unknown := set(wanted) - set(names()):
        raise SystemExit(f"unknown benchmarks {', '.join(sorted(unknown))}; there are: {', '.join(names())}")
    faults = [fault for name in wanted if (fault := run(name, options))]
    print("\n".join(faults) or "all results are written; `python -m benchmarks.tables` shows them in README.md")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
