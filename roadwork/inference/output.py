"""The files of a prediction: predictions.csv, predictions_tta.csv, predictions_distances.csv, predict_details.json."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from roadwork.config import Config
from roadwork.inference import foods
from roadwork.inference.collect import Answers
from roadwork.inference.ood import distance_names
from roadwork.inference.parts import write_atomic
from roadwork.inference.plan import Plan, select, system_log_odds

DISTANCES = "predictions_distances.csv"


def write_predictions(run: Path, answers: Answers, plan: Plan, config: Config) -> None:
    """predictions.csv (the chosen system), predictions_tta.csv (every system, what FOODS kept),
    predictions_distances.csv (why it was kept; absent with one augmentation), and every decision.
    """
    selection = select(answers, config)
    odds = system_log_odds(answers.log_odds, selection, plan.member_weights, plan.temperature)
    probability = {name: plan.systems[name].calibration.probability(value) for name, value in odds.items()}
    for value in probability.values():
        value[~answers.readable] = config.predict.prior  # no pixels: all that is known is the prior
    chosen = probability[plan.chosen]
    labelled = bool((answers.labels >= 0).any())
    head = ["id", "probability", "prediction"] + (["label"] if labelled else [])
    rows = [
        [name, repr(float(p)), int(p > 0.5), *([_label(label)] if labelled else [])]
        for name, p, label in zip(answers.ids, chosen, answers.labels, strict=True)
    ]
    write_atomic(run / "predictions.csv", _csv(head, rows))
    write_atomic(run / "predictions_tta.csv", _tta_csv(answers, selection, probability, labelled))
    if selection is None:
        (run / DISTANCES).unlink(missing_ok=True)  # of an earlier prediction
    else:
        write_atomic(run / DISTANCES, _distances_csv(answers, selection))
    plan.details |= {
        "split": config.predict.split,
        "photos": len(answers.ids),
        "unreadable": [name for name, good in zip(answers.ids, answers.readable, strict=True) if not good],
        "member_weights": plan.member_weights.tolist(),
        "kept_share": None if selection is None else float(selection.kept.mean()),
        "calibration": asdict(plan.systems[plan.chosen].calibration),
    }
    write_atomic(run / "predict_details.json", json.dumps(plan.details, indent=1))


def _tta_csv(
    answers: Answers, selection: foods.Selection | None, probability: dict[str, np.ndarray], labelled: bool
) -> str:
    """id, kept (0 or 1 per augmentation, the original first), the original's distance, each system's probability."""
    names = sorted(probability)
    head = ["id", "kept", "distance", *names] + (["label"] if labelled else [])
    rows = []
    for row, photo in enumerate(answers.ids):
        kept = "1" if selection is None else "".join("1" if one else "0" for one in selection.kept[row])
        distance = "" if selection is None else f"{selection.distance[row, 0]:.6g}"
        values = [repr(float(probability[name][row])) for name in names]
        rows.append([photo, kept, distance, *values, *([_label(answers.labels[row])] if labelled else [])])
    return _csv(head, rows)


def _distances_csv(answers: Answers, selection: foods.Selection) -> str:
    """One line per photo and augmentation: its distances in units of the training photos' own thresholds, of which 1 is
    the most that predict.keep threshold allows; predict_details.json holds the thresholds.
    """
    assert answers.distances is not None
    names = distance_names(answers.distances.shape[-1] - 1)
    rows = [
        [photo, augmentation, int(selection.kept[row, augmentation]), *(repr(float(value)) for value in values)]
        for row, photo in enumerate(answers.ids)
        for augmentation, values in enumerate(answers.distances[row])
    ]
    return _csv(["id", "augmentation", "kept", *names], rows)


def _label(label: Any) -> str:
    return "" if label < 0 else str(int(label))


def _csv(head: list[str], rows: list[list[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    return text.getvalue()
