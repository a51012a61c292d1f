"""The prediction stage: answers of all members, choices on held-out groups, predictions.csv, one exported network."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from roadwork.config import Config
from roadwork.data.index import ShardIndex, open_split, place_of
from roadwork.engine import Engine, launched_rank
from roadwork.errors import UserError
from roadwork.evaluation.standing import challenge_standing, standing_words, synthetic_half
from roadwork.inference.collect import Answers, collect, training_distribution
from roadwork.inference.export import write_model
from roadwork.inference.members import Members, find_members, load_members
from roadwork.inference.network_pass import other_cut
from roadwork.inference.output import write_predictions
from roadwork.inference.plan import Plan, held_out, make_plan
from roadwork.inference.transforms import transforms
from roadwork.models import RoadworkDetector
from roadwork.monitoring.console import quiet_libraries


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
    train = open_split(config, "train")
    val = open_split(config, "val") if "val" in train.manifest["indexes"] else None
    target = open_split(config, config.predict.split)
    if len(target) == 0:
        raise UserError(f"split {config.predict.split} of {config.data.shards} is empty; give another --predict.split")
    synthetic_half(config)
    return Prepared(train, val, target, folds)


def run_predict(config: Config) -> Path:
    """The stage as a command: check, start the engine, predict, leave. Returns predictions.csv. Collective."""
    prepared = prepare(config)
    logs = Path(config.run.dir) / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    quiet_libraries(logs / f"predict-rank-{launched_rank():04d}.log")
    engine = Engine.start(config, "predict")
    plan, answers = predict(config, engine, prepared)
    standing = own_standing(config, engine, prepared) if config.predict.challenge else None
    path = Path(config.run.dir) / "predictions.csv"
    if engine.is_main:
        for name, system in plan.systems.items():
            after = system.figures["after"]
            mcc, ece = (f"{v:.3f}" if (v := after[key]) is not None else "unknown" for key in ("mcc", "ece"))
            sys.stdout.write(f"{name}: held-out MCC {mcc}, ECE {ece}\n")
        whole, alone = (
            "unknown" if figures["mcc"] is None else f"{figures['mcc']:.3f}"
            for figures in (plan.network_system.figures["after"], plan.network_single_view)
        )
        sys.stdout.write(
            f"model/ ({plan.network}), pixels alone: held-out MCC {whole} on all views, {alone} on one 224 px view\n"
            f"answers by {plan.chosen}; model/ is {plan.network}; {len(answers.ids)} predictions: {path}\n"
        )
        sys.stdout.write("".join(f"note: {note}\n" for note in plan.details["notes"]))
        if standing is not None:
            sys.stdout.write(standing_words(standing) + "\n")
    engine.close()
    return path


def own_standing(config: Config, engine: Engine, prepared: Prepared) -> dict[str, Any] | None:
    """The challenge standing of the network just written to model/, kept in RUN/challenge.json with its split. Collective."""
    run = Path(config.run.dir)
    network = RoadworkDetector.from_pretrained(run / "model", engine.device)
    standing = challenge_standing(network, config, engine, prepared.target)
    if engine.is_main and standing is not None:
        of = {"split": config.predict.split, "shards": place_of(config.data.shards)}
        temporary = run / f".challenge.{os.getpid()}.tmp"
        temporary.write_text(json.dumps(standing | of, indent=1, allow_nan=False))
        temporary.replace(run / "challenge.json")
    engine.barrier()
    return standing


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

    Writes the files of `write_predictions` and model/ in the run folder (rank 0), and restartable part files in
    predict/. The result does not depend on the number of processes.
    """
    members = load_members(config, prepared.folds, engine.device)
    check_view_size(config, members, prepared.target)
    listed = transforms(1 if config.predict.tta == "off" else config.predict.num_augmentations, config.seed)
    train, val_index, target = prepared.train, prepared.val, prepared.target
    distribution = training_distribution(members, train, config, engine) if len(listed) > 1 else None
    val = collect(members, val_index, listed, distribution, config, engine) if val_index else None
    plan = make_plan(members, val, held_out(val, train, config), config)
    plan.details["notes"] = [note] if (note := other_cut(members.model, target)) else []
    # TTA that was judged useless is not computed for photos without labels: nobody could learn anything from it.
    wanted = len(listed) > 1 and (plan.details["tta"]["used"] or bool((np.asarray(target.label) >= 0).any()))
    target_list = listed if wanted else listed[:1]
    answers = collect(members, target, target_list, distribution if wanted else None, config, engine)
    if engine.is_main:
        plan.details["augmentations"] = [asdict(transform) for transform in target_list]
        plan.details["distance_thresholds"] = distribution.thresholds() if distribution is not None else None
        write_predictions(Path(config.run.dir), answers, plan, config)
        export(config, members, plan)
    engine.barrier()
    return plan, answers


def export(config: Config, members: Members, plan: Plan) -> None:
    """Write model/: the chosen network with its own calibration. A standing of the network before it goes."""
    run = Path(config.run.dir)
    (run / "challenge.json").unlink(missing_ok=True)
    write_model(
        run / "model",
        members.model,
        plan.network,
        members.overrides[members.names.index(plan.network)],
        plan.network_system.calibration,
        config.predict.prior,
        plan.network_system.figures["after"],
        plan.network_single_view,
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
