"""Runs several short trainings in one launch and keeps what they computed: argv[1] is a JSON file of trials.

A trial holds `name`, `options`, `until` (optimizer step) and, where wanted, `save_at` and `trap`. Rank 0 writes NAME.pt
beside the JSON file: the state as it was after building or resuming (`start`), after one optimizer step (`first`), where it
saved (`saved`) and at the end (`end`), the lines of metrics.jsonl, which views and experts were chosen for each photo, and
DeepSpeed's own counters. With `sgd` the optimizer is torch's SGD, whose steps are the gradients: Adam hides their scale.

A trap is one of the known ways in which such an engine goes wrong without a word, put back on purpose.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate.state import AcceleratorState

from roadwork import engine as engine_module
from roadwork.command_line import parse
from roadwork.engine import Engine
from roadwork.training.checkpoint import gather_training_state
from roadwork.training.loop import Trainer
from roadwork.training.parts import build_data, build_model
from tests.distributed.choices import Choices
from tests.distributed.plain_loop import MOMENTUM


class Watched(Trainer):
    """Draws the curvature's labels, or signs, from a seed that a reference can repeat, and notes what the model chooses."""

    choices: Choices

    def _micro_step(self, step, micro, batch, counts):  # type: ignore[no-untyped-def]
        self.choices.positions = batch.position.tolist()
        return super()._micro_step(step, micro, batch, counts)

    def _curvature(self, views, batch):  # type: ignore[no-untyped-def]
        torch.manual_seed(1000 + self.engine.rank)
        super()._curvature(views, batch)

    def _loss_again(self, step, views, view_mask, batch, targets):  # type: ignore[no-untyped-def]
        torch.manual_seed(1000 + self.engine.rank)
        return super()._loss_again(step, views, view_mask, batch, targets)


def bf16_sums(path: Path) -> dict:
    """DeepSpeed's own default: micro-batches are added, and ranks reduced, in bf16."""
    settings = json.loads(path.read_text())
    del settings["data_types"], settings["communication_data_type"]
    return settings


def spring(trap: str, trainer: Trainer) -> None:
    """Put a trap back into a built trainer."""
    ds = trainer.engine.accelerator.deepspeed_engine_wrapped.engine
    if trap == "only the last micro-batch":  # together with bf16_sums: every micro-batch claims to be the last
        boundary = ds.set_gradient_accumulation_boundary
        ds.set_gradient_accumulation_boundary = lambda is_boundary: boundary(True)
    elif trap == "a sum that is cleared":
        held = trainer.gradients.held
        add = held.add
        held.add = lambda loss: (held.clear(), add(loss))
    elif trap == "divided twice":
        backward = trainer.gradients.backward
        trainer.gradients.backward = lambda loss: backward(loss / trainer.micro_steps)
    elif trap == "a scheduler per process":
        rate = trainer._set_learning_rate
        trainer._set_learning_rate = lambda step: rate(step * trainer.engine.world_size)
    elif trap == "a short last step counted as full":
        counts, full = trainer.counts.of, trainer.counts.of(0)
        trainer.counts.of = lambda step: full if step == trainer.steps_total - 1 else counts(step)
    elif trap != "bf16 sums":
        raise ValueError(f"no trap {trap}")


def run(trial: dict, folder: Path) -> None:
    """One training; the process group outlives it."""
    exact, trap = engine_module.read_ds_config, trial.get("trap")
    if trap in ("bf16 sums", "only the last micro-batch"):
        engine_module.read_ds_config = bf16_sums
    try:
        train(trial, folder)
    finally:
        engine_module.read_ds_config = exact


def train(trial: dict, folder: Path) -> None:
    """Build, train, write down."""
    AcceleratorState._reset_state(reset_partial_state=True)
    config = parse("pretrain", [*trial["options"], f"--run.dir={folder / trial['name']}"]).config
    data = build_data(config)
    made = build_model(config, data.view_size)
    engine = Engine.start(config, "pretrain", trains=True)
    if trial.get("sgd"):
        made = made._replace(optimizer=torch.optim.SGD(made.optimizer.param_groups, momentum=MOMENTUM))
    trainer = Watched(config, engine, data, made)
    trainer.choices = Choices(trainer.model)
    if trial.get("trap"):
        spring(trial["trap"], trainer)
    seen = {"start": gather_training_state(trainer.masters, trainer.average), "records": [], "counters": None}
    seen["counters"] = asdict(trainer.counters)
    loader = data.train_loader(engine, config, trainer.counters.step)
    batches = iter(loader)
    for step in range(trainer.counters.step, trial["until"]):
        record, _ = trainer.optimizer_step(step, batches)
        seen["records"].append(record)
        trainer.counters.step = step + 1
        if step == 0:
            seen["first"] = gather_training_state(trainer.masters, trainer.average)
        if trial.get("save_at") == step + 1:
            trainer._save()
            trainer.checkpoints.wait()
            seen["saved"] = gather_training_state(trainer.masters, trainer.average)
    seen["end"] = gather_training_state(trainer.masters, trainer.average)
    if engine.sharded:
        ds = engine.accelerator.deepspeed_engine_wrapped.engine
        seen["engine"] = {"global_steps": ds.global_steps, "micro_steps": ds.micro_steps, "skipped": ds.skipped_steps}
    seen["ranks"] = engine.world_size
    seen["rates"] = [group["lr"] / group.get("lr_scale", 1.0) for group in trainer.masters.groups()]
    seen["chosen"] = dict(engine.gather_object(list(trainer.choices.of.items())))
    loader.close()
    trainer.close()
    if engine.is_main:
        torch.save(seen, folder / f"{trial['name']}.pt")
    engine.barrier()


if __name__ == "__main__":
    listed = Path(sys.argv[1])
    for wanted in json.loads(listed.read_text()):
        run(wanted, listed.parent)
