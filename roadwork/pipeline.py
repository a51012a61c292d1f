"""All stages in order, each in processes of its own, each passed over where it is already done with the same options."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from roadwork.config import PIPELINE, Config, masks_folder, save, to_dict
from roadwork.data.index import MANIFEST
from roadwork.data.store import open_store
from roadwork.engine import ROOT
from roadwork.errors import UserError
from roadwork.monitoring.console import lines_may_be_lost
from roadwork.monitoring.relay import run_shown
from roadwork.run_folder import prepare_folder

DEPENDS = {
    "fairness": ("pipeline", "seed"),
    "shards": ("pipeline", "seed"),
    "pseudo_masks": ("data", "masks", "seed"),
    "shard_masks": ("data", "masks"),
    "find_lr": ("data", "model", "augment", "loss", "optimizer", "training", "lr_finder", "seed"),
    "pretrain": ("data", "model", "augment", "loss", "optimizer", "training", "seed"),
    "dora_folds": ("data", "augment", "folds", "seed"),
    "predict": ("data", "predict", "seed"),
    "evaluate": ("data", "predict", "seed"),
}
"""Sections of the configuration whose change makes a stage run again (and all that follow it)."""


def stages_of(config: Config) -> list[str]:
    """`config.pipeline.stages`, with shard_masks behind pseudo_masks: masks that no shard holds teach nobody."""
    wanted = {*config.pipeline.stages}
    if "pseudo_masks" in wanted:
        wanted.add("shard_masks")
    return sorted(wanted, key=PIPELINE.index)


def run_pipeline(config: Config) -> None:
    """Run every stage of `stages_of(config)`.

    A finished stage leaves `RUN/stages/NAME.json` with a digest of its options and of the stage before it; with the same
    digest it is not run again. An interrupted stage resumes by itself.

    Raises:
        UserError: a stage fails, or was stopped before its end; the line names it, and its exit status and log.
    """
    folder = prepare_folder(config)
    (folder / "stages").mkdir(exist_ok=True)
    options = folder / "stages" / "pipeline.yaml"
    save(config, options)
    before = ""
    for stage in stages_of(config):
        before = _digest(config, stage, before)
        if _done(config, stage, before):
            _say(f"{stage}: done before, kept")
            continue
        began = time.monotonic()
        status = _run(stage, _command(config, stage, options), config)
        if status == -signal.SIGTERM or not _ended(config, stage):
            raise UserError(f"stage {stage} was stopped before its end; start the same command again to go on")
        spent = time.monotonic() - began
        _marker(config, stage).write_text(json.dumps({"digest": before, "seconds": round(spent, 1)}))
        _say(f"{stage}: done in {spent:.0f} s")
    for line in _summary(config):
        _say(line)


def _digest(config: Config, stage: str, before: str) -> str:
    tree = to_dict(config)
    relevant = {name: tree[name] for name in DEPENDS[stage]}
    return hashlib.sha256(json.dumps([stage, relevant, before], sort_keys=True).encode()).hexdigest()


def _done(config: Config, stage: str, digest: str) -> bool:
    """Whether a stage ended with these options and what later stages read of it is still there."""
    try:
        marked = json.loads(_marker(config, stage).read_text())["digest"]
    except (OSError, ValueError, KeyError):
        return False
    return marked == digest and _made(config, stage)


def _ended(config: Config, stage: str) -> bool:
    """Whether a stage that exited with 0 did all its work. Ranks that a signal stopped saved, and exited with 0 as well."""
    if stage == "pretrain":
        from roadwork.training.checkpoint import reached_end

        return reached_end(Path(config.run.dir) / "checkpoints")
    return _made(config, stage)


def _marker(config: Config, stage: str) -> Path:
    return Path(config.run.dir) / "stages" / f"{stage}.json"


def _made(config: Config, stage: str) -> bool:
    """Whether what a finished stage leaves for the stages after it, or for the user, is there."""
    if stage in ("shards", "shard_masks"):
        return _built(config)
    return all(path.exists() for path in _products(config, stage))


def _products(config: Config, stage: str) -> list[Path]:
    run = Path(config.run.dir)
    return {
        "pseudo_masks": [masks_folder(config)],
        "find_lr": [run / "lr_finder.json"],
        "pretrain": [run / "best" / "model.safetensors", run / "metrics.jsonl"],
        "dora_folds": [run / "folds" / f"fold-{fold}" / "COMPLETE" for fold in range(config.folds.num_folds)],
        "predict": [run / "predictions.csv", run / "model"],
        "evaluate": [run / "report" / "index.html"],
    }.get(stage, [])


def _built(config: Config) -> bool:
    """Whether the shards are whole, in a folder or behind a URL."""
    return open_store(config.data.shards).size(MANIFEST) is not None


def _command(config: Config, stage: str, options: Path) -> list[str]:
    if stage == "shards":
        if not config.pipeline.source:
            if not _built(config):
                raise UserError(f"no shards in {config.data.shards}; give --pipeline.source, or --data.shards DIR")
            return []
        build = ["--source", config.pipeline.source, "--out", config.data.shards, "--seed", str(config.seed)]
        return [sys.executable, "-m", "shards.build", *build, *config.pipeline.build]
    if stage == "fairness":
        return _fairness(config)
    if stage == "shard_masks":
        update = [config.data.shards, "--masks", str(masks_folder(config))]
        return [sys.executable, "-m", "shards.masks", *update, *(["--keep-real"] if config.masks.keep_real else [])]
    script = [str(ROOT / "launch" / f"{stage}.py"), "--config", str(options)]
    if given := os.environ.get("ROADWORK_LAUNCHER"):  # a batch system's, which knows nodes and processes itself
        return [*shlex.split(given), *script]
    return [sys.executable, "-m", "accelerate.commands.launch", *_launch_options(config), *script]


def _fairness(config: Config) -> list[str]:
    """Measure the very photos that the embedded benchmark draws for this run; nothing for photos of another source."""
    name, _, photos = config.pipeline.source.partition(":")
    if name != "street":
        return []
    options = ["--first-seed", str(config.seed), "--out", str(Path(config.run.dir) / "fairness.json"), "--json"]
    return [sys.executable, "-m", "benchmarks.fairness", "--photos", photos or "1000", *options]


def _launch_options(config: Config) -> list[str]:
    gpus = _gpus(config)
    name = config.pipeline.accelerate_config or str(ROOT / "accelerate_configs" / ("gpu.yaml" if gpus else "cpu.yaml"))
    processes = config.pipeline.processes or _dividing(config, gpus)
    return ["--config_file", name, *(["--num_processes", str(processes)] if processes else [])]


def _dividing(config: Config, gpus: int) -> int:
    """The most GPUs over which an optimizer step divides; 0 without GPUs."""
    total, micro = config.training.global_batch, config.training.micro_batch
    return max((n for n in range(1, gpus + 1) if total % (n * micro) == 0), default=gpus)


_QUIET = {"OMP_NUM_THREADS": "1"}
"""What the launcher would set anyhow, with half a page of warnings; a stage sets its own number of threads."""


def _gpus(config: Config) -> int:
    import torch

    return torch.cuda.device_count() if config.engine.device != "cpu" else 0


def _run(stage: str, command: list[str], config: Config) -> int:
    """Run a stage. Its status: 0, or -SIGTERM where that stopped it; another is a UserError."""
    if not command:
        return 0
    _say(f"{stage}: {' '.join(command[1:])}")
    log = Path(config.run.dir) / "logs" / f"{stage}.log"
    environment = {**_QUIET, **os.environ, "PYTHONPATH": os.pathsep.join(_paths()), "PYTHONUNBUFFERED": "1"}
    if not _gpus(config) and not os.environ.get("ROADWORK_LAUNCHER"):
        environment.setdefault("DS_ACCELERATOR", "cpu")  # else the launcher itself warns that it found no GPU
    status = run_shown(command, log, ROOT, environment)
    if status not in (0, -signal.SIGTERM):
        raise UserError(f"stage {stage} ended with status {status}; its output is in {log}")
    return status


def _paths() -> Iterator[str]:
    yield str(ROOT)
    if os.environ.get("PYTHONPATH"):
        yield os.environ["PYTHONPATH"]


def _summary(config: Config) -> Iterator[str]:
    folder = Path(config.run.dir)
    places = {
        "report": folder / "report" / "index.html",
        "predictions": folder / "predictions.csv",
        "model": folder / "model",
        "TensorBoard": folder / "tensorboard",
    }
    yield ""
    for name, path in places.items():
        yield f"{name + ':':13} {path}{'' if path.exists() else ' (not made)'}"
    yield f"{'shards:':13} {config.data.shards}{'' if _built(config) else ' (not made)'}"
    scores = folder / "evaluation.json"
    if scores.is_file():
        yield f"{'scores:':13} {scores}"


def _say(line: str) -> None:
    with lines_may_be_lost():
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


def describe(config: Config) -> None:
    """Say which stages would run and which are done, without running any."""
    folder, before = Path(config.run.dir), ""
    for stage in stages_of(config):
        before = _digest(config, stage, before)
        state = "done" if _done(config, stage, before) else "to do"
        command = " ".join(_command(config, stage, folder / "stages" / "pipeline.yaml")[1:])
        _say(f"{stage}: {state}  {command}")
