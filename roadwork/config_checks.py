"""What is impossible in the tree of options, said in one line before any process group starts."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from roadwork.config_ranges import SECTIONS, SEED, check_augment, check_loss, check_model, check_section, check_values
from roadwork.errors import UserError

if TYPE_CHECKING:
    from roadwork.config import Config

PIPELINE = (
    "fairness",
    "shards",
    "pseudo_masks",
    "shard_masks",
    "find_lr",
    "pretrain",
    "dora_folds",
    "predict",
    "evaluate",
)
"""Stages in the order in which they can run."""
TRACKERS = ("tensorboard", "wandb")


def validate(config: Config) -> None:
    """Refuse impossible values and combinations, before any process group starts. Raises UserError."""
    training, model = config.training, config.model
    SEED.check("seed", config.seed)
    check_model(model)
    check_augment(config.augment)
    check_loss(config.loss)
    for section, ranges in SECTIONS.items():
        check_section(section, getattr(config, section), ranges)
    check_values(config)
    if config.optimizer.name == "sophia_h" and model.compile:
        raise UserError(
            "optimizer.name sophia_h differentiates twice, which compiled blocks cannot; "
            "give --model.compile false, or --optimizer.name sophia"
        )
    if not training.max_steps and not training.epochs:
        raise UserError("training.epochs and training.max_steps are both 0; give one of them")
    if not 1 <= model.top_k <= model.num_experts:
        raise UserError(f"model.top_k {model.top_k} must be between 1 and model.num_experts {model.num_experts}")
    if model.hidden_dim % model.num_heads or model.num_heads % model.num_kv_heads:
        raise UserError(
            f"model.hidden_dim {model.hidden_dim} must be a multiple of model.num_heads {model.num_heads}, "
            f"and that of model.num_kv_heads {model.num_kv_heads}"
        )
    if not 0 < model.keep_ratio <= 1:
        raise UserError(f"model.keep_ratio is {model.keep_ratio}; it is the share of views kept, in (0, 1]")
    if not re.fullmatch(r"frozen|full|last-[1-9]\d*", model.trainable):
        raise UserError(f"model.trainable is {model.trainable!r}; allowed: frozen, last-N (such as last-2), full")
    if config.checkpoint.keep_last < 2:
        raise UserError(f"checkpoint.keep_last is {config.checkpoint.keep_last}; at least 2 are kept")
    if not 0 < config.predict.prior < 1:
        raise UserError(f"predict.prior is {config.predict.prior}; a prior lies strictly between 0 and 1")
    asked = config.predict.challenge or config.training.select_on == "challenge"
    if config.predict.challenge_synthetic and not asked:
        raise UserError(
            "predict.challenge_synthetic is given, but nothing asks the challenge; add --predict.challenge true, or "
            "--training.select_on challenge for training"
        )
    strange = [stage for stage in config.pipeline.stages if stage not in PIPELINE]
    if strange or config.pipeline.stages != sorted(config.pipeline.stages, key=PIPELINE.index):
        raise UserError(f"pipeline.stages is {config.pipeline.stages}; allowed, in this order: {', '.join(PIPELINE)}")
    if not config.run.dir:
        raise UserError("run.dir is empty; give a folder")
    if not config.lr_finder.start < config.lr_finder.end:
        raise UserError(
            f"lr_finder.start {config.lr_finder.start} is not below lr_finder.end {config.lr_finder.end}; give a larger end"
        )
    check_trackers(config.monitoring.trackers)
    unknown = set(model.metadata_fields) - {"gps", "weather", "daytime", "scene", "text"}
    if unknown:
        raise UserError(f"model.metadata_fields has {sorted(unknown)}; allowed: gps, weather, daytime, scene, text")


def accumulation(config: Config, world_size: int) -> int:
    """Micro-batches per optimizer step and process. Raises UserError with the values that work."""
    total, micro = config.training.global_batch, config.training.micro_batch
    if total % world_size:
        near = sorted({max(1, total // world_size) * world_size, (total // world_size + 1) * world_size})
        raise UserError(
            f"training.global_batch {total} does not divide over {world_size} processes; "
            f"use {' or '.join(map(str, near))}, or another number of processes"
        )
    per_process = total // world_size
    if per_process % micro:
        allowed = [m for m in range(1, per_process + 1) if per_process % m == 0]
        raise UserError(
            f"training.micro_batch {micro} does not divide the {per_process} photos that each of {world_size} processes "
            f"takes of training.global_batch {total}; allowed: {', '.join(map(str, allowed))}"
        )
    return per_process // micro


def check_trackers(names: Iterable[str]) -> None:
    """UserError for a name that is none of TRACKERS."""
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"unknown tracker {name!r} in monitoring.trackers; allowed: {', '.join(TRACKERS)}")


def check_tracker_packages(names: Iterable[str]) -> None:
    """UserError where the package of a tracker is missing: to be asked before a run changes anything."""
    if "wandb" in names and importlib.util.find_spec("wandb") is None:
        raise UserError(
            "monitoring.trackers names wandb, which is not installed: "
            "pip install -c constraints.txt -e '.[wandb]', or leave it out"
        )
