"""What each component is worth on the embedded street benchmark: `python -m benchmarks.ablation [--quick] [--json]`

Each seed draws a benchmark of its own. On it the real commands train one network with everything and one network without
each component, and answer the test photos from pixels alone, with the averaged weights, calibrated on validation groups.
Differences are paired: the same seed, the same test photos. Intervals are over seeds and over videos; where an interval
holds 0, its metric showed nothing. The verdict is that of MCC, which decides about defaults. The whole takes a night on
2 cores, `--quick` much less. A run that was interrupted goes on where it was: each (run, seed) leaves a file in
OUT/answers. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.ablation_variants import BASE, CLAIMS, ENSEMBLE, FOLDS, NETWORK, TTA, VARIANTS, Claim, Side
from benchmarks.paired import Trial, paired_difference
from roadwork.config import Config
from roadwork.data.index import ShardIndex
from roadwork.evaluation.metrics import area_under_roc, metric_value
from roadwork.inference.ensemble import HeldOut
from roadwork.inference.parts import read_parts, write_atomic
from roadwork.inference.plan import prior_of_draws

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Size:
    """How large an ablation is; what its answers depend on besides the code."""

    photos: int
    """Photos per seed, both splits; three in ten are test photos."""
    view_size: int
    epochs: float
    max_steps: int
    """Optimizer steps; 0: from epochs."""
    folds: int
    augmentations: int
    options: tuple[str, ...] = ()
    """Further options of every stage."""


FULL = Size(photos=1200, view_size=128, epochs=6, max_steps=0, folds=3, augmentations=8)
QUICK = Size(photos=480, view_size=128, epochs=3, max_steps=0, folds=2, augmentations=4)
SEEDS = {"full": 5, "quick": 5}
FIRST_SEED = 100
"""Far from the demo's: what is chosen here must not have been chosen on the demo's test photos."""
DEMO = ROOT / "launch" / "configs" / "demo.yaml"


class Ablation:
    """The commands of one ablation and the files that they leave."""

    def __init__(self, out: Path, size: Size, keep: bool = False) -> None:
        self.out, self.size, self.keep = out, size, keep
        (out / "logs").mkdir(parents=True, exist_ok=True)

    def answers(self, variant: str, seed: int) -> dict[str, Any]:
        """The test photos' answers of one training run, made now or kept from before.

        SystemExit where the kept ones were made otherwise.
        """
        path = self.out / "answers" / f"{variant}-seed-{seed}.json"
        made: dict[str, Any] = {"variant": variant, "seed": seed, **made_with(variant, self.size)}
        if path.is_file():
            stored: dict[str, Any] = json.loads(path.read_text())
            for name, value in made.items():
                if stored.get(name) != json.loads(json.dumps(value)):
                    raise SystemExit(f"{path} was made with another {name}: {stored.get(name)}; give another --out")
            return stored
        shards = self.shards(seed)
        run = self.out / "runs" / f"{variant}-seed-{seed}"
        say(f"seed {seed}: {variant}")
        self.train(variant, seed, run, shards)
        made |= read_answers(run, shards, variant == BASE)
        write_atomic(path, json.dumps(made))
        if not self.keep:
            shutil.rmtree(run)
        return made

    def shards(self, seed: int) -> Path:
        """A benchmark of its own for each seed, with the demo's target region."""
        folder = self.out / f"shards-{seed}"
        if not (folder / "manifest.json").is_file():
            say(f"seed {seed}: drawing {self.size.photos} photos")
            words = ["--source", f"street:{self.size.photos}", "--out", str(folder), "--seed", str(seed)]
            words += ["--view-size", str(self.size.view_size), "--target-cities", "pittsburgh,greensburg"]
            self._run(f"shards-{seed}", ["-m", "shards.build", *words, "--class-balance", "keep"])
        return folder

    def train(self, variant: str, seed: int, run: Path, shards: Path) -> None:
        """Pre-train, fine-tune folds where they are asked for, and predict the test split."""
        size = self.size
        common = [f"--run.dir={run}", f"--data.shards={shards}", f"--seed={seed}", "--monitoring.console=false"]
        common += [f"--training.epochs={size.epochs}", f"--training.max_steps={size.max_steps}"]
        common += ["--training.image_every_steps=0", f"--folds.num_folds={size.folds}"]
        common += [*size.options, *VARIANTS[variant]]
        several = variant == BASE
        switch = "on" if several else "off"
        predict = [f"--predict.tta={switch}", f"--predict.ensemble={switch}", "--predict.split=test"]
        predict += [f"--predict.num_augmentations={size.augmentations}", "--predict.image_only=true"]
        name = run.name
        self._launch(f"{name}-pretrain", "pretrain", common)
        if several:
            self._launch(f"{name}-folds", "dora_folds", common)
        self._launch(f"{name}-predict", "predict", [*common, *predict])

    def _launch(self, log: str, stage: str, words: list[str]) -> None:
        with socket.socket() as probe:  # a port of its own: another run on this machine must not be joined
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        launcher = ["-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/cpu.yaml"]
        script = [f"launch/{stage}.py", "--config", str(DEMO)]
        self._run(log, [*launcher, "--main_process_port", port, *script, *words])

    def _run(self, log: str, words: list[str]) -> None:
        path = self.out / "logs" / f"{log}.log"
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        with path.open("ab") as kept:
            done = subprocess.run(
                [sys.executable, *words], cwd=ROOT, env=environment, stdout=kept, stderr=subprocess.STDOUT
            )
        if done.returncode:
            raise SystemExit(f"{' '.join(words)} ended with status {done.returncode}; its output is in {path}")


