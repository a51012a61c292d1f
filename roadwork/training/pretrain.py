"""The pre-training stage: everything that can be refused is refused before a process group starts."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

from roadwork.config import Config, accumulation
from roadwork.engine import Engine, launched_rank, launched_world_size, set_up_device
from roadwork.evaluation.standing import synthetic_half
from roadwork.monitoring.console import lines_may_be_lost, quiet_libraries
from roadwork.run_folder import prepare_folder
from roadwork.training.checkpoint import complete_checkpoints
from roadwork.training.counters import Counters
from roadwork.training.loop import Trainer
from roadwork.training.parts import build_data, build_model

log = logging.getLogger(__name__)


def pretrain(config: Config) -> Counters:
    """Train, or continue, the run in `config.run.dir`. Collective.

    Raises:
        UserError: options, shards or a run folder that cannot work.
    """
    accumulation(config, launched_world_size())
    set_up_device(config)  # `model.backbone auto` asks what there is
    data = build_data(config)
    if config.training.select_on == "challenge":
        synthetic_half(config)  # refused now, not at the first validation
    made = build_model(config, data.view_size)
    folder = prepare_folder(config)
    quiet_libraries(folder / "logs" / f"pretrain-rank-{launched_rank():04d}.log")
    engine = Engine.start(config, "pretrain", trains=True)
    trainer = Trainer(config, engine, data, made)
    del made  # its fp32 copy of the weights: the masters have them now
    if engine.is_main:
        _say("model: " + ", ".join(f"{name} {value}" for name, value in trainer.model.runtime().items()))
    counters = trainer.run()
    if engine.is_main:
        _say(*closing(counters, data.steps, folder))
    engine.close()
    return counters


def closing(counters: Counters, steps: int, folder: Path) -> Iterator[str]:
    """What came of a run of `steps` optimizer steps, where it lies, and what to do next: a few lines."""
    ended = "finished" if counters.finished else "stopped; launch again to continue"
    yield f"pretrain {ended} at step {counters.step} of {steps}"
    if counters.best_step >= 0:
        told = f"{counters.metric} {counters.best_mcc:.3f} on the validation photos, at step {counters.best_step}"
        yield f"best weights: {folder / 'best'} ({told})"
    if saved := complete_checkpoints(folder / "checkpoints"):
        yield f"checkpoint:   {saved[-1]}"
    if counters.skipped:
        yield f"unreadable:   {folder / 'skipped.jsonl'} names {len(counters.skipped)} photos"
    yield f"curves:       tensorboard --logdir {folder / 'tensorboard'}"
    if counters.finished:
        yield f"next:         accelerate launch launch/dora_folds.py --run.dir {folder}"


def _say(*lines: str) -> None:
    with lines_may_be_lost():
        sys.stdout.write("\n".join(line for line in lines if line) + "\n")
        sys.stdout.flush()
