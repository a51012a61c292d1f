"""The prediction stage: answers of all members, choices on held-out groups, predictions.csv, one exported network."""

from __future__ import annotations

import csv
import io
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from roadwork.config import Config
from roadwork.data.index import ShardIndex
from roadwork.engine import Engine, launched_rank
from roadwork.errors import UserError
from roadwork.evaluation.metrics import finite_or_none
from roadwork.inference import foods
from roadwork.inference.collect import Answers, collect, training_distribution
from roadwork.inference.ensemble import HeldOut, System, assess, choose, choose_weights, compare
from roadwork.inference.export import write_model
from roadwork.inference.members import PRETRAINED, SOUP, Members, find_members, load_members
from roadwork.inference.parts import write_atomic
from roadwork.inference.transforms import transforms
from roadwork.monitoring.console import quiet_libraries


@dataclass
class Plan:
    """How members and augmentations become one log-odds; everything in it was chosen on held-out groups."""

    member_weights: np.ndarray
    temperature: float
    systems: dict[str, System]
    chosen: str
    network: str
    network_system: System
    details: dict[str, Any]


@dataclass(frozen=True)
class Prepared:
    """What was checked before any process group started."""

    train: ShardIndex
    val: ShardIndex | None
    target: ShardIndex
    folds: list[Path]


def prepare(config: Config) -> Prepared:
    """Find model, folds and shards. Raises UserError for whatever the stage could not work with."""
    check_options(config)
    folds = find_members(config)
    train = ShardIndex.open(config.data.shards, "train")
    val = ShardIndex.open(config.data.shards, "val") if "val" in train.manifest["indexes"] else None
    target = ShardIndex.open(config.data.shards, config.predict.split)
    if len(target) == 0:
        raise UserError(f"split {config.predict.split} of {config.data.shards} is empty; choose another --predict.split")
    return Prepared(train, val, target, folds)


def run_predict(config: Config) -> Path:
    """The stage as a command: check, start the engine, predict, leave. Returns predictions.csv. Collective."""
    prepared = prepare(config)
    logs = Path(config.run.dir) / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    quiet_libraries(logs / f"predict-rank-{launched_rank():04d}.log")
    engine = Engine.start(config, "predict")
    plan, answers = predict(config, engine, prepared)
    path = Path(config.run.dir) / "predictions.csv"
    if engine.is_main:
        for name, system in plan.systems.items():
            after = system.figures["after"]
            sys.stdout.write(f"{name}: held-out MCC {after['mcc']}, ECE {after['ece']}\n")
        sys.stdout.write(
            f"answers by {plan.chosen}; model/ is {plan.network}; {len(answers.ids)} predictions: {path}\n"
        )
    engine.close()
    return path


def describe(config: Config) -> None:
    """What the stage would do, without doing it."""
    prepared = prepare(config)
    if launched_rank():
        return
    photos = {"train": len(prepared.train), "val": len(prepared.val or []), config.predict.split: len(prepared.target)}
    number = 1 if config.predict.tta == "off" else config.predict.num_augmentations
    sys.stdout.write(f"photos: {photos}; folds: {len(prepared.folds)}; augmentations: {number}\n")


def predict(config: Config, engine: Engine, prepared: Prepared) -> tuple[Plan, Answers]:
    """Predict config.predict.split.

    Writes predictions.csv, predictions_tta.csv, predict_details.json and model/ in the run folder (rank 0), and
    restartable part files in predict/. The result does not depend on the number of processes.
    """
    members = load_members(config, prepared.folds, engine.device)
    check_view_size(config, members, prepared.target)
    listed = transforms(1 if config.predict.tta == "off" else config.predict.num_augmentations, config.seed)
    train, val_index, target = prepared.train, prepared.val, prepared.target
    distribution = training_distribution(members, train, config, engine) if len(listed) > 1 else None
    val = collect(members, val_index, listed, distribution, config, engine) if val_index else None
    plan = make_plan(members, val, held_out(val, train, config), config)
    # TTA that was judged useless is not computed for photos without labels: nobody could learn anything from it.
    wanted = len(listed) > 1 and (plan.details["tta"]["used"] or bool((np.asarray(target.label) >= 0).any()))
    target_list = listed if wanted else listed[:1]
    answers = collect(members, target, target_list, distribution if wanted else None, config, engine)
    if engine.is_main:
        plan.details["augmentations"] = [asdict(transform) for transform in target_list]
        write_predictions(Path(config.run.dir), answers, plan, config)
        export(config, members, plan)
    engine.barrier()
    return plan, answers


