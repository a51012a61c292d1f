"""evaluation.json: every system's score with its interval on the same held-out groups, paired with the chosen one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from roadwork.evaluation import metrics
from roadwork.evaluation.baselines import metadata_classifier
from roadwork.evaluation.errors import Joined, analyse, join

WHAT = {
    "pretrained": "pre-trained network alone",
    "ensemble": "ensemble of folds and pre-trained network",
    "pretrained_tta": "pre-trained network with FOODS test-time augmentation",
    "ensemble_tta": "ensemble with FOODS test-time augmentation",
    "image_only": "the one network of model/, pixels alone, as the service runs it",
    "image_only_224": "the same on one centred 224 px view, as the challenge sends it",
    "model": "the saved network",
    "metadata": "no pixels: GPS, weather, day time and scene alone",
}


def evaluate(
    index: Any,
    systems: Mapping[str, Mapping[str, float]],
    chosen: str,
    *,
    train: Any = None,
    prior: float = 0.5,
    resamples: int = 1000,
    seed: int = 0,
    names: Mapping[str, Any] | None = None,
    centres: Any = (),
    shares: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Scores, comparisons and error analysis of one split, JSON-able; no system has scores where no photo has a label.

    index: of the scored split; systems: name -> {id: probability under `prior`}, holding `chosen`; train: index of the
    training split, for the metadata-only classifier (None: left out); names, centres, shares: see `errors.analyse`.
    Raises UserError where the chosen predictions do not belong to the split.
    """
    joined = join(index, systems[chosen])
    found = {name: _aligned(joined, values) for name, values in systems.items()}
    notes = _notes(joined, centres)
    baseline = metadata_classifier(train, index, prior, seed) if train is not None and len(joined.rows) else None
    what = dict(WHAT)
    if baseline is not None:
        found["metadata"] = baseline[0][joined.rows]
        what["metadata"] += f" ({baseline[1]}, chosen and fitted on the training groups)"
    elif train is not None and len(joined.rows):
        notes.append("no metadata-only classifier: the training split has labels of one class, or none")
    rows = [
        {
            "name": name,
            "what": what.get(name, name),
            "chosen": name == chosen,
            **metrics.summary(joined.label, values, joined.group, prior, resamples, seed),
            "gain": None if name == chosen else _gain(joined, values, resamples, seed),
        }
        for name, values in found.items()
        if values is not None and len(joined.rows)
    ]
    notes += [f"{name} has no answer for every photo and is left out" for name, v in found.items() if v is None]
    return {
        "split": getattr(index, "split", ""),
        "prior": prior,
        "seed": seed,
        "resamples": resamples,
        "chosen": chosen,
        "systems": sorted(rows, key=lambda row: (not row["chosen"], -row["mcc"])),
        "errors": analyse(joined, names, centres, min(resamples, 500), seed, shares=shares),
        "notes": notes,
    }


def _aligned(joined: Joined, values: Mapping[str, float]) -> Any:
    """Probabilities of the joined photos, or None where one is missing."""
    ids = [str(i) for i in joined.id]
    if any(i not in values for i in ids):
        return None
    return np.asarray([values[i] for i in ids], dtype=np.float64)


def _gain(joined: Joined, values: Any, resamples: int, seed: int) -> dict[str, Any]:
    """What the chosen system gains over this one, in MCC, by a paired bootstrap over groups."""
    paired = metrics.paired_group_bootstrap(
        joined.label, values, joined.probability, joined.group, "mcc", resamples, seed
    )
    return {key: metrics.finite_or_none(value) for key, value in paired._asdict().items()} | {"helps": paired.helps}


def _notes(joined: Joined, centres: Any) -> list[str]:
    notes = []
    classes = np.unique(joined.label)
    if not len(joined.rows):
        notes.append("no photo of this split has both a label and a prediction: nothing could be scored")
    elif len(classes) < 2:
        notes.append(f"every labelled photo of this split has label {classes[0]}: MCC is 0 by definition")
    if joined.missing:
        notes.append(f"{len(joined.missing)} labelled photos have no prediction and are not scored")
    if joined.unlabelled:
        notes.append(f"{joined.unlabelled} predicted photos have no label and are not scored")
    if len(joined.rows) and len(np.unique(metrics.group_codes(joined.group, len(joined.rows)))) < 2:
        notes.append("all photos belong to one group: there is no interval")
    if len(joined.rows) and not len(centres):
        notes.append("the shards have no target region: nothing is broken down by GPS cluster or by distance to it")
    return notes
