"""The figures of an evaluation by name: what the report and TensorBoard both show."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from roadwork.evaluation import metrics, plots
from roadwork.evaluation.errors import join

MOST_ROWS = 20
"""Values of one breakdown that a figure shows; its table has all of them."""


def evaluation_figures(
    evaluation: Any,
    answers: Mapping[str, float],
    details: Any,
    scored: Any,
    train: Any,
    manifest: Any,
    weighted: bool = True,
) -> dict[str, Figure]:
    """`systems`, `confusion`, `reliability`, `recall` and `map`, each only where there is something to show.

    evaluation, details, manifest: of evaluation.json, predict_details.json and manifest.json, or None; answers: {id:
    probability} of the chosen system; scored, train: shard indexes, or None; weighted: `data.gps_weighted`, without which
    every training photo is drawn alike.
    """
    found: dict[str, Figure] = {}
    if evaluation and evaluation["systems"]:
        rows = [(s["name"], s["mcc"], s["mcc_interval"]) for s in evaluation["systems"]]
        found["systems"] = plots.intervals_figure(rows)
    if train is not None:
        centres = (manifest or {}).get("clusters") or ()
        held = None if scored is None else (np.asarray(scored.latitude), np.asarray(scored.longitude))
        weight = np.asarray(train.gps_weight) if weighted else np.ones(len(train.latitude))
        place = plots.map_figure(train.latitude, train.longitude, weight, centres, held)
        found |= {} if place is None else {"map": place}
    if scored is None or not answers or not evaluation:
        return found
    ids = {str(i) for i in scored.id}
    joined = join(scored, {name: p for name, p in answers.items() if name in ids})
    if not len(joined.rows):
        return found
    found["confusion"] = plots.confusion_figure(joined.label, joined.probability)
    found["recall"] = plots.precision_recall_figure(joined.label, joined.probability)
    predicted = evaluation.get("predictions", "predictions.csv") == "predictions.csv"  # else of a model, or shifted
    before = uncalibrated(joined.probability, details if predicted else None)
    weights = metrics.prior_weights(joined.label, evaluation["prior"])
    found["reliability"] = plots.reliability_figure(joined.label, joined.probability, before, weights)
    return found


def breakdown_figures(errors: Mapping[str, Any]) -> Iterator[tuple[str, Figure]]:
    """(field, MCC and interval by value) of every breakdown of `errors.analyse`; values of one class have no point."""
    for breakdown in errors["breakdowns"]:
        rows = [
            (f"{r['value']} (n = {r['n']})", np.nan if r["one_class"] else r["mcc"], r["mcc_interval"])
            for r in breakdown["rows"][:MOST_ROWS]
        ]
        if rows:
            yield breakdown["field"], plots.intervals_figure(rows, f"MCC by {breakdown['field'].replace('_', ' ')}")


def uncalibrated(probability: Any, details: Any) -> Any:
    """Probabilities [N] before `calibration` {temperature, bias} of predict_details.json, or None without one."""
    fitted = (details or {}).get("calibration")
    if not isinstance(fitted, Mapping) or not {"temperature", "bias"} <= set(fitted):
        return None
    p = np.clip(np.asarray(probability, dtype=np.float64), 1e-12, 1 - 1e-12)
    odds = (np.log(p) - np.log1p(-p) - float(fitted["bias"])) * float(fitted["temperature"])
    return 1 / (1 + np.exp(-np.clip(odds, -60, 60)))
