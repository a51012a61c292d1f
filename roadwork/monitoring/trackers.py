"""Extra receivers of scalars, asked for by name. TensorBoard itself is always written."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from roadwork.config_checks import check_tracker_packages, check_trackers


class Tracker(Protocol):
    """What `Board` sends scalars to."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Values by tag at an optimizer step."""

    def close(self) -> None:
        """No more values."""


class WandbTracker:
    """Weights & Biases through Accelerate's tracker, in the mode that WANDB_MODE says.

    The run continues under the same id after a relaunch.
    """

    def __init__(self, directory: str | os.PathLike[str], options: Mapping[str, Any]) -> None:
        from accelerate.tracking import WandBTracker

        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        known = folder / "wandb_run_id"
        name = known.read_text().strip() if known.exists() else uuid.uuid4().hex[:8]
        known.write_text(name)
        self.tracker: Any = WandBTracker("roadwork", id=name, resume="allow", dir=str(folder), name=folder.parent.name)
        self.tracker.start()
        self.tracker.store_init_configuration(dict(options))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.tracker.log(dict(values), step=step)

    def close(self) -> None:
        self.tracker.finish()


def open_trackers(names: Sequence[str], directory: str | os.PathLike[str], options: Mapping[str, Any]) -> list[Tracker]:
    """The extra trackers among `names`. UserError for an unknown one, or one that is not installed."""
    check_trackers(names)
    check_tracker_packages(names)
    return [WandbTracker(directory, options) for name in names if name == "wandb"]
