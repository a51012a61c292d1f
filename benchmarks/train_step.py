"""The project's own training step: `python -m benchmarks.train_step [--json] [--model.backbone NAME ...]`.

Loader or resident batches, augmentation, every head and loss, accumulation, clipping, optimizer, average: what `pretrain`
runs between two checkpoints. A plain loop, ZeRO-2, and ZeRO-2 without view pruning take turns in one process, and the
figures are medians over rounds (ratios: of each round; `_low` and `_high` are their quartiles). Weights are randomly
initialised: they do not change the time.

Besides, of the ZeRO-2 arm: `forward_of_ceiling` (forward passes alone), `augment_ms` of 48 views of `augment_size` px and
`augment_share`, what that is of a step's time; null where the arm did not run. `compile_s` is what the first step of an arm
took beyond a later one; null without `--model.compile`.

World size is 1; for more, `accelerate launch --num_processes N -m benchmarks.train_step --shards DIR`. Without a GPU it
measures the demo's model on the CPU, says `gpu: false`, and takes as the ceiling a smaller matrix product in the faster of
bf16 and fp32. Options of the configuration (`--a.b=VALUE`) replace those of `launch/configs/natix.yaml` on a GPU, of
`launch/configs/demo.yaml` on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState

from benchmarks.step_parts import PHOTOS, VIEWS, augment_ms, forward_rate
from benchmarks.training_run import options, shards_for
from roadwork.cli import exit_on_user_error
from roadwork.config import Config
from roadwork.data.batch import Batch
from roadwork.engine import CPU_CONFIG, GPU_CONFIG, Engine, launched_rank, launched_world_size
from roadwork.errors import UserError
from roadwork.monitoring.console import quiet_libraries
from roadwork.monitoring.throughput import memory_gib
from roadwork.training.loop import Trainer
from roadwork.training.parts import build_data, build_model

PRUNED = f"--model.keep_ratio={2 / 3}"
"""The default, which the demo does without."""
ARMS: dict[str, list[str]] = {
    "plain": ["--engine.ds_config=none", PRUNED],
    "zero2": [PRUNED],
    "zero2_unpruned": ["--model.keep_ratio=1"],
}
"""What takes turns: its name and its options."""
PROFILED_STEPS = 2
TERA = 1e12


@exit_on_user_error
def main() -> None:
    """Measure and print; the last line is one JSON object. UserError for several processes without --shards."""
    arguments, more = command_line().parse_known_args()
    gpu = torch.cuda.is_available()
    if launched_world_size() > 1 and not arguments.shards:
        raise UserError("several processes need the same shards: give --shards DIR")
    with tempfile.TemporaryDirectory() as scratch:
        shards = shards_for(arguments.shards, arguments.view_size or (512 if gpu else 128), Path(scratch))
        bench = Bench(arguments, more, shards, Path(scratch), gpu)
        order = list(arguments.arms)
        for turn in range(bench.rounds):
            for arm in order if turn % 2 == 0 else reversed(order):
                bench.measure(arm, profiled=arguments.profile and turn == bench.rounds - 1 and arm == "zero2")
        if launched_rank() == 0:
            report(bench.figures(), arguments.json)


def command_line() -> argparse.ArgumentParser:
    """The benchmark's own options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", default="", help="default: a few street photos, built for the run")
    parser.add_argument("--view-size", type=int, default=0, help="of those; default 512 on a GPU, 128 on a CPU")
    parser.add_argument("--data", choices=("loader", "resident"), default="loader", help="resident: the same batches")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--rounds", type=int, default=0, help="default 3 on a GPU, 7 on a CPU")
    parser.add_argument("--steps", type=int, default=0, help="timed steps a turn; default 10 on a GPU, 6 on a CPU")
    parser.add_argument("--warm", type=int, default=0, help="steps before them; default 3 on a GPU, 2 on a CPU")
    parser.add_argument("--profile", action="store_true", help="name the operations that take longest")
    parser.add_argument("--json", action="store_true", help="only the JSON line")
    return parser


