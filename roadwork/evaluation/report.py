"""report/index.html: one self-contained page from what lies in a run folder. What is missing is said, never guessed."""

from __future__ import annotations

import base64
import csv
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml
from matplotlib.figure import Figure

from roadwork.evaluation import metrics, plots
from roadwork.evaluation.errors import join
from roadwork.evaluation.photos import photos
from roadwork.monitoring.runlog import read_last_per_step, read_lines

TEMPLATES = Path(__file__).parent / "templates"
_LONGEST_TABLE = 60


def write_report(run: str | os.PathLike[str], *, shards: Any = None, scored: Any = None, train: Any = None) -> Path:
    """Writes RUN/report/index.html (atomically) and returns its path.

    run: the run folder. shards: the folder of shards (default: `data.shards` of config.yaml). scored, train: shard
    indexes of the scored and the training split, for photos and the map; without them those parts say that they are
    missing.
    """
    folder = Path(run)
    page = render(collect(folder, shards=shards, scored=scored, train=train))
    target = folder / "report" / "index.html"
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(target)
    return target


def render(content: Mapping[str, Any]) -> str:
    """The page from what `collect` gathered."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters.update(number=number, interval=interval, share=share, words=words)
    return environment.get_template("report.html").render(**content)


def collect(folder: Path, *, shards: Any = None, scored: Any = None, train: Any = None) -> dict[str, Any]:
    """Everything that the page shows, as plain values and PNG data links. Missing files give None."""
    config = read_yaml(folder / "config.yaml")
    shard_folder = Path(shards) if shards else Path((config or {}).get("data", {}).get("shards", "") or "missing")
    evaluation = read_json(folder / "evaluation.json")
    manifest = read_json(shard_folder / "manifest.json")
    details = read_json(folder / "predict_details.json")
    model = read_json(folder / "model" / "config.json") or read_json(folder / "best" / "config.json")
    log = read_last_per_step(folder / "metrics.jsonl")
    pictures = photos(scored, evaluation["errors"]) if scored is not None and evaluation else {}
    return {
        "run": folder.name or str(folder),
        "evaluation": evaluation,
        "best": next((s for s in (evaluation or {}).get("systems", []) if s["chosen"]), None),
        "weights": (model or {}).get("weights_origin"),
        "manifest": manifest,
        "target": target_words(manifest),
        "details": flattened(details, _LONGEST_TABLE) if details else None,
        "decisions": decisions(details),
        "training": training(log),
        "curves": curves(log, read_last_per_step(folder / "validation.jsonl")),
        "figures": figures(folder, evaluation, details, manifest, scored, train),
        "photos": {name: data_link(data, "image/jpeg") for name, data in pictures.items()},
        "rejected": rejected(shard_folder),
        "skipped": skipped(folder),
        "checkpoints": checkpoints(folder),
        "folds": sorted(p.name for p in folder.glob("folds/fold-*") if p.is_dir()),
        "fairness": read_json(folder / "fairness.json"),
        "challenge": (evaluation or {}).get("challenge"),
        "config": flattened(config) if config else None,
    }


# --- reading ----------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> Any:
    """Content of a JSON file, or None where it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def read_yaml(path: Path) -> dict[str, Any] | None:
    """Content of a YAML file that holds a mapping, or None."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return None
    return content if isinstance(content, dict) else None


def read_probabilities(path: Path, column: str = "probability") -> dict[str, float]:
    """{id: probability} of a predictions file; empty where the file or the column is missing."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return {row["id"]: float(row[column]) for row in csv.DictReader(file) if row.get(column)}
    except (OSError, KeyError, ValueError):
        return {}


def rejected(shards: Path) -> dict[str, Any] | None:
    """Counts by reason of what the build left out, with the first few; None where the file is missing."""
    path = shards / "rejected.jsonl"
    if not path.is_file():
        return None
    lines = list(read_lines(path))
    reasons = Counter(str(line.get("reason", "unknown")).partition(":")[0] for line in lines)
    return {"total": len(lines), "reasons": reasons.most_common(), "examples": lines[:5]}


def skipped(folder: Path) -> list[dict[str, Any]] | None:
    """Samples that could not be read in training; None where nothing was written."""
    path = folder / "skipped.jsonl"
    return list(read_lines(path))[:200] if path.is_file() else None


def checkpoints(folder: Path) -> list[dict[str, Any]]:
    """Checkpoints and saved models with their bytes and whether they are complete."""
    found = []
    for path in [*sorted(folder.glob("checkpoints/step-*")), folder / "best", folder / "model"]:
        if path.is_dir():
            size = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
            whole = (path / "COMPLETE").exists() or path.parent.name != "checkpoints"
            found.append({"name": str(path.relative_to(folder)), "mib": size / 2**20, "complete": whole})
    return found


