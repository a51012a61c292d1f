"""report/index.html: one self-contained page from what lies in a run folder. What is missing is said, never guessed."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml
from matplotlib.figure import Figure
from PIL import Image

from roadwork.data.index import MANIFEST, place_of
from roadwork.data.store import Store, open_store
from roadwork.evaluation import plots
from roadwork.evaluation.figures import evaluation_figures
from roadwork.evaluation.photos import attention_words, jpeg, worst_photos
from roadwork.losses import TERMS
from roadwork.monitoring.runlog import read_last_per_step, read_lines

TEMPLATES = Path(__file__).parent / "templates"
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
FITTED = {
    "train": "The network was trained on this split: these figures are optimistic.",
    "val": "This split chose the weights, the systems and the calibration: these figures are optimistic.",
}
"""What a result is told to be where its split, of the shards that the run was trained on, had a part in making it."""
_LONGEST_TABLE, _SKIPPED_SHOWN = 60, 200


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
    environment.filters["attention"] = attention_words
    environment.filters.update(number=number, interval=interval, share=share, words=words, sentence=sentence)
    return environment.get_template("report.html").render(**content)


def collect(folder: Path, *, shards: Any = None, scored: Any = None, train: Any = None) -> dict[str, Any]:
    """Everything that the page shows, as plain values and PNG data links. Missing files give None."""
    config = read_yaml(folder / "config.yaml")
    trained_on = (config or {}).get("data", {}).get("shards", "")
    shards = shards or trained_on or "missing"
    store = open_store(shards)
    evaluation = read_json(folder / "evaluation.json")
    manifest = stored_json(store, MANIFEST)
    details = read_json(folder / "predict_details.json")
    model = read_json(folder / "model" / "config.json") or read_json(folder / "best" / "config.json")
    log = read_last_per_step(folder / "metrics.jsonl")
    weighted = (config or {}).get("data", {}).get("gps_weighted", True)
    pictures = worst_photos(scored, evaluation["errors"]) if scored is not None and evaluation else {}
    return {
        "run": folder.name or str(folder),
        "evaluation": evaluation,
        "best": next((s for s in (evaluation or {}).get("systems", []) if s["chosen"]), None),
        "alone": pixels_alone(evaluation),
        **part_in_training((evaluation or {}).get("split", ""), shards, trained_on),
        "weights": (model or {}).get("weights_origin"),
        "manifest": manifest,
        "target": target_words(manifest),
        "details": flattened(details, _LONGEST_TABLE) if details else None,
        "decisions": decisions(details),
        "calibrations": calibrations(details),
        "training": training(log),
        "curves": curves(log, read_last_per_step(folder / "validation.jsonl")),
        "figures": figures(folder, evaluation, details, manifest, scored, train, weighted),
        "photos": {name: data_link(jpeg(pixels), "image/jpeg") for name, pixels in pictures.items()},
        "masks": pseudo_masks([*mask_folders(folder, config, manifest)]),
        "rejected": rejected(store),
        "skipped": skipped(folder),
        "spikes": read_last_per_step(folder / "spikes.jsonl"),
        "checkpoints": checkpoints(folder),
        "folds": sorted(p.name for p in folder.glob("folds/fold-*") if p.is_dir()),
        "fairness": fairness(folder, manifest),
        "challenge": challenge(folder, evaluation, shards),
        "config": flattened(config) if config else None,
    }


# --- reading ----------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> Any:
    """Content of a JSON file, or None where it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def stored_json(store: Store, name: str) -> Any:
    """The same of a file beside the shards."""
    try:
        return json.loads(store.read(name))
    except (OSError, ValueError):
        return None


def read_yaml(path: Path) -> dict[str, Any] | None:
    """Content of a YAML file that holds a mapping, or None."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return None
    return content if isinstance(content, dict) else None


def fairness(folder: Path, manifest: Any) -> dict[str, Any] | None:
    """Figures of `benchmarks.fairness`: those of this very run, else, for photos of the embedded benchmark, the newest
    dated result of the repository with the day and commit it is from.
    """
    own = read_json(folder / "fairness.json")
    source = (manifest or {}).get("source", {})
    if own or not str(source.get("spec", "")).startswith("street"):
        return own or None
    results = sorted(RESULTS.glob("????-??-??-fairness.json"))
    record = read_json(results[-1]) if results else None
    return record and record["figures"] | {"measured": f"measured on {record['date']} at commit {record['commit']}"}


def challenge(folder: Path, evaluation: Any, shards: Any) -> dict[str, Any] | None:
    """The standing on the photos of this evaluation: its own, else that of prediction where it asked the same ones."""
    own: dict[str, Any] | None = (evaluation or {}).get("challenge")
    found = read_json(folder / "challenge.json")
    if own or not evaluation or not isinstance(found, dict):
        return own
    same = {"split": evaluation["split"], "shards": place_of(shards)}
    return found if same.items() <= found.items() else None


def read_probabilities(path: Path, column: str = "probability") -> dict[str, float]:
    """{id: probability} of a predictions file; empty where the file or the column is missing."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return {row["id"]: float(row[column]) for row in csv.DictReader(file) if row.get(column)}
    except (OSError, KeyError, ValueError):
        return {}


