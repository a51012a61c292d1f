"""What a checkpoint remembers besides tensors, and whether a launch may continue from it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from roadwork.config import Config, to_dict
from roadwork.errors import UserError

_LEARNED = ("model", "augment", "loss", "optimizer", "training")
_FREE = {
    "model.compile", "model.activation_checkpointing",
    "training.micro_batch", "training.gc_every_steps", "training.image_every_steps",
}  # fmt: skip
"""Of these sections what changes no weight but for rounding."""


@dataclass
class Counters:
    """What a checkpoint remembers besides tensors."""

    step: int = 0
    """Optimizer steps done."""
    samples_seen: int = 0
    """Photos that went through the loss."""
    last_mcc: float | None = None
    """Of the last validation; None: there was none, or the checkpoint is from before this was kept."""
    best_mcc: float = -2.0
    best_loss: float = math.inf
    best_step: int = -1
    stale_validations: int = 0
    """Validations since the best one."""
    validated_step: int = -1
    """Optimizer step of the last validation: one that a stop cut short is made up for after the relaunch."""
    average_updates: int = 0
    nonfinite_steps: int = 0
    skipped: list[list[str]] = field(default_factory=list)
    """[id, reason] of photos that did not decode, on any rank, each once."""
    finished: bool = False
    """The run reached its end or stopped early: a relaunch has nothing to train."""
    global_batch: int = 0
    seed: int = 0
    samples: int = 0
    order: str = ""
    """`global` or `windowed by N`; empty: a checkpoint from before this was kept."""
    photos: str = ""
    """SHA-256 of the photos and weights that the order draws from; empty: likewise."""
    select_on: str = ""
    """What `best_mcc` is an MCC of (`training.select_on`); empty: likewise."""
    optimizer: str = ""
    """Whose state the checkpoint holds (`optimizer.name`); empty: likewise."""

    @property
    def metric(self) -> str:
        """What `last_mcc` and `best_mcc` are, in words."""
        return "challenge MCC" if self.select_on == "challenge" else "MCC"

    def judged(self) -> dict[str, float]:
        """Figures of the validations for the console: the last MCC and the best one, as far as they are known."""
        figures = {self.metric: self.last_mcc, f"best {self.metric}": self.best_mcc if self.best_step >= 0 else None}
        return {name: value for name, value in figures.items() if value is not None}

    def check_same_run(self, now: Counters, path: Path) -> None:
        """UserError where the launch `now` would draw or judge other photos than the run of checkpoint `path`."""
        for name in ("global_batch", "seed", "samples", "order"):
            before, after = getattr(self, name), getattr(now, name)
            if before not in ("", after):
                raise UserError(
                    f"{path} was trained with {name} {before}, this launch has {after}; "
                    "the order of samples depends on it: give the same, or another --run.dir"
                )
        if self.photos not in ("", now.photos):
            raise UserError(
                f"{path} was trained on other photos or weights (the shards were built anew or reweighted, or "
                "data.gps_weighted changed); the order of samples depends on them: give the same, or another --run.dir"
            )
        if self.optimizer not in ("", now.optimizer):
            raise UserError(
                f"{path} holds the state of optimizer.name {self.optimizer}, this launch has {now.optimizer}: give the "
                "same, or another --run.dir with --model.init_from"
            )
        if self.select_on not in ("", now.select_on):
            raise UserError(
                f"{path}: its best weights were chosen by training.select_on {self.select_on}, this launch has "
                f"{now.select_on}; the two cannot be compared: give the same, or another --run.dir"
            )


def check_finished_options(config: Config, folder: Path) -> None:
    """UserError where the run in `folder`, which is finished, was trained with other options than `config`.

    Nothing would be trained with the new ones, and what is said of the weights afterwards would be untrue.
    """
    try:
        trained = yaml.safe_load((folder / "config.yaml").read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return
    now = yaml.safe_load(yaml.safe_dump(to_dict(config)))
    other = [
        f"{section}.{name} {value} (now {now[section][name]})"
        for section in _LEARNED
        for name, value in trained.get(section, {}).items()
        if f"{section}.{name}" not in _FREE and now[section].get(name, value) != value
    ]
    if other:
        raise UserError(
            f"{folder} is finished, trained with {', '.join(other[:3])}{', ...' if other[3:] else ''}: give the same, or "
            f"another --run.dir (with --model.init_from {folder}/best to train on)"
        )
