"""`best/`: the weights with the best validation score, and how they come back where somebody removed them."""

from __future__ import annotations

import logging
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from roadwork.models.detector import RoadworkDetector
from roadwork.training.checkpoint import MARKER, damage
from roadwork.training.parts import save_model

log = logging.getLogger(__name__)


def is_there(run: Path) -> bool:
    """Whether a run folder holds the model of its best validation."""
    return (run / "best" / "model.safetensors").is_file()


def keep_best(run: Path, step: int, model: RoadworkDetector, state: dict[str, Tensor]) -> None:
    """Replace `best/`; a full disk leaves the one before. Rank 0.

    Args:
        run: the run folder.
        step: optimizer steps of these weights, for the message.
        model: whose configuration is written with them.
        state: whole fp32 tensors by name, shaped like the model's: trained, frozen and buffers.
    """
    try:
        save_model(run / "best", model, state)
    except OSError as error:
        log.error("best/ of step %d not written: %s; the one before is intact", step, error)


def weights_of(run: Path, step: int) -> dict[str, Tensor] | None:
    """The trained weights that were validated after `step` steps, from that step's checkpoint: the average, or the
    masters of a run without one; fp32, shaped like the parameters. None where the checkpoint is gone or damaged.
    """
    path = run / "checkpoints" / f"step-{step:08d}"
    if not (path / MARKER).is_file() or damage(path) is not None:
        return None
    average = path / "average.safetensors"
    return load_file(average if average.is_file() else path / "master.safetensors")
