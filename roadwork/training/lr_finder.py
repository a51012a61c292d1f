"""The learning-rate range test (Smith 2015, arXiv 1506.01186) on the run's own engine, optimizer and data."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from roadwork.config import Config, LrFinderConfig, accumulation
from roadwork.data.batch import Batch
from roadwork.engine import Engine, launched_rank, launched_world_size, set_up_device
from roadwork.monitoring.console import quiet_libraries
from roadwork.monitoring.progress import Progress
from roadwork.run_folder import prepare_folder
from roadwork.training.atomic import write_atomic
from roadwork.training.liveness import Stopped
from roadwork.training.loop import Trainer
from roadwork.training.masters import Masters
from roadwork.training.parts import build_data, build_model

CURVE, PICTURE = "lr_finder.json", "lr_finder.png"


@dataclass
class RangeTest:
    """Learning rates and smoothed losses of a range test.

    Args:
        options: range, number of steps, smoothing, divergence factor.
    """

    options: LrFinderConfig
    rates: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    _mean: float = 0.0

    def rate(self, step: int) -> float:
        """Exponentially spaced learning rate of step 0 .. steps - 1."""
        share = step / max(1, self.options.steps - 1)
        rate: float = self.options.start * (self.options.end / self.options.start) ** share
        return rate

    def add(self, rate: float, loss: float) -> bool:
        """Take a step's loss in (bias-corrected exponential mean); True where it has diverged."""
        if not math.isfinite(loss):
            return True
        beta = self.options.smoothing
        self._mean = beta * self._mean + (1 - beta) * loss
        smooth = self._mean / (1 - beta ** (len(self.losses) + 1))
        self.rates.append(rate)
        self.losses.append(smooth)
        return smooth > self.options.divergence * max(min(self.losses), 1e-12)

    def suggestion(self) -> float | None:
        """Rate of the steepest descent per decade before the minimum; None where the loss never fell."""
        if len(self.losses) < 3:
            return None
        lowest = min(range(len(self.losses)), key=self.losses.__getitem__)
        slopes = [
            (self.losses[i + 1] - self.losses[i - 1]) / math.log10(self.rates[i + 1] / self.rates[i - 1])
            for i in range(1, max(2, lowest))
            if i + 1 < len(self.losses)
        ]
        if not slopes or min(slopes) >= 0:
            return None
        return self.rates[1 + min(range(len(slopes)), key=slopes.__getitem__)]


def find_learning_rate(config: Config) -> RangeTest | None:
    """Run the range test; writes `lr_finder.json`, `lr_finder.png` and TensorBoard's `lr_finder/loss`. Collective.

    The engine, the optimizer, the order, the augmentation and the losses are those of pre-training; nothing of the run is
    changed: weights and optimizer state are put back bit for bit, and no checkpoint is written.

    Returns:
        the test; None where a stop signal cut it short: the files are then absent, also those of an earlier test.
    """
    accumulation(config, launched_world_size())
    set_up_device(config)  # `model.backbone auto` asks what there is
    data = build_data(config)
    made = build_model(config, data.view_size)
    folder = prepare_folder(config)
    quiet_libraries(folder / "logs" / f"find_lr-rank-{launched_rank():04d}.log")
    engine = Engine.start(config, "find_lr", trains=True)
    trainer = Trainer(config, engine, data, made, subfolder="lr_finder")
    if engine.is_main:
        for name in (CURVE, PICTURE):  # they say that the test has ended
            (folder / name).unlink(missing_ok=True)
    saved = snapshot(trainer.masters)
    test = RangeTest(config.lr_finder)
    ended = _sweep(trainer, test)
    restore(trainer.masters, saved)
    if engine.is_main and ended:
        _report(folder, test, trainer)
    elif engine.is_main:
        sys.stdout.write(f"find_lr stopped after {len(test.rates)} steps; launch again to do it anew\n")
    trainer.close()
    engine.close()
    return test if ended else None


def _sweep(trainer: Trainer, test: RangeTest) -> bool:
    """Take the steps of a range test; False where a signal cut it short. Collective."""
    config, data, engine = trainer.config, trainer.data, trainer.engine
    steps = min(config.lr_finder.steps, data.steps)
    loader = data.train_loader(engine, config, 0)
    progress = Progress("find_lr", steps, enabled=engine.is_main and config.monitoring.console)
    outcome = "failed"
    try:
        ended = _steps(trainer, test, steps, iter(loader), progress)
        outcome = "done" if ended else "stopped"
    except Stopped:
        ended, outcome = False, "stopped"
    finally:
        progress.close(outcome)
        loader.close()
    return ended


def _steps(trainer: Trainer, test: RangeTest, steps: int, batches: Iterator[Batch], progress: Progress) -> bool:
    """As `_sweep`. Raises Stopped where a signal came within a step."""
    for step in range(steps):
        trainer.fixed_rate = rate = test.rate(step)
        record, stop = trainer.optimizer_step(step, batches)
        progress.update(step + 1, trainer.config.training.global_batch, {"lr": rate, "loss": record["loss"]})
        if test.add(rate, record["loss"]):
            return True
        if stop and step + 1 < steps:
            return False
    return True


def snapshot(masters: Masters) -> dict[str, Any]:
    """This rank's masters and optimizer state, copied."""
    return {
        "flats": [flat.detach().clone() for flat in masters.flats()],
        "states": [{k: v.clone() if isinstance(v, Tensor) else v for k, v in s.items()} for s in masters.states()],
    }


@torch.no_grad()
def restore(masters: Masters, saved: dict[str, Any]) -> None:
    """Put a snapshot back, bit for bit. Collective."""
    for flat, kept, state in zip(masters.flats(), saved["flats"], saved["states"], strict=True):
        flat.copy_(kept)
        masters.optimizer.state[flat] = dict(state)
    masters.publish()


def _report(folder: Path, test: RangeTest, trainer: Trainer) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    suggestion = test.suggestion()
    figure, axes = pyplot.subplots(figsize=(7, 4))
    axes.semilogx(test.rates, test.losses)
    if suggestion is not None:
        axes.axvline(suggestion, color="tab:red", linestyle="--", label=f"suggestion {suggestion:.1e}")
        axes.legend()
    axes.set(xlabel="learning rate", ylabel="loss, smoothed", title="learning-rate range test")
    figure.savefig(folder / PICTURE, dpi=120, bbox_inches="tight")
    with trainer.journal.board() as board:
        for index, loss in enumerate(test.losses):
            board.scalars(index, {"lr_finder/loss": loss, "lr_finder/lr": test.rates[index]})
        board.figures(0, {"lr_finder/curve": figure})
    pyplot.close(figure)
    # Last: the pipeline knows by it that the test has ended.
    found = {"suggestion": suggestion, "rates": test.rates, "losses": test.losses}
    write_atomic(folder / CURVE, json.dumps(found, indent=1))
    said = f"suggested learning rate: {suggestion:.2e}" if suggestion else "the loss never fell: no suggestion"
    sys.stdout.write(f"{said}\ncurve: {folder / PICTURE}\n")