def export(config: Config, members: Members, plan: Plan) -> None:
    """Write model/: the chosen network with its own calibration."""
    write_model(
        Path(config.run.dir) / "model",
        members.model,
        plan.network,
        members.overrides[members.names.index(plan.network)],
        plan.network_system.calibration,
        config.predict.prior,
        plan.network_system.figures["after"],
    )


def check_options(config: Config) -> None:
    """UserError for values that no run could use."""
    options = config.predict
    if not 0 < options.prior < 1:
        raise UserError(f"predict.prior is {options.prior:g}; give a share between 0 and 1, for example 0.5")
    if not 0 < options.keep_ratio <= 1:
        raise UserError(f"predict.keep_ratio is {options.keep_ratio:g}; give a share above 0 and at most 1")
    for name in ("batch", "neighbours"):
        if getattr(options, name) < 1:
            raise UserError(f"predict.{name} is {getattr(options, name)}; give 1 or more")
    transforms(options.num_augmentations, config.seed)
    if options.tta == "on" and options.num_augmentations < 2:
        raise UserError("predict.tta is on with predict.num_augmentations 1; give 2 or more, or set predict.tta off")


def check_view_size(config: Config, members: Members, target: ShardIndex) -> None:
    """UserError where shards and model do not fit."""
    wanted = members.model.view_size
    if wanted != target.view_size:
        raise UserError(
            f"{config.data.shards} has views of {target.view_size} px, the model in {config.run.dir}/best wants "
            f"{wanted}; build shards with --view-size {wanted}"
        )


def held_out(val: Answers | None, train: ShardIndex, config: Config) -> HeldOut:
    """Labelled, readable val photos, and the priors: of the training draws (weights move it) and of use."""
    keep = np.zeros(0, bool) if val is None else usable(val)
    labels = np.zeros(0, np.int64) if val is None else val.labels[keep]
    groups = np.zeros(0, str) if val is None else val.groups[keep]
    return HeldOut(
        labels, groups, config.predict.prior, prior_of_draws(train, config), config.predict.bootstrap, config.seed
    )


def usable(answers: Answers) -> np.ndarray:
    """bool [N]: photos with a label and pixels."""
    return (answers.labels >= 0) & answers.readable


def prior_of_draws(train: ShardIndex, config: Config) -> float:
    """Share of positives among labelled training DRAWS: GPS weights move it away from the share among photos."""
    labels = np.asarray(train.label)
    weights = np.asarray(train.gps_weight, np.float64) if config.data.gps_weighted else np.ones(len(labels))
    known = labels >= 0
    total = float(weights[known].sum())
    return float(weights[known & (labels == 1)].sum() / total) if total > 0 else 0.5


def make_plan(members: Members, val: Answers | None, truth: HeldOut, config: Config) -> Plan:
    """Fit and choose everything on held-out groups; without any, defaults that are stated as such."""
    number = len(members.names)
    if val is None:
        log_odds, image_only = np.zeros((0, 1, number)), np.zeros((0, number))
        selection = None
    else:
        kept = val.rows(usable(val))
        log_odds, image_only = kept.log_odds, kept.image_only
        selection = select(kept, config)
    share, weighting = choose_weights(log_odds[:, 0, members.folds], truth)
    member_weights = np.zeros(number)
    member_weights[members.folds] = share
    details: dict[str, Any] = {"held_out": describe(truth), "members": members.names, "weighting": weighting}
    temperature, table = float("inf"), []
    if selection is not None and len(truth.labels):
        temperature, table = foods.fit_temperature(selection, log_odds[:, :, 0], truth.loss)
    details["tta_temperature"] = {
        "used": finite_or_none(temperature),
        "log_loss": [[finite_or_none(t), finite_or_none(loss)] for t, loss in table],
    }
    odds = system_log_odds(log_odds, selection, member_weights, temperature)
    systems = {name: assess(name, value, truth) for name, value in odds.items()}
    chosen = decide(systems, truth, config, details)
    network, network_system = choose_network(members, image_only, truth, chosen, details)
    details["systems"] = {name: system.figures for name, system in systems.items()}
    details["chosen"] = chosen
    return Plan(member_weights, temperature, systems, chosen, network, network_system, details)