def training(log: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The last step's figures and totals; None without a line."""
    if not log:
        return None
    rates = [r["images_per_s"] for r in log if isinstance(r.get("images_per_s"), int | float)]
    return {
        "steps": log[-1]["step"],
        "samples": log[-1].get("samples_seen"),
        "epochs": log[-1].get("epoch"),
        "loss": log[-1].get("loss"),
        "images_per_s": float(np.median(rates)) if rates else None,
        "skipped": sum(r.get("skipped_samples") or 0 for r in log),
        "nonfinite": sum(bool(r.get("nonfinite")) for r in log),
    }


def decisions(details: Any) -> list[dict[str, Any]]:
    """Whether TTA and ensemble are on, and the paired differences that said so."""
    rows = []
    for name in ("tta", "ensemble"):
        line = (details or {}).get(name)
        if isinstance(line, Mapping):
            rows.append(
                {"name": name, **{k: line.get(k) for k in ("used", "mode", "difference", "low", "high", "reason")}}
            )
    return rows


# --- pictures ---------------------------------------------------------------------------------------------------------


def data_link(data: bytes, kind: str = "image/png") -> str:
    """A data: link that a page can hold."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _linked(figure: Figure | None) -> str | None:
    return None if figure is None else data_link(plots.png(figure))


def curves(log: Sequence[Mapping[str, Any]], validations: Sequence[Mapping[str, Any]] = ()) -> list[tuple[str, str]]:
    """(title, picture) of curves with values: of metrics.jsonl, and of validation.jsonl (step, mcc, low, high)."""
    wanted = [
        (log, "Loss and its terms", ("loss", "focal", "consistency", "weather", "segmentation"), "loss"),
        (validations, "Validation MCC with its interval", ("mcc", "low", "high"), "MCC"),
        (log, "Learning rate", ("lr",), "learning rate"),
        (log, "Gradient norm", ("grad_norm",), "norm"),
        (log, "Images per second", ("images_per_s",), "images/s"),
        (log, "Waiting for data", ("data_wait_s",), "seconds"),
    ]
    drawn = [(title, _linked(plots.curves_figure(lines, names, unit))) for lines, title, names, unit in wanted]
    return [(title, link) for title, link in drawn if link is not None]


def figures(
    folder: Path, evaluation: Any, details: Any, manifest: Any, scored: Any, train: Any
) -> dict[str, str | None]:
    """Confusion, reliability, precision and recall, systems and map, each a link or None."""
    found: dict[str, str | None] = dict.fromkeys(("confusion", "reliability", "recall", "systems", "map"))
    if evaluation and evaluation["systems"]:
        rows = [(s["name"], s["mcc"], s["mcc_interval"]) for s in evaluation["systems"]]
        found["systems"] = _linked(plots.intervals_figure(rows))
    centres = (manifest or {}).get("clusters") or ()
    if train is not None:
        held = None if scored is None else (np.asarray(scored.latitude), np.asarray(scored.longitude))
        found["map"] = _linked(plots.map_figure(train.latitude, train.longitude, train.gps_weight, centres, held))
    predicted = evaluation and read_probabilities(folder / evaluation.get("predictions", "predictions.csv"))
    if scored is None or not predicted:
        return found
    ids = {str(i) for i in scored.id}
    joined = join(scored, {name: p for name, p in predicted.items() if name in ids})
    found["confusion"] = _linked(plots.confusion_figure(joined.label, joined.probability))
    found["recall"] = _linked(plots.precision_recall_figure(joined.label, joined.probability))
    before = uncalibrated(joined.probability, details)
    weights = metrics.prior_weights(joined.label, evaluation["prior"])
    found["reliability"] = _linked(plots.reliability_figure(joined.label, joined.probability, before, weights))
    return found


def uncalibrated(probability: Any, details: Any) -> Any:
    """Probabilities [N] before `calibration` {temperature, bias} of predict_details.json, or None without one."""
    fitted = (details or {}).get("calibration")
    if not isinstance(fitted, Mapping) or not {"temperature", "bias"} <= set(fitted):
        return None
    p = np.clip(np.asarray(probability, dtype=np.float64), 1e-12, 1 - 1e-12)
    odds = (np.log(p) - np.log1p(-p) - float(fitted["bias"])) * float(fitted["temperature"])
    return 1 / (1 + np.exp(-np.clip(odds, -60, 60)))


# --- words ------------------------------------------------------------------------------------------------------------


def flattened(tree: Any, most: int = 10_000, prefix: str = "") -> list[tuple[str, str]]:
    """(dotted name, text) of a nested mapping's leaves, at most `most` of them."""
    rows: list[tuple[str, str]] = []
    for name, value in tree.items():
        if isinstance(value, Mapping):
            rows += flattened(value, most, f"{prefix}{name}.")
        else:
            text = number(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False, default=str)
            rows.append((f"{prefix}{name}", text if len(text) <= 200 else text[:197] + "..."))
    return rows[:most]


def target_words(manifest: Any) -> str:
    """The target region of the weights in a few words."""
    target = (manifest or {}).get("target")
    if not isinstance(target, Mapping):
        return "unknown (no manifest)"
    told = [f"{name} {words(v) if isinstance(v, list) else v}" for name, v in target.items() if v not in (None, "", [])]
    return "; ".join(told)[:300]


def number(value: Any, digits: int = 3) -> str:
    """A figure for a table; a dash where there is none."""
    if value is None or value == "":
        return "–"
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.{digits}f}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.{digits}g}"


def interval(ends: Sequence[float] | None) -> str:
    """An interval for a table; says where there is none."""
    return "no interval" if ends is None else f"{ends[0]:.3f} to {ends[1]:.3f}"


def share(value: Any) -> str:
    """A share in per cent."""
    return "–" if value is None else f"{100 * value:.1f} %"


def words(values: Iterable[Any]) -> str:
    """Comma-separated."""
    return ", ".join(str(v) for v in values)
