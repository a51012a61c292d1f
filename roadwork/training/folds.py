"""DoRA fine-tuning of folds: each from the same pristine weights, on cached encoder outputs, one per process."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import logging
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit
from sklearn.model_selection import StratifiedGroupKFold

from roadwork.config import Config
from roadwork.config_ranges import SECTIONS, check_section
from roadwork.data.index import ShardIndex, open_split
from roadwork.engine import Engine, launched_rank
from roadwork.errors import UserError
from roadwork.evaluation.metrics import group_codes
from roadwork.models import RoadworkDetector
from roadwork.models.adapters import file_digest, shared_units, state_digest
from roadwork.models.fold_files import COMPLETE, fold_path, is_done, read_fold, read_held_out
from roadwork.monitoring.console import quiet_libraries
from roadwork.training.fold_cache import ARRAYS, FixedCopies, LivePrefix, PrefixCache, PrefixSource, open_cache
from roadwork.training.fold_queue import one_job_at_a_time, take_folds
from roadwork.training.fold_trainer import FoldData, FoldResult, train_fold

logger = logging.getLogger(__name__)


def assign_folds(labels: np.ndarray, groups: np.ndarray, number: int, seed: int) -> np.ndarray:
    """Fold [N] that holds each photo out: whole groups, positives' share alike (scikit-learn's StratifiedGroupKFold).

    Raises UserError for fewer than two folds, fewer groups than folds, one class only, no class with a photo per fold
    (the splitter wants one class that may reach into every fold; the rarer one may stay out of some), or an empty fold.
    """
    codes = group_codes(groups, len(labels))
    found = len(np.unique(codes))
    if number < 2:
        raise UserError(f"folds.num_folds is {number}; at least 2 are needed")
    if found < number:
        raise UserError(f"folds.num_folds is {number}, but the train split has {found} groups; {_at_most(found)}")
    counts = np.unique(labels, return_counts=True)[1]
    if len(counts) < 2:
        raise UserError(f"folds: the train split holds only label {int(labels[0])}; both classes are needed")
    if counts.max() < number:
        raise UserError(
            f"folds.num_folds is {number}, but the train split has {' and '.join(map(str, counts))} photos per label; "
            f"{_at_most(counts.max())}"
        )
    fold = np.full(len(labels), -1)
    splitter = StratifiedGroupKFold(number, shuffle=True, random_state=seed)
    for k, (_, held) in enumerate(splitter.split(np.zeros(len(labels)), labels, codes)):
        fold[held] = k
    if len(np.unique(fold)) < number:  # rare: few groups of unlike sizes and labels
        raise UserError(f"folds.num_folds is {number}, but the {found} groups fill fewer folds; {_at_most(number - 1)}")
    return fold


def _at_most(folds: int) -> str:
    return f"set it to {folds} or less" if folds > 1 else "build shards with more labelled photos"


def fold_data(index: ShardIndex, config: Config) -> FoldData:
    """Labelled photos of the train split with their folds; UserError without any, and as `assign_folds`."""
    rows = np.flatnonzero(np.asarray(index.label) >= 0)
    if len(rows) == 0:
        raise UserError(
            f"folds: {config.data.shards} has no labelled photo in its train split; build shards with labels"
        )
    labels = np.asarray(index.label)[rows].astype(np.int64)
    groups = np.asarray(index.group)[rows]
    weights = np.asarray(index.gps_weight, np.float64)[rows] if config.data.gps_weighted else np.ones(len(rows))
    fold = assign_folds(labels, groups, config.folds.num_folds, config.seed)
    return FoldData(rows, np.asarray(index.names(rows)), labels, weights, fold, config.folds.num_folds)


def save_fold(result: FoldResult, data: FoldData, folder: Path, fold: int, identity: dict[str, Any]) -> Path:
    """Write a fold under a temporary name and rename it: vanilla peft adapter, figures, held-out answers."""
    final = fold_path(folder, fold)
    temporary = folder / f".fold-{fold}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    result.model.save_pretrained(str(temporary), safe_serialization=True)
    probability = expit(result.log_odds)
    rows = zip(data.ids[result.held], probability, data.labels[result.held], strict=True)
    held_out = [{"id": str(i), "fold": fold, "label": int(y), "probability": float(p)} for i, p, y in rows]
    unreadable = data.ids[result.held][~result.readable].tolist()
    details = {"fold": fold, "best_epoch": result.best_epoch, "history": result.history, "unreadable": unreadable}
    details |= identity
    (temporary / "fold.json").write_text(json.dumps(details, indent=1))
    (temporary / "held_out.json").write_text(json.dumps(held_out))
    (temporary / COMPLETE).write_text("")
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    return final


def identity_of(config: Config, base: str, data: FoldData) -> dict[str, Any]:
    """What a finished fold must agree with to be kept on a relaunch."""
    ids = json.dumps([data.ids.tolist(), data.labels.tolist(), data.fold.tolist()])
    augment = dataclasses.asdict(config.augment)
    return {
        "base": base,
        "photos": _digest(ids),
        "seed": config.seed,
        "folds": dataclasses.asdict(config.folds),
        "augment": _digest(json.dumps(augment, sort_keys=True)),
        "gps_weighted": config.data.gps_weighted,
    }


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def check_finished(folder: Path, number: int, identity: dict[str, Any]) -> list[int]:
    """Folds that are already done. Raises UserError where one was made from other weights, data or options."""
    done = []
    for fold in range(number):
        path = fold_path(folder, fold)
        if not is_done(folder, fold):
            continue
        found = read_fold(path)
        wrong = [key for key, value in json.loads(json.dumps(identity)).items() if found.get(key) != value]
        if wrong:
            raise UserError(
                f"{path} was trained with another {', '.join(wrong)}; remove {folder} to train the folds anew"
            )
        done.append(fold)
    return done


def write_out_of_fold(folder: Path, data: FoldData) -> Path:
    """folds/oof.csv from all folds' held-out answers: every photo exactly once, in the index's order.

    A photo that could not be read has probability 0.5 (log-odds 0, as in prediction) and is named in its fold.json.
    UserError where the folds' answers are not those of the data's photos, once each.
    """
    found: dict[str, dict[str, Any]] = {}
    for fold in range(data.number):
        for row in read_held_out(fold_path(folder, fold)):
            if row["id"] in found:
                raise UserError(f"{folder}: photo {row['id']} is held out by two folds; remove {folder} and train anew")
            found[row["id"]] = row
    if set(found) != set(data.ids.tolist()):
        raise UserError(f"{folder}: {len(found)} held-out answers for {len(data.ids)} photos; remove it and train anew")
    text = io.StringIO()
    writer = csv.DictWriter(text, ["id", "fold", "label", "probability"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(found[photo] for photo in data.ids.tolist())
    path = folder / "oof.csv"
    temporary = folder / f".oof.{os.getpid()}.tmp"
    temporary.write_text(text.getvalue())
    temporary.replace(path)
    return path


def prefix_source(model: RoadworkDetector, prepared: Prepared, config: Config, engine: Engine) -> PrefixSource:
    """What lies before the first adapted module, cached by all processes; the encoder itself where nothing does.

    Raises UserError where the encoder's outputs would outgrow folds.cache_gib. Activations between two units of the
    backbone, which are much larger, are not kept then: every batch is encoded anew.
    """
    index, data, options = prepared.index, prepared.data, config.folds
    fixed = FixedCopies(config, engine.device)
    unit = shared_units(model, [*options.target_modules, *options.modules_to_save])
    if unit == 0:
        logger.info("folds: adapters reach into the encoder's first unit; every batch is encoded anew")
        return LivePrefix(index, data.rows, fixed, config)
    folder = prepared.folder / "prefix"
    cache = PrefixCache(folder, data.rows, options.copies, engine.device, unit)
    gib = cache.gib(model, index, fixed, config)
    if gib > options.cache_gib:
        needs = f"folds: {options.copies} copies of {len(data.rows)} photos need {gib:.3g} GiB of cache, above"
        if unit is None:
            raise UserError(f"{needs} folds.cache_gib {options.cache_gib:g}; raise it or lower folds.copies")
        logger.info("%s folds.cache_gib %g: every batch is encoded anew", needs, options.cache_gib)
        return LivePrefix(index, data.rows, fixed, config)
    needed = {key: prepared.identity[key] for key in ("base", "photos", "seed", "augment")}
    needed |= {"copies": options.copies, "augment_scale": options.augment_scale, "unit": unit, "arrays": ARRAYS}
    with one_job_at_a_time(engine, folder):
        if engine.is_main:
            open_cache(folder, needed)
        engine.barrier()
        cache.fill(model, index, fixed, config, engine.rank, engine.world_size)
        engine.barrier()
    what = "encoder outputs" if unit is None else f"activations after unit {unit} of the backbone"
    logger.info("folds: %s of %d photos in %d bytes", what, len(data.rows), cache.bytes)
    return cache


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What was checked before any process group started."""

    best: Path
    base: str
    index: ShardIndex
    data: FoldData
    identity: dict[str, Any]
    done: list[int]

    @property
    def folder(self) -> Path:
        """RUN/folds."""
        return self.best.parent / "folds"