def select(answers: Answers, config: Config) -> foods.Selection | None:
    """What FOODS keeps of each photo; None with one augmentation."""
    options = config.predict
    if answers.distances is None:
        return None
    return foods.select(answers.distances, options.filter, options.keep, options.keep_ratio)


def system_log_odds(
    log_odds: np.ndarray, selection: foods.Selection | None, member_weights: np.ndarray, temperature: float
) -> dict[str, np.ndarray]:
    """Uncalibrated log-odds [N] of every system that there is: pretrained and ensemble, plain and with TTA."""
    plain = log_odds[:, 0]
    found = {PRETRAINED: plain[:, 0]}
    several = np.count_nonzero(member_weights) > 1
    if several:
        found["ensemble"] = plain @ member_weights
    if selection is not None:
        voted = foods.combine(log_odds, foods.weights(selection, temperature))
        found["pretrained_tta"] = voted[:, 0]
        if several:
            found["ensemble_tta"] = voted @ member_weights
    return found


def decide(systems: dict[str, System], truth: HeldOut, config: Config, details: dict[str, Any]) -> str:
    """Name of the system to answer with: TTA first, then the ensemble on top of what that gave."""
    chosen = PRETRAINED
    details["tta"] = details["ensemble"] = {"used": False, "mode": "off", "reason": "not available"}
    if "pretrained_tta" in systems:
        details["tta"] = choose(systems[chosen], systems["pretrained_tta"], config.predict.tta, truth)
        chosen = "pretrained_tta" if details["tta"]["used"] else chosen
    better = chosen.replace(PRETRAINED, "ensemble")
    if better in systems:
        details["ensemble"] = choose(systems[chosen], systems[better], config.predict.ensemble, truth)
        chosen = better if details["ensemble"]["used"] else chosen
    return chosen


def choose_network(
    members: Members, image_only: np.ndarray, truth: HeldOut, chosen: str, details: dict[str, Any]
) -> tuple[str, System]:
    """The ONE network of model/, judged as it will be used: pixels alone, no TTA.

    The folds' average takes the pre-trained network's place only where the ensemble was chosen and the average is not
    worse on held-out groups.
    """
    pretrained = assess(PRETRAINED, image_only[:, 0], truth)
    details["network"] = {PRETRAINED: pretrained.figures}
    name, system = PRETRAINED, pretrained
    if SOUP in members.names:
        soup = assess(SOUP, image_only[:, members.names.index(SOUP)], truth)
        paired = compare(pretrained, soup, truth)
        details["network"] |= {SOUP: soup.figures, "difference": [finite_or_none(value) for value in paired]}
        if chosen.startswith("ensemble") and not paired.difference < 0:
            name, system = SOUP, soup
    details["network"]["chosen"] = name
    return name, system


def describe(truth: HeldOut) -> dict[str, Any]:
    """What the held-out figures were measured on."""
    return {
        "split": "val",
        "photos": len(truth.labels),
        "positives": int(np.sum(truth.labels == 1)),
        "groups": len(np.unique(truth.groups)),
        "prior_of_use": truth.prior,
        "prior_of_draws": truth.source_prior,
        "resamples": truth.resamples,
    }


def write_predictions(run: Path, answers: Answers, plan: Plan, config: Config) -> None:
    """predictions.csv (the chosen system), predictions_tta.csv (every system, what FOODS kept), predict_details.json."""
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
    """id, kept (one 0 or 1 per augmentation, the original first), distance of the original, each system's probability."""
    names = sorted(probability)
    head = ["id", "kept", "distance", *names] + (["label"] if labelled else [])
    rows = []
    for row, photo in enumerate(answers.ids):
        kept = "1" if selection is None else "".join("1" if one else "0" for one in selection.kept[row])
        distance = "" if selection is None else f"{selection.distance[row, 0]:.6g}"
        values = [repr(float(probability[name][row])) for name in names]
        rows.append([photo, kept, distance, *values, *([_label(answers.labels[row])] if labelled else [])])
    return _csv(head, rows)


def _label(label: Any) -> str:
    return "" if label < 0 else str(int(label))


def _csv(head: list[str], rows: list[list[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    return text.getvalue()