def mask_folders(folder: Path, config: Any, manifest: Any) -> Iterator[Path]:
    """Where pseudo-masks of this run may lie: as configured, in the run folder, or where the shards' masks came from."""
    for name in (
        (config or {}).get("masks", {}).get("out"),
        folder / "masks",
        (manifest or {}).get("masks_updated_from"),
    ):
        if name:
            yield Path(name)


def pseudo_masks(folders: Iterable[Path]) -> dict[str, Any] | None:
    """What the labelling stage found out about its masks, from the first folder that has its quality.json; else None.

    One row per class: shares of photos that show it, IoU and kappa against exact masks and against another backend.
    """
    for folder in folders:
        found = read_json(folder / "about" / "quality.json")
        if isinstance(found, dict) and {"by_label", "looked_at", "with_masks", "origins", "suspicious"} <= found.keys():
            break
    else:
        return None
    shares = {label: group.get("share_with", {}) for label, group in found["by_label"].items()}
    exact, other = ((found.get(name) or {}).get("classes", {}) for name in ("exact", "agreement"))
    classes = list(dict.fromkeys(name for by_class in shares.values() for name in by_class))
    rows = [
        {
            "name": name,
            **{label: by_class.get(name) for label, by_class in shares.items()},
            "exact": exact.get(name) or {},
            "other": other.get(name) or {},
        }
        for name in classes
    ]
    sheet = folder / "about" / "quality.png"
    return {
        **found,
        "folder": folder.name,
        "rows": rows,
        "summary": read_json(folder / "about" / "summary.json") or {},
        "sheet": jpeg_link(sheet) if sheet.is_file() else None,
    }


def rejected(shards: Store) -> dict[str, Any] | None:
    """Counts by reason of what the build left out, with the first few; None where the file is missing."""
    try:
        with shards.fetched("rejected.jsonl") as path:
            lines = list(read_lines(path))
    except OSError:
        return None
    reasons = Counter(str(line.get("reason", "unknown")).partition(":")[0] for line in lines)
    return {"total": len(lines), "reasons": reasons.most_common(), "examples": lines[:5]}


def skipped(folder: Path) -> dict[str, Any] | None:
    """How many samples could not be read in training, with the first few; None where no file names any."""
    path = folder / "skipped.jsonl"
    lines = list(read_lines(path)) if path.is_file() else []
    return {"total": len(lines), "first": lines[:_SKIPPED_SHOWN]} if lines else None


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
        "skipped": int(sum(r.get("skipped_samples") or 0 for r in log)),
        "nonfinite": sum(r.get("nonfinite_steps") or 0 for r in log),
    }


def pixels_alone(evaluation: Any) -> list[Mapping[str, Any]]:
    """Scores on pixels alone and on one 224 px view, which stand beside the chosen system's own."""
    rows = [s for s in (evaluation or {}).get("systems", []) if s["name"].startswith("image_only") and not s["chosen"]]
    return sorted(rows, key=lambda row: str(row["name"]))


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


def calibrations(details: Any) -> dict[str, Any] | None:
    """Each system's scores on the held-out groups before and after calibration, from predict_details.json, or None."""
    held_out, systems = ((details or {}).get(name) for name in ("held_out", "systems"))
    if not isinstance(held_out, Mapping) or not isinstance(systems, Mapping) or not held_out.get("photos"):
        return None
    rows = [
        {"name": name, "chosen": name == details.get("chosen"), **figures}
        for name, figures in systems.items()
        if isinstance(figures, Mapping) and {"before", "after", "temperature", "bias"} <= figures.keys()
    ]
    return {"held_out": held_out, "rows": rows} if rows else None


# --- pictures ---------------------------------------------------------------------------------------------------------


