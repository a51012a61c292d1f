"""The whole line on real photographs beside a plain timm classifier. `python -m benchmarks.photographs --csv FILE --out DIR`

Per seed: near-duplicates are grouped by perceptual hash and the groups split, `launch/pipeline.py` runs from `csv:FILE`
to predictions and report, and a plain classifier (the same net with the same ImageNet weights and input scale, whole
photo, all layers trained, AdamW with cosine, random resized crop, flip and colour jitter) learns on the same training
photos. It gets the validation photos as well, since it chooses nothing on them. It sees as many decoded photos as the
line's optimizer did in pre-training (`decoded`), unless the line's seconds of learning, pre-training and folds
(`seconds`), end it before (`plain_decoded` is then smaller). A finished seed is kept: a second call goes on. The last
line is one JSON object; `difference` is MCC(line) - MCC(plain) on the held-out photos at probability 0.5, the mean over
seeds. The seeds' test splits share photos, so its interval is a bootstrap over the groups of all seeds together.
"""

import argparse
import contextlib
import csv
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from benchmarks.fairness import pretrained_lite0
from benchmarks.paired import weighted_mcc
from benchmarks.results import provenance, save
from roadwork.data.images import decode_photo
from roadwork.data.index import ShardIndex
from roadwork.data.record import Rejected, parse_label
from roadwork.data.sources import CsvSource
from roadwork.evaluation import metrics
from roadwork.monitoring.runlog import read_last_per_step

ROOT = Path(__file__).resolve().parents[1]
SIDE = 224


def run_line(source: Path, folder: Path, seed: int, options: argparse.Namespace) -> None:
    """`launch/pipeline.py` from the CSV to the report; resumes by itself."""
    build = ["--view-size", options.view_size, "--max-views", options.max_views]
    build += ["--test-fraction", options.test_fraction, "--group-near-duplicates"]
    command = [sys.executable, "launch/pipeline.py", "--config", options.config, "--seed", str(seed)]
    command += ["--run.dir", str(folder), "--data.shards", str(folder / "shards")]
    command += ["--pipeline.source", f"csv:{source}", "--pipeline.build", json.dumps([str(word) for word in build])]
    subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)


def budget(folder: Path) -> tuple[int, float]:
    """(photos that the optimizer saw in pre-training, seconds of learning).

    Seconds: the optimizer steps of pre-training and the whole stage of the folds, where there is one.
    """
    steps, folds = read_last_per_step(folder / "metrics.jsonl"), folder / "stages" / "dora_folds.json"
    seconds = sum(float(step["step_s"]) for step in steps)
    if folds.is_file():
        seconds += float(json.loads(folds.read_text())["seconds"])
    return int(steps[-1]["samples_seen"]), seconds


def photos_of(source: Path) -> dict[str, tuple[Path, int]]:
    """{id: (path, label)} of the labelled rows, ids as the source names them."""
    found = {}
    for row in CsvSource(str(source)).table:
        with contextlib.suppress(Rejected):  # as the line does with such a row
            label = parse_label(row["label"])
            if label is not None:
                found[row["id"]] = (source.parent / row["path"], label)
    return found


