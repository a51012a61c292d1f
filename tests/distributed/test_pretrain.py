"""Pre-training through `accelerate launch`: two real processes, ZeRO-2, gloo."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from roadwork.command_line import parse
from roadwork.engine import CPU_CONFIG, GRACE_S, read_ds_config
from roadwork.monitoring.board import LAYOUT
from roadwork.monitoring.runlog import read_last_per_step
from roadwork.training.dry_run import held_bytes
from tests.conftest import Launch
from tests.launching import TINY

PRETRAIN = "launch/pretrain.py"


def losses(run: Path) -> list[float]:
    """The logged loss of every step."""
    return [line["loss"] for line in read_last_per_step(run / "metrics.jsonl")]


def check_curves(folder: Path) -> None:
    """TensorBoard's own reader finds every curve, once per step, the pictures, and nothing that no chart shows."""
    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    reader.Reload()
    written = set(reader.Tags()["scalars"])
    wanted = {
        f"train/{name}" for name in ("loss", "focal", "consistency", "weather", "segmentation", "lr", "grad_norm")
    }
    wanted |= {"perf/images_per_s", "perf/data_wait_s", "perf/mfu", "perf/memory_gib", "train/weight_norm", "val/mcc"}
    assert wanted <= written
    charted = [tag for charts in LAYOUT.values() for _, tags in charts.values() for tag in tags]
    empty = [tag for tag in charted if not any(re.fullmatch(tag, name) for name in written)]
    assert empty == ["val/challenge_mcc"], f"charts without a curve: {empty}"
    hidden = {name for name in written if not any(re.fullmatch(tag, name) for tag in charted)}
    assert hidden == {"final/val_mcc"}, "curves that no chart shows (HPARAMS shows this one)"
    assert [event.step for event in reader.Scalars("train/loss")] == list(range(1, 9)), "curves overlap after a resume"
    pictures = {"augmented/views", "augmented/masks", "predicted/masks", "val/confusion", "val/reliability"}
    assert pictures | {"data/map_of_draws"} <= set(reader.Tags()["images"])
    assert any(tag.startswith("experts/load") for tag in reader.Tags()["histograms"])
    assert {
        "val/precision_recall", "about/text_summary", "_hparams_/experiment", "_hparams_/session_start_info",
    } <= set(reader.summary_metadata)  # fmt: skip


def check_console(said: list[str], run: Path) -> None:
    """A person sees the last and the best MCC, a truthful end, and where everything is; and nobody else talks."""
    last = len(said) - 5
    assert all(line.startswith(("pretrain ", "model: ")) for line in said[:last]), "others talk on the console"
    mcc = r"-?\d[\d.e-]*"
    assert any(
        re.match(rf"pretrain 8/8 .* images/s +loss .*  MCC {mcc}  best MCC {mcc} .* left", line) for line in said
    )
    assert [line for line in said if " done in " in line] == [said[last - 1]]
    assert said[last] == "pretrain finished at step 8 of 8"
    best, checkpoint, curves, following = said[last + 1 :]
    told = r"MCC -?\d\.\d{3} on the validation photos, at step \d"
    assert re.fullmatch(rf"best weights: {run / 'best'} \({told}\)", best)
    assert (
        checkpoint == f"checkpoint:   {run / 'checkpoints' / 'step-00000008'}" and Path(checkpoint.split()[1]).is_dir()
    )
    assert curves == f"curves:       tensorboard --logdir {run / 'tensorboard'}"
    assert following == f"next:         accelerate launch launch/dora_folds.py --run.dir {run}"