def data_link(data: bytes, kind: str = "image/png") -> str:
    """A data: link that a page can hold."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def jpeg_link(path: Path) -> str | None:
    """A picture file as a JPEG link, or None where it is damaged: photos as PNG would make the page many times larger."""
    try:
        with Image.open(path) as picture:
            buffer = io.BytesIO()
            picture.convert("RGB").save(buffer, "JPEG", quality=85)
    except OSError:
        return None
    return data_link(buffer.getvalue(), "image/jpeg")


def _linked(figure: Figure | None) -> str | None:
    return None if figure is None else data_link(plots.png(figure))


def curves(log: Sequence[Mapping[str, Any]], validations: Sequence[Mapping[str, Any]] = ()) -> list[tuple[str, str]]:
    """(title, picture) of curves with values: of metrics.jsonl, and of validation.jsonl (step, mcc, low, high and, where
    it chose, challenge_mcc).
    """
    terms = [name for name in TERMS if any(line.get(name) for line in log)]  # 0 throughout: the run has it not
    wanted = [
        (log, "Loss and its terms", terms, "loss"),
        (validations, "Validation MCC with its interval", ("mcc", "low", "high", "challenge_mcc"), "MCC"),
        (log, "Learning rate", ("lr",), "learning rate"),
        (log, "Gradient norm", ("grad_norm",), "norm"),
        (log, "Images per second", ("images_per_s",), "images/s"),
        (log, "Waiting for data", ("data_wait_s",), "seconds"),
    ]
    drawn = [(title, _linked(plots.curves_figure(lines, names, unit))) for lines, title, names, unit in wanted]
    return [(title, link) for title, link in drawn if link is not None]


def figures(
    folder: Path, evaluation: Any, details: Any, manifest: Any, scored: Any, train: Any, weighted: bool
) -> dict[str, str | None]:
    """The figures of `evaluation_figures`, each a link, or None where there is nothing to show."""
    answers = read_probabilities(folder / evaluation.get("predictions", "predictions.csv")) if evaluation else {}
    drawn = evaluation_figures(evaluation, answers, details, scored, train, manifest, weighted)
    return {name: _linked(drawn.get(name)) for name in ("confusion", "reliability", "recall", "systems", "map")}


# --- words ------------------------------------------------------------------------------------------------------------


def flattened(tree: Any, most: int = 10_000, prefix: str = "") -> list[tuple[str, str]]:
    """(dotted name, text) of a nested mapping's leaves, numbers to the last digit, at most `most` of them."""
    rows: list[tuple[str, str]] = []
    for name, value in tree.items():
        if isinstance(value, Mapping):
            rows += flattened(value, most, f"{prefix}{name}.")
        else:
            text = json.dumps(value, ensure_ascii=False, default=str)
            rows.append((f"{prefix}{name}", text if len(text) <= 200 else text[:197] + "..."))
    return rows[:most]


def part_in_training(split: str, shards: Any, trained_on: str) -> dict[str, Any]:
    """`fitted`: which part the scored split had in making the run; `held_out`: whether none of it was trained on.

    A split of other shards than those that the run was trained on may hold any photo of it, whatever it is called.
    """
    if not trained_on or place_of(shards) != place_of(trained_on):
        return {"fitted": "It is not known whether training saw these photos.", "held_out": False}
    return {"fitted": FITTED.get(split, "Nothing was fitted on this split."), "held_out": split != "train"}


def target_words(manifest: Any) -> str:
    """The target region of the weights in a few words."""
    target = (manifest or {}).get("target")
    if not isinstance(target, Mapping):
        return "unknown (no manifest)"
    named = words(target.get("cities") or target.get("names") or ([target["file"]] if target.get("file") else []))
    told = [
        f"{target.get('kind', 'given')}{f' {named}' if named else ''}",
        f"{number(target['points'])} points" if target.get("points") else "",
        "transductive: it names places of the test split" if target.get("transductive") else "",
    ]
    return ", ".join(text for text in told if text)[:300]


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
    return "no interval" if ends is None or None in ends else f"{ends[0]:.3f} to {ends[1]:.3f}"


def share(value: Any) -> str:
    """A share in per cent."""
    return "–" if value is None else f"{100 * value:.1f} %"


def sentence(text: str) -> str:
    """With a capital at its beginning; the rest keeps its own (jinja2's `capitalize` takes them away)."""
    return text[:1].upper() + text[1:]


def words(values: Iterable[Any]) -> str:
    """Comma-separated."""
    return ", ".join(str(v) for v in values)