def prepare(config: Config) -> Prepared:
    """Find model, shards and finished folds. Raises UserError for whatever the stage could not work with."""
    best = Path(config.run.dir) / "best"
    if not (best / "model.safetensors").is_file():
        raise UserError(f"no pre-trained model at {best}; run launch/pretrain.py with --run.dir {config.run.dir} first")
    check_section("folds", config.folds, SECTIONS["folds"])
    index = open_split(config, "train")
    data = fold_data(index, config)
    base = file_digest(best / "model.safetensors")
    identity = identity_of(config, base, data)
    done = check_finished(best.parent / "folds", data.number, identity)
    return Prepared(best, base, index, data, identity, done)


def run_folds(config: Config) -> Path:
    """The stage as a command: check, start the engine, fine-tune, leave. Returns the folder of folds. Collective."""
    prepared = prepare(config)
    logs = Path(config.run.dir) / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    quiet_libraries(logs / f"dora_folds-rank-{launched_rank():04d}.log")
    engine = Engine.start(config, "dora_folds")
    folder = fine_tune_folds(config, engine, prepared)
    if engine.is_main:
        for fold in range(prepared.data.number):
            sys.stdout.write(_line(fold_path(folder, fold)) + "\n")
        sys.stdout.write(f"out-of-fold predictions: {folder / 'oof.csv'} (optimistic: pre-training saw these photos)\n")
    engine.close()
    return folder