class Plain:
    """A plain classifier on whole photos held in memory as uint8 [3, 256, 256]."""

    def __init__(self, paths: list[Path], labels: list[int], seed: int) -> None:
        torch.manual_seed(seed)
        self.decoded = 0
        self.net: nn.Module = nn.Sequential(pretrained_lite0(), nn.Dropout(0.2), nn.Linear(1280, 2))
        self.photos, self.labels = torch.stack([self.load(path) for path in paths]), torch.tensor(labels)
        self.augment = v2.Compose(
            [
                v2.RandomResizedCrop(SIDE, scale=(0.4, 1.0), antialias=True),
                v2.RandomHorizontalFlip(),
                v2.ColorJitter(0.3, 0.3, 0.2, 0.04),
            ]
        )

    @staticmethod
    def load(path: Path) -> Tensor:
        rgb, _ = decode_photo(path.read_bytes())
        pixels = torch.from_numpy(np.ascontiguousarray(rgb)).permute(2, 0, 1)
        square: Tensor = v2.functional.resize(pixels, [256, 256], antialias=True)
        return square

    def fit(self, decoded: int, seconds: float, batch: int = 16) -> "Plain":
        """Train on `decoded` photos; ends early where that takes more than `seconds`."""
        head = [p for n, p in self.net.named_parameters() if n.startswith("2.")]
        body = [p for n, p in self.net.named_parameters() if not n.startswith("2.")]
        groups = [{"params": body, "peak": 3e-4}, {"params": head, "peak": 3e-3}]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.05)
        began, seen, order = time.perf_counter(), 0, torch.randperm(len(self.labels))
        while (done := max((time.perf_counter() - began) / seconds, seen / decoded)) < 1:
            rows = order[[(seen + i) % len(order) for i in range(batch)]]
            seen += batch
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * min(1.0, done / 0.1) * 0.5 * (1 + np.cos(np.pi * done)) + 1e-7
            pixels = torch.stack([self.augment(photo) for photo in self.photos[rows]])
            self.net.train()
            loss = nn.functional.cross_entropy(self.net(pixels.float() / 255), self.labels[rows], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        self.decoded = seen
        return self

    @torch.inference_mode()
    def predict(self, paths: list[Path]) -> np.ndarray:
        """P(label 1) [n] of the whole photos."""
        self.net.eval()
        pixels = [v2.functional.resize(self.load(path), [SIDE, SIDE], antialias=True) for path in paths]
        out = [
            self.net(torch.stack(pixels[i : i + 16]).float() / 255).softmax(1)[:, 1] for i in range(0, len(pixels), 16)
        ]
        return torch.cat(out).double().numpy()


def measure(source: Path, folder: Path, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One seed: the line, the plain classifiers, and every held-out photo's answers."""
    run_line(source, folder, seed, options)
    decoded, seconds = budget(folder)
    rows = photos_of(source)
    splits = {name: ShardIndex.open(folder / "shards", name) for name in ("train", "val", "test")}
    ids = {name: [str(i) for i in index.id] for name, index in splits.items()}
    learn = [rows[i] for i in ids["train"] + ids["val"]]
    with (folder / "predictions.csv").open(newline="") as file:
        line = {row["id"]: float(row["probability"]) for row in csv.DictReader(file)}
    plain = Plain([path for path, _ in learn], [label for _, label in learn], seed).fit(decoded, seconds)
    answers = {
        "line": [line[i] for i in ids["test"]],
        "plain": plain.predict([rows[i][0] for i in ids["test"]]).tolist(),
    }
    labels = [rows[i][1] for i in ids["test"]]
    result = {"seed": seed, "train": len(learn), "test": len(labels), "decoded": decoded, "seconds": round(seconds, 1)}
    result["plain_decoded"] = plain.decoded
    result |= {
        f"{k}_mcc": round(metrics.metric_value(np.array(labels), np.array(v), "mcc"), 4) for k, v in answers.items()
    }
    return {**result, "labels": labels, "groups": [str(g) for g in splits["test"].group], **answers}


def difference(runs: list[dict[str, Any]], resamples: int = 2000) -> dict[str, float]:
    """Mean over seeds of MCC(line) - MCC(plain), with the 95 % interval of a bootstrap over groups.

    The seeds split the same photos, so their gains are not independent: groups are drawn once over the union of all test
    splits, and every seed's gain is taken with that draw.
    """
    names = sorted({name for run in runs for name in run["groups"]})
    place = {name: i for i, name in enumerate(names)}
    draws = np.random.default_rng(0).multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
    counts = np.vstack([np.ones(len(names)), draws])  # the first row is the photos as they are
    gains = []
    for run in runs:
        labels, weights = np.array(run["labels"]), counts[:, [place[name] for name in run["groups"]]]
        line, plain = (weighted_mcc(labels, np.array(run[side]), weights) for side in ("line", "plain"))
        gains.append(line - plain)
    value, *spread = np.mean(gains, axis=0)
    low, high = np.quantile(spread, [0.025, 0.975])
    return {"difference": round(float(value), 4), "low": round(float(low), 4), "high": round(float(high), 4)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, required=True, help="photos: header path,label")
    parser.add_argument("--out", type=Path, required=True, help="runs and results of the seeds")
    parser.add_argument("--config", default="launch/configs/photos.yaml")
    parser.add_argument("--splits", type=int, default=5, help="seeded splits")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--test-fraction", type=float, default=0.3)
    parser.add_argument("--view-size", type=int, default=224)
    parser.add_argument("--max-views", type=int, default=4)
    parser.add_argument("--json", action="store_true", help="print only the JSON line")
    parser.add_argument("--save", action="store_true", help="keep a dated result in benchmarks/results")
    options = parser.parse_args(argv)
    if not options.csv.is_file():
        parser.error(f"--csv {options.csv}: no such file; give a CSV with the header path,label")
    began, source, runs = provenance(), options.csv.resolve(), []
    for seed in range(options.first_seed, options.first_seed + options.splits):
        kept = options.out / f"seed-{seed}.json"
        if not kept.is_file():
            result = measure(source, (options.out / f"seed-{seed}").resolve(), seed, options)
            kept.write_text(json.dumps(result))
        runs.append(json.loads(kept.read_text()))
        if not options.json:
            print(json.dumps({k: v for k, v in runs[-1].items() if not isinstance(v, list)}), flush=True)
    labels = [label for _, label in photos_of(source).values()]
    found = summary(runs) | {"photos": len(labels), "positives": sum(labels)}
    if options.save:
        save("photographs", found, "python -m benchmarks.photographs --csv FILE --out DIR", began)
    print(json.dumps(found))
    return 0


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds, the paired difference, and each seed without its photos' answers."""
    scores = {key: round(float(np.mean([run[key] for run in runs])), 4) for key in ("line_mcc", "plain_mcc")}
    short = [{k: v for k, v in run.items() if not isinstance(v, list)} for run in runs]
    return {"benchmark": "photographs", "splits": len(runs), **scores, **difference(runs), "runs": short}


if __name__ == "__main__":
    sys.exit(main())