def test_two_ranks_train_one_model_on_different_photos_with_the_optimizer_partitioned(
    launch: Launch, shards: Path, tmp_path: Path
) -> None:
    done = launch("tests/distributed/inspect_run.py", str(tmp_path / "seen"), *TINY, f"--run.dir={tmp_path / 'run'}",
                  f"--data.shards={shards}", "--training.max_steps=4")  # fmt: skip
    assert done.status == 0, done.output[-3000:]
    ranks = [json.loads((tmp_path / f"seen-{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0]["weights"] == ranks[1]["weights"], "the ranks hold different weights after training"
    assert ranks[0]["stage"] == 2 and ranks[0]["dtype"] == "torch.bfloat16"
    assert all(rank["validated"] == {"average": True, "weights": False} for rank in ranks)
    assert all(rank["gathered"] for rank in ranks), "what is gathered are not the masters of the weights"
    waits = {"gradients.py _global_norm": 1, "totals.py total": 1}
    assert all(rank["waits"] == waits for rank in ranks), "the host waits to know whether to step, and to log"
    limit = parse("pretrain", TINY).config.engine.timeout_s
    assert all(rank["timeouts"] == [limit + GRACE_S] for rank in ranks), "DeepSpeed's groups would wait for 30 minutes"
    for step in range(4):
        first, second = ranks[0]["positions"][step], ranks[1]["positions"][step]
        assert not set(first) & set(second)
        assert sorted(first + second) == list(range(step * 8, step * 8 + 8))
    owned = [rank["owned"] for rank in ranks]
    assert sum(owned) >= ranks[0]["parameters"]
    assert all(0.45 < part / ranks[0]["parameters"] < 0.55 for part in owned), "the optimizer state is not partitioned"
    config, settings = parse("pretrain", TINY).config, read_ds_config(CPU_CONFIG)
    foreseen = held_bytes(config, settings, ranks[0]["parameters"], 0, processes=2, on_cpu=True)
    for rank in ranks:  # what --dry_run says; partitions are padded
        assert rank["held"] == pytest.approx({part: foreseen[part] for part in rank["held"]}, rel=0.02)


def test_a_relaunch_continues_bit_for_bit(launch: Launch, shards: Path, tmp_path: Path) -> None:
    common = [*TINY, f"--data.shards={shards}", "--checkpoint.every_steps=3", "--training.validate_every_steps=4",
              "--training.image_every_steps=2"]  # fmt: skip
    # Without the variable the launcher itself, before anything of ours runs, says that it found no GPU.
    whole = launch(PRETRAIN, *common, f"--run.dir={tmp_path / 'whole'}", "--training.max_steps=8",
                   "--monitoring.console=true", DS_ACCELERATOR="cpu")  # fmt: skip
    assert whole.status == 0, whole.output[-3000:]
    check_console(whole.output.splitlines(), tmp_path / "whole")
    # Killed in step 5 by rank 1 itself: the checkpoint of step 3 is the newest.
    torn = launch("tests/distributed/kill_at.py", "5", "1", *common, f"--run.dir={tmp_path / 'torn'}",
                  "--training.max_steps=8")  # fmt: skip
    assert torn.status != 0
    again = launch(PRETRAIN, *common, f"--run.dir={tmp_path / 'torn'}", "--training.max_steps=8")
    assert again.status == 0, again.output[-3000:]
    assert losses(tmp_path / "torn") == losses(tmp_path / "whole")
    check_curves(tmp_path / "torn" / "tensorboard")
    masters = load_file(tmp_path / "torn" / "checkpoints" / "step-00000008" / "master.safetensors")
    norm = sum(float(t.double().square().sum()) for t in masters.values()) ** 0.5
    last = read_last_per_step(tmp_path / "torn" / "metrics.jsonl")[-1]
    assert last["weight_norm"] == pytest.approx(norm, rel=1e-6), "the norm is of all ranks' shards together"
    assert last["mfu"] > 0 and last["memory_gib"] > 0.05
    for file in ("master", "exp_avg", "exp_avg_sq", "average"):
        one, other = (
            load_file(tmp_path / run / "checkpoints" / "step-00000008" / f"{file}.safetensors")
            for run in ("torn", "whole")
        )
        assert all(torch.equal(one[name], other[name]) for name in one), file


def test_the_bare_command_runs_zero2_bf16(launch: Launch, shards: Path, tmp_path: Path) -> None:
    """No accelerate configuration: one process, and the engine builds ZeRO-2 itself."""
    import subprocess
    import sys

    from tests.launching import ROOT, environment

    command = [sys.executable, "-m", "accelerate.commands.launch", "tests/distributed/inspect_run.py",
               str(tmp_path / "seen"), *TINY, f"--run.dir={tmp_path / 'run'}", f"--data.shards={shards}",
               "--training.max_steps=1"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads((tmp_path / "seen-0.json").read_text())
    assert seen["stage"] == 2 and seen["dtype"] == "torch.bfloat16" and seen["world_size"] == 1


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--training.micro_batch=3", "micro_batch 3"),
        ("--data.shards=/nowhere", "/nowhere"),
        ("--model.backbone=resnet_of_dreams", "resnet_of_dreams"),
    ],
)
def test_a_users_mistake_ends_every_rank_with_one_line(
    launch: Launch, shards: Path, tmp_path: Path, option: str, words: str
) -> None:
    done = launch(PRETRAIN, *TINY, f"--run.dir={tmp_path}", f"--data.shards={shards}", "--training.max_steps=1", option)
    lines = [line for line in done.output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and words in lines[0], done.output[-2000:]
    statuses = re.findall(r"exitcode\s*: (-?\d+)", done.output)
    assert "2" in statuses and done.output.count("Traceback (most recent call last)") == 1, "only the launcher's own"


def test_a_missing_shard_is_seen_before_training_by_the_first_rank(
    launch: Launch, shards: Path, tmp_path: Path
) -> None:
    """The others need not look: they end with it."""
    damaged, run = tmp_path / "damaged", tmp_path / "run"
    shutil.copytree(shards, damaged)
    lost = sorted(damaged.glob("train-*.tar"))[-1]
    lost.unlink()
    done = launch(PRETRAIN, *TINY, f"--run.dir={run}", f"--data.shards={damaged}", "--training.max_steps=1")
    lines = [line for line in done.output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and f"{lost.name} is missing" in lines[0], done.output[-2000:]
    assert done.output.count("Traceback (most recent call last)") == 1 and not (run / "checkpoints").exists()


def test_the_logged_loss_is_the_same_on_one_and_two_processes(launch: Launch, shards: Path, tmp_path: Path) -> None:
    """Same photos per step; in fp32 without dropout only the order of summation differs."""
    found = []
    for processes in (1, 2):
        run = tmp_path / str(processes)
        done = launch(PRETRAIN, *TINY, f"--run.dir={run}", f"--data.shards={shards}", "--training.max_steps=3",
                      "--engine.ds_config=ds_configs/zero2_fp32_cpu.json", "--model.dropout=0", "--loss.balance=0",
                      "--model.metadata_dropout=0", processes=processes)  # fmt: skip
        assert done.status == 0, done.output[-3000:]
        found.append(losses(run))
    assert found[0] == pytest.approx(found[1], rel=1e-5)
