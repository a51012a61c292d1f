"""What the ablation compares: training runs that each lack one component, and the claims that are read off them."""

from __future__ import annotations

from dataclasses import dataclass

BASE = "full"
NETWORK, FOLDS, ENSEMBLE, TTA = "network", "folds", "ensemble", "tta"
"""Ways to answer: the pre-trained network alone, each fold's network alone, the ensemble, the network with FOODS."""

VARIANTS: dict[str, tuple[str, ...]] = {
    BASE: (),
    "no_gps_weights": ("--data.gps_weighted=false",),
    "no_augmentation": ("--augment.enabled=false",),
    "no_ema": ("--training.ema_decay=0",),
    "pruning": (f"--model.keep_ratio={2 / 3}",),
    "cross_entropy": ("--loss.gamma=0",),
    "no_consistency": ("--loss.consistency=0",),
    "no_weather": ("--loss.weather=0",),
    "no_segmentation": ("--loss.segmentation=0",),
    "no_view_labels": ("--loss.view_labels=0",),
    "no_balance": ("--loss.balance=0",),
}
"""Training run -> options that switch one component off, or pruning on; everything else is as in `full`, the demo."""


@dataclass(frozen=True)
class Side:
    """One side of a comparison: the answers of a training run, found in one way."""

    variant: str
    system: str


@dataclass(frozen=True)
class Claim:
    """A gain that is claimed: the same photos answered with a component and without it."""

    name: str
    what: str
    claimed: str
    """What the original sketch of this trainer promised, in MCC; empty: no figure was given."""
    with_it: Side
    without: Side
    kept: str
    """Why the default has it while nothing is shown of it."""
    off: str = ""
    """Where it was switched off because it harms, and where it stays."""


PER_RUN = "each run's held-out groups decide whether it is used"


def _training(name: str, what: str, claimed: str, variant: str, kept: str) -> Claim:
    return Claim(name, what, claimed, Side(BASE, NETWORK), Side(variant, NETWORK), kept)


CLAIMS: tuple[Claim, ...] = (
    _training("gps_weights", "draws by distance to the target region", "+7 to +10 %", "no_gps_weights",
              "without a target region every weight is 1, and whether nearness helps depends on the photos of use"),
    _training("augmentation", "augmentation in training", "+5 to +7 %", "no_augmentation",
              "costs little, and photos of use vary more than these"),
    _training("ema", "average of the weights", "+0.5 to +1 %", "no_ema",
              "meant for long runs, and these are short"),
    _training("focal", "focal loss in place of cross entropy", "", "cross_entropy", "costs nothing"),
    _training("consistency", "view consistency term, with its share of view supervision", "", "no_consistency",
              "costs nothing"),
    _training("weather", "weather term", "", "no_weather", "costs nothing, and the report breaks down by weather"),
    _training("segmentation", "segmentation term", "", "no_segmentation", "predicted masks show what was looked at"),
    _training("view_labels", "view labels from the masks", "", "no_view_labels", "costs nothing"),
    _training("balance", "experts' load-balance term", "", "no_balance", "without it experts may starve"),
    Claim("pruning", "pruning to two thirds of the views; a cost is negative", "", Side("pruning", NETWORK),
          Side(BASE, NETWORK), "it saves time with large backbones; the demo's small one does without it",
          "in the demo's configuration; the default keeps two thirds, for the time that large backbones take"),
    Claim("dora", "one DoRA fold over the network that it started from", "+2 to +4 %",
          Side(BASE, FOLDS), Side(BASE, NETWORK), PER_RUN),
    Claim("tta", "FOODS test-time augmentation", "+2 to +4 %", Side(BASE, TTA), Side(BASE, NETWORK), PER_RUN),
    Claim("ensemble", "ensemble of folds and pre-trained network over a single fold", "",
          Side(BASE, ENSEMBLE), Side(BASE, FOLDS), PER_RUN),
)  # fmt: skip
