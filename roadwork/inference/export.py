"""The network that the report chose, as one folder that serves and uploads as it is."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from roadwork.inference.calibration import Calibration
from roadwork.models import RoadworkDetector
from roadwork.models.adapters import Overrides, replaced

SECTION = """
## How it was chosen

- Network: {name}
- Calibration for photos without metadata under class prior {prior:g}: temperature {temperature:.4g}, bias {bias:+.4g}
- MCC on held-out groups, pixels alone, all views of each photo, at that prior: {mcc}
- On one centred 224 px view of each, as the challenge sends photos, with the same calibration: {single_view}

The held-out groups also chose between the candidate networks and fitted the calibration (cross-fitted for the figure
above). Nothing was fitted on the test split.
"""


def write_model(
    folder: Path,
    model: RoadworkDetector,
    name: str,
    overrides: Overrides,
    calibration: Calibration,
    prior: float,
    figures: dict[str, Any],
    single_view: dict[str, Any],
) -> None:
    """Write model/ under a temporary name and rename it; the model is unchanged afterwards.

    overrides: the member's weights by parameter name, shaped like the model's; prior: share of positives that the
    calibration answers for; figures, single_view: held-out scores for the card.
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    values = {"temperature": calibration.temperature, "bias": calibration.bias, "prior": prior}
    with replaced(model, overrides):
        model.save_pretrained(temporary, calibration=values)
    with (temporary / "README.md").open("a", encoding="utf-8") as card:
        card.write(SECTION.format(name=name, mcc=_words(figures), single_view=_words(single_view), **values))
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _words(figures: dict[str, Any]) -> str:
    """An MCC with its interval for people."""
    if figures["mcc"] is None:
        return "not measured (no labelled held-out photos)"
    low, high = figures["mcc_interval"]
    span = "" if low is None else f" (95 % interval over groups {low:.3f} to {high:.3f})"
    return f"{figures['mcc']:.3f}{span}"
