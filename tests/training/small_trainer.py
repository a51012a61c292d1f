"""A whole trainer in this very process: real shards, model, optimizer and files, no launcher and no process group."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin

from roadwork.command_line import parse
from roadwork.config import Config, accumulation
from roadwork.engine import Engine
from roadwork.training.liveness import SIGNALS
from roadwork.training.loop import Trainer
from roadwork.training.parts import build_data, build_model
from tests.data.sheets import build

OPTIONS = [
    "--model.backbone=test_vit", "--model.weights=random", "--model.hidden_dim=32", "--model.num_layers=1",
    "--model.num_heads=4", "--model.num_kv_heads=2", "--model.expert_dim=16", "--model.segmentation_size=8",
    "--model.prune_after=1", "--data.workers=0", "--training.global_batch=4", "--training.micro_batch=2",
    "--training.max_steps=6", "--training.warmup_steps=2", "--training.validate_every_steps=100",
    "--training.image_every_steps=0", "--monitoring.console=false", "--monitoring.ceiling_tflops=0.05",
    "--checkpoint.every_steps=0",
]  # fmt: skip
"""Two micro-batches of two photos per step; validated and saved at the end alone."""

Make = Callable[..., Trainer]


def options(run: Path, shards: Path, *more: str) -> Config:
    return parse("pretrain", [*OPTIONS, f"--run.dir={run}", f"--data.shards={shards}", *more]).config


def plain_engine(config: Config) -> Engine:
    """One process on the CPU in fp32, without ZeRO."""
    AcceleratorState._reset_state(reset_partial_state=True)
    steps = GradientAccumulationPlugin(num_steps=accumulation(config, 1), sync_with_dataloader=False)
    accelerator = Accelerator(cpu=True, mixed_precision="no", gradient_accumulation_plugin=steps)
    return Engine(accelerator, 0, 1, 0, torch.device("cpu"), False, config.engine.timeout_s)


@pytest.fixture(scope="module", name="shards")
def sheets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("sheets") / "shards", {"train": 21, "val": 10})


@pytest.fixture(name="trainer")
def make_trainer(shards: Path, tmp_path: Path) -> Iterator[Make]:
    """Make a trainer of the run folder tmp_path/run, or resume it; what is still open at the end is closed."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    made: list[Trainer] = []

    def make(*more: str, kind: type[Trainer] = Trainer, run: Path = tmp_path / "run", **given: Any) -> Trainer:
        config = options(run, shards, *more)
        data = build_data(config)
        made.append(kind(config, plain_engine(config), data, build_model(config, data.view_size), **given))
        return made[-1]

    yield make
    for one in made:
        one.close()
    for number, handler in before.items():
        signal.signal(number, handler)
