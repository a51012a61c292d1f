"""The evaluation stage: scores of a run's predictions, or of a saved model, errors, TensorBoard, report."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit, logit

from roadwork.config import Config
from roadwork.data.index import ShardIndex, open_split
from roadwork.data.record import DAYTIME, SCENE, WEATHER
from roadwork.engine import Engine, launched_rank
from roadwork.errors import UserError
from roadwork.evaluation.assess import evaluate as assess
from roadwork.evaluation.errors import join
from roadwork.evaluation.events import write_events
from roadwork.evaluation.figures import evaluation_figures
from roadwork.evaluation.report import read_json, read_probabilities, write_report
from roadwork.evaluation.standing import challenge_standing, synthetic_half
from roadwork.inference.calibration import shift_to_prior
from roadwork.inference.network_pass import Seen, load, network_answers
from roadwork.monitoring.console import quiet_libraries

NAMES = {"weather": WEATHER, "daytime": DAYTIME, "scene": SCENE}
PREDICTIONS, OWN_PREDICTIONS = "predictions.csv", "evaluation_predictions.csv"


@dataclass(frozen=True)
class Prepared:
    """What was found before any process group started.

    systems: name -> {id: probability}, empty where predictions.csv does not cover the split; chosen: the system that
    predictions.csv holds; predictions: the run's file of the answers that are scored; model: folder of the saved network,
    or None.
    """

    index: ShardIndex
    train: ShardIndex | None
    systems: dict[str, dict[str, float]]
    chosen: str
    predictions: str
    model: Path | None
    notes: list[str]


def prepare(config: Config) -> Prepared:
    """Find shards, predictions and model. Raises UserError where there is nothing to score."""
    run = Path(config.run.dir)
    index = open_split(config, config.predict.split)
    if len(index) == 0:
        raise UserError(f"split {config.predict.split} of {config.data.shards} is empty; give another --predict.split")
    train = open_split(config, "train") if "train" in index.manifest["indexes"] else None
    notes: list[str] = []
    systems, chosen, predictions = _predicted(run, index, config.predict.prior, notes)
    model = next((run / name for name in ("model", "best") if (run / name / "config.json").is_file()), None)
    if not systems and model is None:
        raise UserError(
            f"{run} has neither predictions.csv for split {config.predict.split} nor a saved model; run "
            f"launch/predict.py --run.dir {run} --predict.split {config.predict.split} first"
        )
    if config.predict.challenge and model is None:
        raise UserError(
            f"predict.challenge is true, and {run} has no saved model to ask (model/ or best/); run launch/predict.py "
            f"--run.dir {run} first, or give --predict.challenge false"
        )
    synthetic_half(config)
    return Prepared(index, train, systems, chosen, predictions, model, notes)


def _predicted(
    run: Path, index: ShardIndex, prior: float, notes: list[str]
) -> tuple[dict[str, dict[str, float]], str, str]:
    """Systems of predictions.csv and predictions_tta.csv, where they answer for every photo of the split; which of them
    is chosen; and the file of its answers, another one where they were made for another prior.
    """
    ids = {str(i) for i in index.id}
    answers = read_probabilities(run / PREDICTIONS)
    if set(answers) != ids:
        if answers:
            notes.append(f"predictions.csv does not hold the photos of split {index.split}: the saved model is scored")
        return {}, "", OWN_PREDICTIONS
    details = read_json(run / "predict_details.json") or {}
    chosen = str(details.get("chosen", "predictions"))
    systems = {chosen: answers}
    beside = run / "predictions_tta.csv"
    if beside.is_file():
        with beside.open(newline="", encoding="utf-8") as file:
            columns = next(csv.reader(file), [])
        for name in columns:
            if name not in ("id", "kept", "distance", "label", chosen):
                systems[name] = read_probabilities(beside, name)
    made_for = (details.get("held_out") or {}).get("prior_of_use")
    shift = shift_to_prior(made_for, prior, PREDICTIONS, notes)
    if not shift:
        return systems, chosen, PREDICTIONS
    return {name: _shifted(values, shift) for name, values in systems.items()}, chosen, OWN_PREDICTIONS


def _shifted(answers: Mapping[str, float], shift: float) -> dict[str, float]:
    """{id: probability} with `shift` added to the log-odds."""
    moved = expit(logit(np.asarray([*answers.values()])) + shift)
    return dict(zip(answers, moved.tolist(), strict=True))


def run_evaluate(config: Config) -> Path:
    """The stage as a command: check, start the engine, evaluate, leave. Returns report/index.html. Collective."""
    prepared = prepare(config)
    logs = Path(config.run.dir) / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    quiet_libraries(logs / f"evaluate-rank-{launched_rank():04d}.log")
    engine = Engine.start(config, "evaluate")
    result, page = evaluate(config, engine, prepared)
    if engine.is_main:
        for row in result["systems"]:
            span = row["mcc_interval"]
            words = "no interval" if span is None else f"{span[0]:.3f} to {span[1]:.3f}"
            sys.stdout.write(f"{'*' if row['chosen'] else ' '} {row['name']}: MCC {row['mcc']:.3f} ({words})\n")
        sys.stdout.write("".join(f"note: {note}\n" for note in result["notes"]) + f"report: {page}\n")
    engine.close()
    return page


def describe(config: Config) -> None:
    """What the stage would do, without doing it."""
    prepared = prepare(config)
    if launched_rank() == 0:
        photos, labelled = len(prepared.index), int((np.asarray(prepared.index.label) >= 0).sum())
        source = f"predictions.csv ({prepared.chosen})" if prepared.systems else f"the model in {prepared.model}"
        sys.stdout.write(f"split {config.predict.split}: {photos} photos, {labelled} labelled; scores {source}\n")


def evaluate(config: Config, engine: Engine, prepared: Prepared) -> tuple[dict[str, Any], Path]:
    """Writes evaluation.json, report/index.html and TensorBoard's `evaluate` run on rank 0. Collective.

    The result does not depend on the number of processes.
    """
    run = Path(config.run.dir)
    systems, chosen, notes = dict(prepared.systems), prepared.chosen, list(prepared.notes)
    seen = Seen()
    standing: dict[str, Any] | None = None
    if prepared.model is not None:
        network = load(prepared.model, config, prepared.index, prepared.train, notes, engine.device)
        seen = network_answers(network, config, engine, prepared.index, notes)
        systems.update(seen.systems)
        chosen = chosen or "image_only"
        if config.predict.challenge:
            standing = challenge_standing(network, config, engine, prepared.index)
    page = run / "report" / "index.html"
    result: dict[str, Any] = {}
    if engine.is_main:
        result = assess(
            prepared.index, systems, chosen, train=prepared.train, prior=config.predict.prior,
            resamples=config.predict.bootstrap, seed=config.seed, names=NAMES,
            centres=prepared.index.manifest.get("clusters") or (), shares=seen.shares,
        )  # fmt: skip
        finish(result, notes, seen.attention, standing)
        write_own_predictions(run, result, systems[chosen], prepared.predictions)
        _write(run / "evaluation.json", json.dumps(result, indent=1, allow_nan=False))
        page = write_report(run, shards=config.data.shards, scored=prepared.index, train=prepared.train)
        show(config, result, systems[chosen], prepared)
    engine.barrier()
    return result, page


def finish(
    result: dict[str, Any], notes: list[str], attention: Mapping[str, list[float]], standing: dict[str, Any] | None
) -> None:
    """Adds notes, the attention over the views of each worst error, and the challenge standing."""
    result["notes"] = notes + result["notes"]
    for errors in result["errors"]["worst"].values():
        for error in errors:
            if error["id"] in attention:
                error["attention"] = attention[error["id"]]
    if standing is not None:
        result["challenge"] = standing


def write_own_predictions(run: Path, result: dict[str, Any], answers: Mapping[str, float], name: str) -> None:
    """Names the file that holds the scored probabilities; it is written unless prediction has done so."""
    result["predictions"] = name
    if name == OWN_PREDICTIONS:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["id", "probability", "prediction"])
        writer.writerows([name, repr(p), int(p > 0.5)] for name, p in answers.items())
        _write(run / OWN_PREDICTIONS, text.getvalue())


def show(config: Config, result: Mapping[str, Any], answers: Mapping[str, float], prepared: Prepared) -> None:
    """The chosen system's answers in TensorBoard, in a run of their own beside the training curves."""
    run, index = Path(config.run.dir), prepared.index
    details = read_json(run / "predict_details.json")
    weighted = config.data.gps_weighted
    figures = evaluation_figures(result, answers, details, index, prepared.train, index.manifest, weighted)
    write_events(run / "tensorboard" / "evaluate", result, join(index, answers), figures, config, config.run.dir)


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