class Bench:
    """Turns of the arms and what they gave.

    Args:
        arguments: the benchmark's options.
        more: options of the configuration.
        shards: folder of shards.
        scratch: for run folders.
        gpu: whether a GPU computes.
        arms: options of each arm; the DeepSpeed file of one that names none is the shipped one.
    """

    def __init__(
        self,
        arguments: argparse.Namespace,
        more: list[str],
        shards: str,
        scratch: Path,
        gpu: bool,
        arms: dict[str, list[str]] = ARMS,
    ) -> None:
        self.arguments, self.more, self.shards, self.scratch, self.gpu = arguments, more, shards, scratch, gpu
        self.arms = arms
        self.rounds = arguments.rounds or (3 if gpu else 7)
        self.steps = arguments.steps or (10 if gpu else 6)
        self.warm = arguments.warm or (3 if gpu else 2)
        self.turns: dict[str, list[dict[str, float]]] = defaultdict(list)
        self.parts: list[dict[str, float]] = []
        self.facts: dict[str, Any] = {}
        self.top: list[dict[str, Any]] = []

    def _config(self, arm: str) -> Config:
        given = ["--model.weights=random", "--training.max_steps=1000000"]
        if self.gpu:
            batch = 2 * 4 * launched_world_size()  # accumulation 4
            given += ["--model.trainable=full", "--training.micro_batch=2", f"--training.global_batch={batch}"]
        if arm != "plain":  # said aloud: what the turn before left in the environment must not decide
            given += [f"--engine.ds_config={GPU_CONFIG if self.gpu else CPU_CONFIG}"]
        return options(self.scratch / arm, self.shards, self.gpu, *given, *self.more, *self.arms[arm])

    def measure(self, arm: str, profiled: bool = False) -> None:
        """One turn: build, warm up, time, take down."""
        AcceleratorState._reset_state(reset_partial_state=True)
        config = self._config(arm)
        data = build_data(config)
        made = build_model(config, data.view_size)
        quiet_libraries(self.scratch / "bench.log")
        engine = Engine.start(config, "train_step", trains=True)
        if self.gpu:
            torch.cuda.reset_peak_memory_stats(engine.device)
        trainer = Trainer(config, engine, data, made, subfolder="bench")
        resident = self.arguments.data == "resident"
        loader = data.train_loader(engine, replace_workers(config, 0) if resident else config, 0)
        source = iter(loader)
        batches = kept(source, trainer.micro_steps) if resident else source
        self._time(arm, trainer, batches, resident)
        if arm == "zero2":
            self._time_parts(trainer, next(batches))
        if profiled:
            self.top = profile(trainer, batches, self.gpu)
        self._note(config, trainer)
        loader.close()
        trainer.close()
        take_down(trainer)

    def _time(self, arm: str, trainer: Trainer, batches: Iterator[Batch], resident: bool) -> None:
        operations, seconds, rates, waits, photos = [], [], [], [], trainer.config.training.global_batch
        first = 0.0
        for number in range(self.warm + self.steps):
            step = 0 if resident else number
            began = time.perf_counter()
            record, _ = trainer.optimizer_step(step, batches)
            spent = time.perf_counter() - began
            first = first or spent
            if number >= self.warm:
                views, behind = trainer.counts.views(step)
                seconds.append(spent)
                rates.append(views / spent)
                operations.append(trainer.utilisation.operations.training(views, behind) / spent)
                waits.append(record["data_wait_s"])
        middle = statistics.median(seconds)
        self.turns[arm].append(
            {
                "views_per_s": statistics.median(rates),
                "photos_per_s": photos / middle,
                "operations_per_s": statistics.median(operations),
                "step_s": middle,
                "data_wait_s": statistics.median(waits),
                "first_step_s": first,
                "ceiling": trainer.utilisation.ceiling,
                "memory_gib": memory_gib(trainer.engine.device),
            }
        )

    def _time_parts(self, trainer: Trainer, batch: Batch) -> None:
        """Forward and augmentation on their own, in the state that the steps left the machine in."""
        device, size = trainer.engine.device, 518 if self.gpu else trainer.model.view_size
        rate = forward_rate(trainer, batch, self.steps)
        spent = augment_ms(trainer.augment, size, self.steps, device)
        views = trainer.counts.views(0)[0] / trainer.engine.world_size
        self.parts.append(
            {
                "forward": rate,
                "augment_ms": spent,
                "augment_size": size,
                "augment_step_ms": spent * views / (PHOTOS * VIEWS),
            }
        )

    def _note(self, config: Config, trainer: Trainer) -> None:
        engine, training = trainer.engine, config.training
        self.facts = {
            "gpu": self.gpu,
            "device": torch.cuda.get_device_name(engine.device) if self.gpu else "cpu",
            "world_size": engine.world_size,
            "threads": torch.get_num_threads(),
            "backbone": trainer.model.config.backbone,
            "trainable": config.model.trainable,
            "trained_parameters": sum(p.numel() for p in trainer.masters.parameters.values()),
            "prune_after": config.model.prune_after,
            "view_size": trainer.model.view_size,
            "global_batch": training.global_batch,
            "micro_batch": training.micro_batch,
            "accumulation": trainer.micro_steps,
            "compile": config.model.compile,
            "data": self.arguments.data,
            "operations": "counted by torch" if trainer.utilisation.operations.counted else "formula",
            "ceiling_product": f"{trainer.utilisation.product} per process",
        }

    def figures(self) -> dict[str, Any]:
        """Medians over the turns; ratios within each round."""
        ceiling = max(turn["ceiling"] for turns in self.turns.values() for turn in turns)
        made: dict[str, Any] = {**self.facts, "rounds": self.rounds, "steps": self.steps}
        made["ceiling_tflops"] = round(ceiling / TERA, 4)
        for arm, turns in self.turns.items():
            middle = {name: statistics.median(turn[name] for turn in turns) for name in turns[0]}
            made[arm] = round(middle["views_per_s"], 3)
            made[f"{arm}_of_ceiling"] = round(middle["operations_per_s"] / ceiling, 4)
            made[f"{arm}_detail"] = {
                "photos_per_s": round(middle["photos_per_s"], 3),
                "step_s": round(middle["step_s"], 4),
                "data_wait_s": round(middle["data_wait_s"], 4),
                "first_step_s": round(max(turn["first_step_s"] for turn in turns), 2),
                "peak_memory_gib": round(max(turn["memory_gib"] for turn in turns), 2),
            }
        made |= self._ratio("zero2_over_plain", "zero2", "plain", "views_per_s")
        made |= self._ratio("pruning_speedup", "zero2", "zero2_unpruned", "photos_per_s")
        made |= self._parts(ceiling)
        made["load_average"] = round(os.getloadavg()[0], 2)
        return {**made, "profile": self.top} if self.top else made

    def _parts(self, ceiling: float) -> dict[str, float | None]:
        """Figures of the parts of a step; None where they were not measured (no ZeRO-2 arm, nothing compiled)."""
        made: dict[str, float | None] = dict.fromkeys(
            ("forward_of_ceiling", "augment_ms", "augment_size", "augment_share")
        )
        if self.parts:
            middle = {name: statistics.median(part[name] for part in self.parts) for name in self.parts[0]}
            step_ms = 1e3 * statistics.median(turn["step_s"] for turn in self.turns["zero2"])
            made["forward_of_ceiling"] = round(middle["forward"] / ceiling, 4)
            made["augment_ms"], made["augment_size"] = round(middle["augment_ms"], 2), middle["augment_size"]
            made["augment_share"] = round(middle["augment_step_ms"] / step_ms, 4)
        beyond = [turn["first_step_s"] - turn["step_s"] for turns in self.turns.values() for turn in turns]
        made["compile_s"] = round(max(beyond), 2) if self.facts.get("compile") else None  # later turns find it done
        return made

    def _ratio(self, figure: str, one: str, other: str, name: str) -> dict[str, float | None]:
        """The median of the rounds' ratios, and the two between which their middle half lies."""
        pairs = zip(self.turns[one], self.turns[other], strict=False)
        ratios = [a[name] / b[name] for a, b in pairs]
        if not ratios:
            return {figure: None}
        low, middle, high = (round(float(q), 4) for q in np.quantile(ratios, [0.25, 0.5, 0.75]))
        return {figure: middle, f"{figure}_low": low, f"{figure}_high": high}


