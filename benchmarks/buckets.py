"""Gradient buckets and overlap of ZeRO-2: `python -m benchmarks.buckets [--json] [--processes 2] [--buckets 200000 ...]`.

The training step of `benchmarks.train_step` in one launch of several processes (all GPUs, else two on the CPU), on resident
batches, with the DeepSpeed file that this project ships and with other bucket sizes, each with and without `overlap_comm`.
The settings take turns in every round. A ratio is a setting's seconds per optimizer step over those of the shipped one in
the same round; the shipped one runs twice a round, and `noise` is the furthest that its second turn came from its first.
`shipped_within_noise` says whether the fastest setting's median ratio lies within that of 1.

All of these reduce the gradients of each micro-batch (`engine.hold_gradients false`); `held` is the ratio of what the
project does otherwise, one collective per optimizer step from a buffer of its own, to the shipped file's buckets.

On one process nothing is sent: the ratios then say what buckets cost without a wire. Options of the configuration
(`--a.b=VALUE`, such as `--model.backbone`) choose a model of another size.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import tell
from benchmarks.train_step import Bench
from benchmarks.train_step import command_line as step_options
from benchmarks.training_run import ROOT, shards_for
from roadwork.cli import exit_on_user_error
from roadwork.engine import CPU_CONFIG, GPU_CONFIG, launched_rank
from roadwork.errors import UserError

BUCKETS = {False: (200_000, 1_000_000), True: (20_000_000, 500_000_000)}
"""Elements of the buckets beside the shipped ones, without and with a GPU: parts of the demo's model, or of a large one."""
AGAIN, HELD = "shipped_again", "held"
EACH = "--engine.hold_gradients=false"


@exit_on_user_error
def main() -> None:
    """Measure and print; the last line is one JSON object."""
    arguments, more = command_line().parse_known_args()
    gpu = torch.cuda.is_available()
    if arguments.rank:
        run_rank(arguments, more, Path(arguments.rank), gpu)
        return
    processes = arguments.processes or (torch.cuda.device_count() if gpu else 2)
    with tempfile.TemporaryDirectory() as scratch:
        shards = shards_for(arguments.shards, 512 if gpu else 128, Path(scratch))
        tell(launch(Path(scratch), processes, gpu, [*sys.argv[1:], f"--shards={shards}"]), arguments.json)


def command_line() -> argparse.ArgumentParser:
    """The benchmark's own options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", default="", help="default: a few street photos, built for the run")
    parser.add_argument("--processes", type=int, default=0, help="default: the GPUs, else 2")
    parser.add_argument("--buckets", type=int, nargs="+", default=[], help="elements, beside the shipped ones")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=0, help="timed steps a turn; default 10 on a GPU, 3 on a CPU")
    parser.add_argument("--json", action="store_true", help="only the JSON line")
    parser.add_argument("--rank", metavar="SCRATCH", help=argparse.SUPPRESS)
    return parser


def launch(scratch: Path, processes: int, gpu: bool, words: list[str]) -> dict[str, Any]:
    """One launch of all ranks; what rank 0 wrote. UserError where the launch fails."""
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes),
        "--config_file", str(ROOT / "accelerate_configs" / ("gpu.yaml" if gpu else "cpu.yaml")),
        "--main_process_port", "0", "-m", "benchmarks.buckets", *words, "--rank", str(scratch),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=sys.stderr)
    if done.returncode:
        raise UserError(f"the launch of {processes} processes ended with status {done.returncode}; see its words above")
    found: dict[str, Any] = json.loads((scratch / "figures.json").read_text())
    return found


def run_rank(arguments: argparse.Namespace, more: list[str], scratch: Path, gpu: bool) -> None:
    """All turns on one rank; rank 0 writes figures.json."""
    shipped = GPU_CONFIG if gpu else CPU_CONFIG
    place = scratch / f"rank-{launched_rank()}"
    place.mkdir()
    first, grid = settings(shipped, arguments.buckets or BUCKETS[gpu])
    arms = {name: [f"--engine.ds_config={written(place, name, found)}", EACH] for name, found in grid.items()}
    arms |= {AGAIN: arms[first], HELD: [f"--engine.ds_config={shipped}"]}
    words = ["--data=resident", f"--rounds={arguments.rounds}", f"--steps={arguments.steps}"]
    bench = Bench(step_options().parse_args(words), more, arguments.shards, place, gpu, arms)
    order = list(arms)
    for turn in range(arguments.rounds):
        for arm in order if turn % 2 == 0 else reversed(order):
            bench.measure(arm)
    if launched_rank() == 0:
        seconds = {arm: [turn["step_s"] for turn in turns] for arm, turns in bench.turns.items()}
        facts = {**bench.facts, "rounds": arguments.rounds, "steps": bench.steps, "ds_config": shipped.name}
        (scratch / "figures.json").write_text(json.dumps({**facts, **compared(seconds, first)}))


def settings(file: Path, buckets: list[int] | tuple[int, ...]) -> tuple[str, dict[str, dict[str, Any]]]:
    """The name of what a DeepSpeed file says, and the file's content with each bucket size, with and without overlap."""
    shipped = json.loads(file.read_text())
    zero = shipped["zero_optimization"]
    grid = {
        named(size, overlap): {
            **shipped,
            "zero_optimization": {
                **zero, "overlap_comm": overlap, "reduce_bucket_size": size, "allgather_bucket_size": size,
            },
        }
        for size in sorted({zero["reduce_bucket_size"], *buckets})
        for overlap in (False, True)
    }  # fmt: skip
    return named(zero["reduce_bucket_size"], zero["overlap_comm"]), grid


def named(size: int, overlap: bool) -> str:
    """A setting's name in the figures."""
    return f"{size}_overlap" if overlap else str(size)


def written(folder: Path, name: str, content: dict[str, Any]) -> Path:
    """A DeepSpeed file of that content."""
    path = folder / f"zero2_{name}.json"
    path.write_text(json.dumps(content))
    return path


def compared(seconds: dict[str, list[float]], shipped: str) -> dict[str, Any]:
    """Ratios to the shipped setting within each round, and whether a setting beats it by more than noise.

    Args:
        seconds: per optimizer step, by setting, one for each round; AGAIN is the shipped setting's second turn, HELD the one
            without buckets.
        shipped: name of the shipped setting.
    """
    ratios = {
        arm: [one / base for one, base in zip(turns, seconds[shipped], strict=True)] for arm, turns in seconds.items()
    }
    noise = max(abs(ratio - 1) for ratio in ratios.pop(AGAIN))
    held = statistics.median(ratios.pop(HELD))
    middle = {arm: round(statistics.median(found), 4) for arm, found in ratios.items()}
    fastest = min(middle, key=lambda arm: middle[arm])
    return {
        "shipped": shipped,
        "shipped_step_s": round(statistics.median(seconds[shipped]), 4),
        "ratio": middle,
        "ratio_low": {arm: round(min(found), 4) for arm, found in ratios.items()},
        "ratio_high": {arm: round(max(found), 4) for arm, found in ratios.items()},
        "noise": round(noise, 4),
        "held": round(held, 4),
        "fastest": fastest,
        "shipped_within_noise": middle[fastest] >= 1 - noise,
    }


if __name__ == "__main__":
    main()
