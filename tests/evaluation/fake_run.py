"""Small real shards and a run folder with what the stages would leave, so that the report reads real files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from roadwork.config import Config, to_dict
from roadwork.data.index import ShardIndex, write_index
from roadwork.data.scan import scan_shard
from roadwork.data.shards import shard_name, write_shard
from roadwork.monitoring.runlog import RunLog
from tests.data.sheets import sample

MANIFEST = {
    "target": {"kind": "cities", "names": ["Ghent"], "points": 4},
    "clusters": [[40.1, -70.1], [48.0, 2.0]],
    "coverage": {"within_50_km": 0.72, "within_100_km": 0.9, "mean_km": 80.0, "effective_sample_size": 31.5},
    "coverage_unweighted": {"within_50_km": 0.3, "within_100_km": None, "mean_km": 400.0},
    "coverage_targets": {"within_50_km": 0.7, "within_100_km": 0.85, "mean_km": 150.0},
    "class_prior": {"photos": 0.8, "draws": 0.75},
    "leak_audit": {
        "leaks": ["description (missing)"],
        "fields": {"gps": {"missing_share": 0.2, "value": {"auc": 0.61}, "missing": None}},
    },
    "splits": {"test": {"photos": 40, "groups": 10, "positive": 20, "negative": 20, "unlabelled": 0, "prior": 0.5}},
}


def build_shards(folder: Path, test: int = 40, train: int = 60) -> Path:
    """Test photos alternate labels by group; in train the weather tells a little about the label."""
    folder.mkdir(parents=True)
    scanned = []
    for first, split, count in ((0, "train", train), (1000, "test", test)):
        path = folder / shard_name(split, 0)
        write_shard(path, (_sample(first + i) for i in range(count)))
        scanned.append(scan_shard(path))
    write_index(folder, scanned, MANIFEST)
    (folder / "rejected.jsonl").write_text('{"id": "a", "reason": "truncated_image: 3 bytes", "split": "train"}\n')
    return folder


def _sample(i: int) -> Any:
    label = i // 4 % 2
    weather = label if i % 3 else 3
    return sample(i, label=label, masks=label == 1 and i % 4 == 1, weather=weather, id=f"photo-{i}")


def probabilities(index: ShardIndex, skill: float = 1.2, seed: int = 0) -> dict[str, float]:
    """Answers that are right more often than not."""
    rng = np.random.default_rng(seed)
    odds = skill * (2 * np.asarray(index.label).astype(float) - 1) + rng.normal(size=len(index))
    return {str(i): float(p) for i, p in zip(index.id, 1 / (1 + np.exp(-odds)), strict=True)}


def write_predictions(path: Path, values: dict[str, float]) -> None:
    lines = ["id,probability,prediction"] + [f"{i},{p!r},{int(p > 0.5)}" for i, p in values.items()]
    path.write_text("\n".join(lines) + "\n")


def _calibrated(mcc: float, temperature: float) -> dict[str, Any]:
    """What prediction says of one system: before and after its calibration."""
    scores = {"mcc": mcc, "mcc_interval": [mcc - 0.1, mcc + 0.1], "ece": 0.05, "log_loss": 0.4}
    before = scores | {"mcc": mcc - 0.25, "ece": 0.33, "log_loss": 0.9}
    return {"temperature": temperature, "bias": -0.3, "before": before, "after": scores}


def build_run(folder: Path, shards: Path) -> Path:
    """A run folder as pre-training, folds and prediction leave it (without evaluation.json)."""
    folder.mkdir(parents=True)
    config = Config()
    config.data.shards = str(shards)
    (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    with RunLog(folder / "metrics.jsonl") as log:
        for step in range(1, 31):
            loss = 1 / step
            log.append({"step": step, "loss": loss, "focal": loss / 2, "lr": 1e-3, "images_per_s": 9.0, "epoch": 0.1,
                        "samples_seen": 8 * step, "grad_norm": 1.0, "data_wait_s": 0.0,
                        "skipped_samples": 2.0 * (step == 7), "nonfinite_steps": int(step in (8, 9))})  # fmt: skip
    with RunLog(folder / "spikes.jsonl") as log:
        for step in range(20, 27):
            log.append({"step": step, "loss": 9.5, "usual": 0.25, "photos": [f"spiky-{step}-{k}" for k in range(10)]})
    with RunLog(folder / "validation.jsonl") as log:
        log.append({"step": 15, "mcc": 0.4, "low": 0.2, "high": 0.6})
        log.append({"step": 30, "mcc": 0.5, "low": 0.3, "high": 0.7})
    (folder / "checkpoints" / "step-00000030").mkdir(parents=True)
    (folder / "checkpoints" / "step-00000030" / "COMPLETE").touch()
    (folder / "checkpoints" / "step-00000031").mkdir()
    (folder / "folds" / "fold-0").mkdir(parents=True)
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps({"weights_origin": "random"}))
    (folder / "skipped.jsonl").write_text('{"id": "<b>broken</b>", "reason": "truncated"}\n')
    details = {
        "chosen": "ensemble",
        "held_out": {"split": "val", "photos": 48, "groups": 12, "prior_of_use": 0.5},
        "systems": {"ensemble": _calibrated(0.61, 1.5), "pretrained": _calibrated(0.52, 0.9)},
        "calibration": {"temperature": 1.5, "bias": -0.3},
        "tta": {"used": False, "mode": "auto", "difference": 0.001, "low": -0.02, "high": 0.03},
        "ensemble": {"used": True, "mode": "auto", "difference": 0.05, "low": 0.01, "high": 0.09},
    }
    (folder / "predict_details.json").write_text(json.dumps(details))
    write_predictions(folder / "predictions.csv", probabilities(ShardIndex.open(shards, "test")))
    return folder
