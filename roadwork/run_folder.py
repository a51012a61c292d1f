"""The run folder: made where it is not there, seen to take what a run writes, and true to the options of its run."""

from __future__ import annotations

import os
import socket
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


def prepare_folder(config: Config) -> Path:
    """Make the run folder and its `logs/`. Raises UserError where it cannot be written."""
    folder = Path(config.run.dir)
    probe = folder / f".probe-{socket.gethostname()}-{os.getpid()}"
    try:
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        probe.write_bytes(bytes(4096))  # a read-only or full disk shows only when something is written
        probe.unlink()
    except OSError as error:
        raise UserError(f"run.dir {folder} cannot be written: {error.strerror}; give another --run.dir") from None
    return folder


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