def replace_workers(config: Config, workers: int) -> Config:
    """The same options with another number of loader processes."""
    return replace(config, data=replace(config.data, workers=workers))


def kept(batches: Iterator[Batch], number: int) -> Iterator[Batch]:
    """The first `number` micro-batches again and again, without a wait."""
    return itertools.cycle([replace(next(batches), wait_s=0.0) for _ in range(number)])


def profile(trainer: Trainer, batches: Iterator[Batch], gpu: bool) -> list[dict[str, Any]]:
    """The fifteen operations with the most time of their own, in milliseconds per step and as a share."""
    from torch.profiler import ProfilerActivity

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with torch.profiler.profile(activities=activities) as recorded:
        for _ in range(PROFILED_STEPS):
            trainer.optimizer_step(0, batches)
    events = recorded.key_averages()
    spent = {e.key: (e.self_device_time_total if gpu else e.self_cpu_time_total, e.count) for e in events}
    total = sum(time_us for time_us, _ in spent.values())
    longest = sorted(spent, key=lambda key: -spent[key][0])[:15]
    return [
        {
            "name": key[:100],
            "ms": round(spent[key][0] / 1e3 / PROFILED_STEPS, 3),
            "share": round(spent[key][0] / total, 4),
            "calls": spent[key][1] // PROFILED_STEPS,
        }
        for key in longest
    ]


def take_down(trainer: Trainer) -> None:
    """Give the memory of a turn back before the next one builds its own."""
    accelerator = trainer.engine.accelerator
    if trainer.engine.sharded:
        trainer.wrapped.destroy()
    trainer.__dict__.clear()
    accelerator.free_memory()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def report(figures: dict[str, Any], brief: bool) -> None:
    """Lines for a person, then the JSON line."""
    if not brief:
        for name, value in figures.items():
            for line in value if isinstance(value, list) else [value]:
                sys.stdout.write(f"{name:24} {line}\n")
    sys.stdout.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