def _line(path: Path) -> str:
    details = read_fold(path)
    first, best = details["history"][0], details["history"][details["best_epoch"]]
    return (
        f"{path.name}: held-out MCC {first['mcc']:.3f} before, {best['mcc']:.3f} at epoch {details['best_epoch']}; "
        f"loss {first['held_out_loss']:.4f} -> {best['held_out_loss']:.4f}"
    )


def describe(config: Config) -> None:
    """What the stage would do, without doing it."""
    prepared = prepare(config)
    if launched_rank():
        return
    data = prepared.data
    for fold in range(data.number):
        held = data.fold == fold
        state = "done" if fold in prepared.done else "to do"
        sys.stdout.write(
            f"fold {fold}: {int((~held).sum())} photos to train on, {int(held.sum())} held out "
            f"({int(data.labels[held].sum())} positive), {state}\n"
        )


def fine_tune_folds(config: Config, engine: Engine, prepared: Prepared) -> Path:
    """Train every fold that is not done yet, then write folds/oof.csv.

    Folds are small, so each is trained by ONE process without DeepSpeed; processes share the encoder's outputs and
    take folds from a queue. A relaunch keeps what is done. RuntimeError where training changed the shared weights.
    """
    folder, data = prepared.folder, prepared.data
    folder.mkdir(parents=True, exist_ok=True)
    engine.barrier()
    if len(prepared.done) < data.number:
        model = RoadworkDetector.from_pretrained(prepared.best, engine.device).float().requires_grad_(False)
        before = state_digest(model)
        source = prefix_source(model, prepared, config, engine)
        for fold in take_folds(folder, data.number, first=engine.rank):
            console = engine.is_main and config.monitoring.console
            result = train_fold(model, source, data, fold, config, engine.device, console)
            save_fold(result, data, folder, fold, prepared.identity)
            logger.info("fold %d: epoch %d, %s", fold, result.best_epoch, result.history[result.best_epoch])
        if state_digest(model) != before:
            raise RuntimeError("a fold changed the pre-trained weights; its adapters cannot be trusted")
    if engine.is_main:
        write_out_of_fold(folder, data)
    engine.barrier()
    return folder