def made_with(variant: str, size: Size) -> dict[str, Any]:
    """What a training run's answers depend on besides the code and the seed."""
    return {"size": asdict(size), "options": VARIANTS[variant], "demo": demo_options()}


def demo_options() -> dict[str, Any]:
    """The demo's options, which every variant starts from; photos are drawn and cut by an ablation's own size."""
    return {name: value for name, value in yaml.safe_load(DEMO.read_text()).items() if name != "pipeline"}


def read_answers(run: Path, shards: Path, several: bool) -> dict[str, Any]:
    """Test photos and, per way to answer, a list of probabilities [N] of its networks."""
    test = ShardIndex.open(shards, "test")
    ids = [str(name) for name in test.id]
    systems = {}
    if several:
        systems[NETWORK] = [_column(run / "predictions_tta.csv", "pretrained", ids)]
        systems[TTA] = [_column(run / "predictions_tta.csv", "pretrained_tta", ids)]
        members, singles = _members(run, shards, ids)
        systems[FOLDS] = singles
        weights = json.loads((run / "predict_details.json").read_text())["member_weights"]
        ensemble = _column(run / "predictions_tta.csv", "ensemble", ids)
        # Held-out groups may give one member all the weight: then the ensemble is that member.
        systems[ENSEMBLE] = [ensemble or members[int(np.argmax(weights))]]
    else:
        systems[NETWORK] = [_column(run / "predictions.csv", "probability", ids)]
    labels = [int(label) for label in test.label]
    return {"id": ids, "label": labels, "group": [str(group) for group in test.group], "systems": systems}


def _column(path: Path, name: str, ids: list[str]) -> list[float]:
    """A system's probabilities in the order of the ids; empty where the file does not have it."""
    from roadwork.evaluation.report import read_probabilities

    found = read_probabilities(path, name)
    return [found[photo] for photo in ids] if found else []


def _members(run: Path, shards: Path, ids: list[str]) -> tuple[list[list[float]], list[list[float]]]:
    """Probabilities of every member by itself, and of the folds, each calibrated as the chosen system is."""
    config = Config()
    train, val = ShardIndex.open(shards, "train"), ShardIndex.open(shards, "val")
    details = json.loads((run / "predict_details.json").read_text())
    names, number = details["members"], len(details["augmentations"])
    asked, known = (
        _log_odds(run, f"{split}-{number}", order)
        for split, order in (("test", ids), ("val", [str(name) for name in val.id]))
    )
    truth = HeldOut(np.asarray(val.label), np.asarray(val.group), 0.5, prior_of_draws(train, config), 0, 0)
    answers = [
        truth.fit(known[:, column]).calibration.probability(asked[:, column]).tolist() for column in range(len(names))
    ]
    return answers, [answer for name, answer in zip(names, answers, strict=True) if name.startswith("fold-")]


def _log_odds(run: Path, name: str, ids: list[str]) -> np.ndarray:
    """float64 [N, M]: every member's log-odds of the photos as they are."""
    records = read_parts(run / "predict" / name, name)
    return np.array([records[photo]["log_odds"][0] for photo in ids], dtype=np.float64)


