"""Trains a few steps plainly, then with compiled blocks and recomputed activations: argv[1] is a folder, the rest options.

Rank 0 writes `losses.json`: the loss of every step of both runs, and what the second one was made of.
"""

import functools
import json
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState

from roadwork.command_line import parse
from roadwork.engine import Engine
from roadwork.models import RoadworkDetector
from roadwork.training.loop import Trainer
from roadwork.training.parts import build_data, build_model

STEPS = 3
COMPILED = ["--model.compile=true", "--model.activation_checkpointing=true"]
# Everything but the code generator, which needs a compiler and a minute: tracing, autograd's joint graph, varying sizes.
RoadworkDetector.compile_blocks = functools.partialmethod(  # type: ignore[method-assign, assignment]
    RoadworkDetector.compile_blocks, fullgraph=True, backend="aot_eager"
)


def train(folder: Path, options: list[str]) -> dict:
    """One training; the process group outlives it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    config = parse("pretrain", [*options, f"--run.dir={folder}"]).config
    data = build_data(config)
    engine = Engine.start(config, "pretrain", trains=True)
    trainer = Trainer(config, engine, data, build_model(config, data.view_size))
    loader = data.train_loader(engine, config, 0)
    batches = iter(loader)
    losses = [trainer.optimizer_step(step, batches)[0]["loss"] for step in range(STEPS)]
    stage = engine.accelerator.deepspeed_engine_wrapped.engine.zero_optimization_stage()
    seen = {"losses": losses, "stage": stage, "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"]}
    seen |= {key: trainer.model.runtime()[key] for key in ("compile", "dtype", "activation_checkpointing")}
    loader.close()
    trainer.close()
    engine.barrier()
    return seen | {"rank": engine.rank}


if __name__ == "__main__":
    place, given = Path(sys.argv[1]), sys.argv[2:]
    made = {name: train(place / name, [*given, *more]) for name, more in (("plain", []), ("compiled", COMPILED))}
    if made["plain"]["rank"] == 0:
        (place / "losses.json").write_text(json.dumps(made))
