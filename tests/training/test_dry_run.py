"""What `--dry_run` promises, against the tensors of a run and the refusals that the run itself would meet."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from roadwork.config import Config
from roadwork.data.index import ShardIndex
from roadwork.engine import CPU_CONFIG, read_ds_config, zero_settings
from roadwork.errors import UserError
from roadwork.training import dry_run
from roadwork.training.dry_run import Pace, describe, held_bytes
from roadwork.training.parts import build_data
from tests.training.small_trainer import Make, make_trainer, options, sheets  # noqa: F401 - fixtures


@pytest.fixture(autouse=True)
def launched_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One process, no accelerate configuration; what choosing the CPU leaves in this process is taken back."""
    for name in ("RANK", "WORLD_SIZE", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_MIXED_PRECISION",
                 "ACCELERATE_DEEPSPEED_CONFIG_FILE"):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
    for name, value in (("CUDA_VISIBLE_DEVICES", ""), ("DS_ACCELERATOR", "cpu")):
        monkeypatch.setenv(name, value)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def on_cpu(run: Path, shards: Path, *more: str) -> Config:
    return options(run, shards, "--engine.device=cpu", "--engine.threads=1", *more)


def broken(folder: Path, kind: str) -> Path:
    """A DeepSpeed file that the trainer cannot use."""
    path = folder / "zero.json"
    if kind == "stage 3":
        path.write_text(json.dumps({**json.loads(CPU_CONFIG.read_text()), "zero_optimization": {"stage": 3}}))
    elif kind == "not JSON":
        path.write_text("{stage: 2}")
    return path


@pytest.mark.parametrize("named_by", ["the option", "the launcher"])
@pytest.mark.parametrize("kind", ["stage 3", "not JSON", "not there"])
def test_a_deepspeed_file_that_the_run_would_refuse_is_refused_with_the_same_line(
    kind: str, named_by: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, more = broken(tmp_path, kind), []
    if named_by == "the option":
        more = [f"--engine.ds_config={path}"]
    else:
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(path))
    with pytest.raises(UserError) as foreseen:
        describe(on_cpu(tmp_path / "run", shards, *more))
    with pytest.raises(UserError) as met:
        read_ds_config(path)
    assert str(foreseen.value) == str(met.value) and "\n" not in str(met.value)


def test_sophia_h_is_refused_under_zero_before_anything_starts(shards: Path, tmp_path: Path) -> None:
    config = on_cpu(tmp_path / "run", shards, "--optimizer.name=sophia_h")
    with pytest.raises(UserError, match="--engine.ds_config none .*or --optimizer.name sophia") as refused:
        describe(config)
    assert "\n" not in str(refused.value) and not dist.is_initialized()
    assert zero_settings(config, True, trains=False) is not None, "prediction after such a training is no training"
    config.engine.ds_config = "none"
    assert zero_settings(config, True) is None