def row(claim: Claim, found: dict[str, list[dict[str, Any]]], resamples: int) -> dict[str, Any]:
    """One claim's differences over all seeds; `found`: answers per training run, one per seed.

    SystemExit where two runs of a seed saw different test photos.
    """
    trials: list[Trial] = []
    means: dict[str, list[float]] = {"with": [], "without": []}
    for one, other in zip(found[claim.with_it.variant], found[claim.without.variant], strict=True):
        if one["id"] != other["id"]:
            raise SystemExit(f"{claim.name}: the two runs of seed {one['seed']} saw different test photos")
        label, group = np.asarray(one["label"]), np.asarray(one["group"])
        sides = [_side(one, claim.with_it), _side(other, claim.without)]
        for name, side in zip(means, sides, strict=True):
            means[name].append(float(np.mean([metric_value(label, answer) for answer in side])))
        trials.append(Trial(label, group, *sides))
    difference = paired_difference(trials, "mcc", resamples)
    auc = paired_difference(trials, "auc", resamples)
    rounded = {key: round(float(value), 4) for key, value in difference._asdict().items()}
    return {
        "name": claim.name, "what": claim.what, "claimed": claim.claimed, **rounded, "seeds": len(trials),
        "verdict": difference.verdict, "mcc_with": round(float(np.mean(means["with"])), 4),
        "mcc_without": round(float(np.mean(means["without"])), 4),
        **{f"auc_{key}": round(float(value), 4) for key, value in auc._asdict().items()},
    }  # fmt: skip


def _side(answers: dict[str, Any], side: Side) -> np.ndarray:
    return np.asarray(answers["systems"][side.system], dtype=np.float64)


def summary(found: dict[str, list[dict[str, Any]]], size: Size, resamples: int) -> dict[str, Any]:
    """The JSON line: rows for every claim whose runs are there."""
    base = found[BASE]
    labels = [np.asarray(one["label"]) for one in base]
    networks = [np.asarray(one["systems"][NETWORK][0]) for one in base]
    return {
        "benchmark": "ablation",
        "size": asdict(size),
        "demo": demo_options(),
        "test_photos": sum(len(label) for label in labels),
        "test_groups": sum(len(set(one["group"])) for one in base),
        "resamples": resamples,
        "mcc": round(float(np.mean([metric_value(y, p) for y, p in zip(labels, networks, strict=True)])), 4),
        "auc": round(float(np.mean([area_under_roc(y, p) or 0.0 for y, p in zip(labels, networks, strict=True)])), 4),
        "rows": [row(c, found, resamples) for c in CLAIMS if {c.with_it.variant, c.without.variant} <= set(found)],
    }


def trials(variants: list[str], seeds: range) -> Iterator[tuple[str, int]]:
    """Seed by seed, so that an interrupted night leaves whole seeds."""
    for seed in seeds:
        for variant in variants:
            yield variant, seed


def say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quick", action="store_true", help="fewer photos, epochs and folds")
    p.add_argument("--out", type=Path, help="shards, runs and answers (default: runs/ablation or runs/ablation-quick)")
    p.add_argument("--variants", help=f"comma-separated training runs beside {BASE} (default: all)")
    p.add_argument("--seeds", type=int, help="number of seeds")
    p.add_argument("--photos", type=int, help="photos per seed")
    p.add_argument("--epochs", type=float, help="passes over the training draws")
    p.add_argument("--max-steps", type=int, help="optimizer steps in place of epochs")
    p.add_argument("--option", action="append", default=[], metavar="--a.b=VALUE", help="of every stage; repeatable")
    p.add_argument("--resamples", type=int, default=1000, help="of the bootstrap")
    p.add_argument("--keep", action="store_true", help="keep the run folders")
    p.add_argument("--json", action="store_true", help="print only the JSON line")
    return p


def main(argv: list[str] | None = None) -> int:
    """Run what is missing, then compare. SystemExit for variants that are unknown."""
    options = parser().parse_args(argv)
    form = "quick" if options.quick else "full"
    given = {name: value for name in ("photos", "epochs", "max_steps") if (value := getattr(options, name)) is not None}
    size = replace(QUICK if options.quick else FULL, options=tuple(options.option), **given)
    out = options.out or ROOT / "runs" / ("ablation-quick" if options.quick else "ablation")
    wanted = options.variants.split(",") if options.variants else [name for name in VARIANTS if name != BASE]
    if unknown := set(wanted) - set(VARIANTS):
        raise SystemExit(f"unknown variants {', '.join(sorted(unknown))}; there are: {', '.join(VARIANTS)}")
    ablation = Ablation(out.resolve(), size, options.keep)
    seeds = range(FIRST_SEED, FIRST_SEED + (options.seeds or SEEDS[form]))
    found: dict[str, list[dict[str, Any]]] = {}
    for variant, seed in trials([BASE, *wanted], seeds):
        found.setdefault(variant, []).append(ablation.answers(variant, seed))
    result = summary(found, size, options.resamples)
    if not options.json:
        for line in result["rows"]:
            interval = f"[{line['low']:+.3f}, {line['high']:+.3f}]"
            print(f"{line['name']:14} {line['value']:+.3f} {interval:18} {line['verdict']:10} {line['what']}")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
