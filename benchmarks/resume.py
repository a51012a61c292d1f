"""What a checkpoint costs and how long a relaunch takes: `python -m benchmarks.resume [--json] [--processes 2]`.

Two launches of the demo's model through `accelerate launch`. The first trains and saves: `stall_s` is how long the loop
stands still for one checkpoint, `slowdown_s` what the steps lose while it is written behind their back, and `stall_share`
both over the time of `checkpoint.every_steps` steps. The second resumes: seconds from the process's start to the
imports, the built and loaded state, the first batch and the end of the first step. Everything is of the slowest rank.
"""

from __future__ import annotations

import time

STARTED = time.perf_counter()

import argparse  # noqa: E402  (the clock starts before the imports that it times)
import json  # noqa: E402
import os  # noqa: E402
import statistics  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402

from benchmarks.training_run import ROOT, options, shards_for  # noqa: E402
from roadwork.cli import exit_on_user_error  # noqa: E402
from roadwork.config import Config  # noqa: E402
from roadwork.engine import Engine  # noqa: E402
from roadwork.monitoring.console import quiet_libraries  # noqa: E402
from roadwork.training.checkpoint import complete_checkpoints  # noqa: E402
from roadwork.training.loop import Trainer  # noqa: E402
from roadwork.training.parts import build_data, build_model  # noqa: E402

IMPORTED = time.perf_counter()


@exit_on_user_error
def main() -> None:
    """Measure and print; the last line is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", default="", help="default: a few street photos, built for the run")
    parser.add_argument("--processes", type=int, default=0, help="default: the GPUs, else 2")
    parser.add_argument("--saves", type=int, default=3, help="checkpoints that are timed")
    parser.add_argument("--between", type=int, default=4, help="steps between them")
    parser.add_argument("--json", action="store_true", help="only the JSON line")
    parser.add_argument("--rank", nargs=2, metavar=("PHASE", "RUN"), help=argparse.SUPPRESS)
    arguments, more = parser.parse_known_args()
    gpu = torch.cuda.is_available()
    if arguments.rank:
        phase, run = arguments.rank
        config = options(
            Path(run), arguments.shards, gpu, "--model.weights=random", "--training.max_steps=1000000", *more
        )
        {"train": train, "resume": resume}[phase](config, arguments.saves, arguments.between)
        return
    processes = arguments.processes or (torch.cuda.device_count() if gpu else 2)
    with tempfile.TemporaryDirectory() as scratch:
        shards = shards_for(arguments.shards, 512 if gpu else 128, Path(scratch))
        words = [f"--shards={shards}", f"--saves={arguments.saves}", f"--between={arguments.between}", *more]
        figures: dict[str, Any] = {"gpu": gpu, "world_size": processes}
        for phase in ("train", "resume"):
            figures |= launch(phase, Path(scratch), processes, gpu, words)
    if not arguments.json:
        for name, value in figures.items():
            sys.stdout.write(f"{name:24} {value}\n")
    sys.stdout.write(json.dumps(figures) + "\n")


def launch(phase: str, scratch: Path, processes: int, gpu: bool, words: list[str]) -> dict[str, Any]:
    """One launch of all ranks; what rank 0 wrote."""
    run = scratch / "run"
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes),
        "--config_file", str(ROOT / "accelerate_configs" / ("gpu.yaml" if gpu else "cpu.yaml")),
        "--main_process_port", "0", "-m", "benchmarks.resume", "--rank", phase, str(run),
    ]  # fmt: skip
    began = time.perf_counter()
    subprocess.run([*command, *words], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    found = json.loads((scratch / f"{phase}.json").read_text())
    return {**found, f"{phase}_launch_s": round(time.perf_counter() - began, 2)}


def built(config: Config) -> tuple[Trainer, float]:
    """A trainer that has resumed where there was something, and the seconds that loading took."""
    spent = 0.0

    class Timed(Trainer):
        def _resume(self) -> Any:
            nonlocal spent
            began = time.perf_counter()
            counters = super()._resume()
            spent = time.perf_counter() - began
            return counters

    data = build_data(config)
    made = build_model(config, data.view_size)
    quiet_libraries(Path(config.run.dir) / "logs" / f"bench-{os.environ.get('RANK', '0')}.log")
    engine = Engine.start(config, "resume", trains=True)
    return Timed(config, engine, data, made), spent


def train(config: Config, saves: int, between: int) -> None:
    """Steps with a checkpoint now and then; writes train.json."""
    trainer, _ = built(config)
    loader = trainer.data.train_loader(trainer.engine, config, 0)
    batches = iter(loader)
    stalls: list[float] = []
    quiet: list[float] = []
    busy: list[float] = []
    for number in range((saves + 1) * between):
        writing, began = trainer.checkpoints.writing, time.perf_counter()
        trainer.optimizer_step(number, batches)
        trainer.counters.step = number + 1
        if number >= between:  # before that, everything warms up
            (busy if writing else quiet).append(time.perf_counter() - began)
        if number >= between - 1 and (number + 1) % between == 0:
            began = time.perf_counter()
            trainer._save()
            stalls.append(time.perf_counter() - began)
    trainer.checkpoints.wait()
    loader.close()
    newest = complete_checkpoints(trainer.checkpoints.folder)[-1:] if trainer.engine.is_main else []
    size = sum(file.stat().st_size for folder in newest for file in folder.iterdir())
    # Only rank 0 writes, and only its figures of the steps are used: the others wait for it in every one of them.
    step, every = statistics.median(quiet or busy), config.checkpoint.every_steps
    slowdown = max(0.0, sum(busy) - step * len(busy)) / len(stalls)
    (stall,) = slowest(trainer, [statistics.median(stalls)])
    write(
        trainer,
        "train",
        {
            "backbone": trainer.model.config.backbone,
            "checkpoint_bytes": size,
            "step_s": round(step, 4),
            "every_steps": every,
            "stall_s": round(stall, 4),
            "slowdown_s": round(slowdown, 4),
            "stall_share": round((stall + slowdown) / (every * step), 5),
        },
    )
    trainer.close()
    trainer.engine.close()


def resume(config: Config, saves: int, between: int) -> None:
    """From the process's start to the end of the first step; writes resume.json."""
    trainer, loading = built(config)
    ready = time.perf_counter()
    step = trainer.counters.step
    loader = trainer.data.train_loader(trainer.engine, config, step)
    batches = iter(loader)
    first = next(batches)
    fetched = time.perf_counter()

    def again() -> Any:
        yield first
        yield from batches

    trainer.optimizer_step(step, again())
    done = time.perf_counter()
    loader.close()
    names = ("import_s", "build_s", "load_s", "first_batch_s", "resume_s", "first_step_s")
    spans = [
        IMPORTED - STARTED,
        ready - IMPORTED - loading,
        loading,
        fetched - ready,
        fetched - STARTED,
        done - fetched,
    ]
    found = dict(zip(names, (round(value, 3) for value in slowest(trainer, spans)), strict=True))
    write(trainer, "resume", {"resumed_step": step, **found})
    trainer.close()
    trainer.engine.close()


def slowest(trainer: Trainer, seconds: list[float]) -> list[float]:
    """The largest of each over all ranks. Collective."""
    rows = trainer.engine.gather_object([seconds])
    return [max(column) for column in zip(*rows, strict=True)]


def write(trainer: Trainer, phase: str, figures: dict[str, Any]) -> None:
    """Leave figures for the parent. Rank 0."""
    if trainer.engine.is_main:
        (trainer.folder.parent / f"{phase}.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    raise SystemExit(main())