@pytest.mark.parametrize(
    ("engine", "name"), [("", "adamw"), ("ds_configs/zero2_fp32_cpu.json", "sophia"), ("none", "sophia_h")]
)
def test_a_micro_batch_of_the_widest_photos_is_timed_and_nothing_is_started_or_written(
    engine: str, name: str, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    describe(on_cpu(run, shards, f"--engine.ds_config={engine}", f"--optimizer.name={name}"))
    told = capsys.readouterr().out
    most = int(ShardIndex.open(str(shards), "train").num_views.max())
    assert re.search(r"expected time: \d+:\d\d:\d\d .* measured on this machine \(CPU, one process alone\)", told)
    assert f": 2 photos with {most} views, " in told and "parameters: " in told and "disk: " in told
    assert ("no ZeRO" if engine == "none" else "ZeRO stage 2 in " + ("fp32" if engine else "bf16")) in told
    assert not dist.is_initialized() and not run.exists()


def test_the_time_of_a_run_counts_every_micro_batch_validation_and_curvature(shards: Path, tmp_path: Path) -> None:
    config = options(
        tmp_path,
        shards,
        "--training.max_steps=25",
        "--training.validate_every_steps=10",
        "--optimizer.hessian_every=10",
    )
    pace = Pace(training_s=100.0, forward_s=1.0, curvature_s=10_000.0, views=4, peak_gib=0.0)
    # 25 steps of two micro-batches; validations after 10, 20 and 25 of ten photos in five batches; curvature at 0, 10, 20.
    assert pace.run_s(config, build_data(config), 1) == 25 * 2 * 100 + 3 * 5 + 3 * 10_000
    # 2 processes: one micro-batch a step, and half of the photos.
    assert pace.run_s(config, build_data(config), 2) == 25 * 100 + 3 * 2.5 + 3 * 10_000


def test_a_disk_that_is_too_small_is_refused(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("roadwork.training.dry_run.shutil.disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"has 0\.0 GiB free, .* GiB are needed; give another --run\.dir"):
        describe(on_cpu(tmp_path / "run", shards))


def test_a_large_model_is_not_timed_on_a_cpu_and_the_line_says_why(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dry_run, "MOST_ON_CPU", 1000)
    describe(on_cpu(tmp_path / "run", shards))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("expected time")]
    assert "not measured" in line and "on a CPU take too long" in line


@pytest.mark.parametrize("name", ["adamw", "sophia", "sophia_h"])
def test_the_memory_of_a_plain_run_is_that_of_its_tensors(trainer: Make, name: str) -> None:
    """ZeRO's is compared on two real processes in tests/distributed/test_pretrain.py."""
    made = trainer(f"--optimizer.name={name}", "--model.trainable=last-1")
    made.optimizer_step(0, iter(made.data.train_loader(made.engine, made.config, 0)))
    masters, average = made.masters, made.average
    assert average is not None
    trained = sum(p.numel() for p in masters.parameters.values())
    frozen = sum(p.numel() for p in made.model.parameters()) - trained
    held = held_bytes(made.config, None, trained, frozen, 1, on_cpu=True)
    constants = sum(t.nbytes for t in made.constants.values())
    state = sum(t.nbytes for s in masters.states() for k, t in s.items() if k != "step")
    stateless = sum(p.nbytes for p, s in zip(masters.flats(), masters.states(), strict=True) if not s)
    assert frozen > 0 and stateless < 0.01 * held["weights"]
    assert held["weights"] == pytest.approx(sum(p.nbytes for p in made.model.parameters()) + constants, rel=0.01)
    assert held["optimizer"] == pytest.approx(state, rel=0.01)
    assert held["average"] == sum(t.nbytes for t in average.flats)
    assert held["buckets"] == 0


def test_gradients_that_wait_and_stage_ones_are_whole_and_a_gpu_allocates_the_bucket(
    shards: Path, tmp_path: Path
) -> None:
    config, holding = options(tmp_path, shards, "--engine.hold_gradients=false"), options(tmp_path, shards)
    settings = json.loads(CPU_CONFIG.read_text())
    settings["zero_optimization"]["reduce_bucket_size"] = 1000
    two = held_bytes(config, settings, 100, 0, 2, on_cpu=False)
    assert two["gradients"] == 4 * 100 / 2 and two["buckets"] == 2 * 1000 + 4 * 100
    held = held_bytes(holding, settings, 100, 0, 2, on_cpu=False)
    assert held["gradients"] == 4 * 100 / 2 + 4 * 100 and held["buckets"] == 0
    assert held_bytes(holding, settings, 100, 0, 2, on_cpu=True)["gradients"] == 4 * 100
    assert held_bytes(holding, settings, 100, 0, 1, on_cpu=False)["gradients"] == 4 * 100
    settings["zero_optimization"]["stage"] = 1
    assert held_bytes(config, settings, 100, 0, 2, on_cpu=True)["gradients"] == 4 * 100 / 2 + 4 * 100
