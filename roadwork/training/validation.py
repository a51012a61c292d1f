"""Predictions of a split over all ranks, each photo once, and the metric that selects the model: MCC at the threshold
that gives the split its own share of positives (`prevalence_threshold`), not at 0.5.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray

from roadwork.config import Config
from roadwork.data.batch import Batch
from roadwork.data.index import ShardIndex
from roadwork.data.loader import EvalLoader
from roadwork.engine import Engine
from roadwork.evaluation.challenge import HALVES
from roadwork.evaluation.metrics import confusion, group_bootstrap, mcc
from roadwork.evaluation.standing import asked, halves
from roadwork.models.detector import RoadworkDetector
from roadwork.training.liveness import Stopped
from roadwork.training.unreadable import stop_on_faults

CHALLENGE_ROUNDS = 256
"""Questions of a validation that selects on the challenge."""


@dataclass
class Scores:
    """A split's predictions in the order of the index.

    Attributes:
        sample: [n] rows of the index.
        probability: [n] P(roadwork) about the threshold that gives the split's own share of positives.
        label: [n] 0 or 1.
        loss: mean cross entropy.
        mcc: of `probability` at threshold 0.5 (see `prevalence_threshold`).
        interval: 95 % by bootstrap over groups.
        skipped: unreadable photos.
        challenge: MCC of the photos as the challenge sends them, and the halves that were asked; None: not asked for.
    """

    sample: NDArray[np.int64]
    probability: NDArray[np.float64]
    label: NDArray[np.int64]
    loss: float
    mcc: float
    interval: tuple[float, float]
    skipped: list[tuple[str, str]]
    challenge: tuple[float, str] | None = None

    @property
    def selects(self) -> float:
        """What `best/` and early stopping go by."""
        return self.mcc if self.challenge is None else self.challenge[0]


@torch.no_grad()
def validate(
    engine: Engine,
    model: torch.nn.Module,
    index: ShardIndex,
    loader: EvalLoader,
    resamples: int = 200,
    interrupted: Callable[[], bool] = bool,
    image_only: bool = False,
) -> Scores | None:
    """Score a labelled split. Collective; every rank returns the same Scores.

    Each rank takes every world_size-th photo, so that none is doubled and none is padded in.

    Args:
        interrupted: asked before each batch; None is returned as soon as it says yes on any rank.
        image_only: without metadata, as the service asks.

    Raises:
        UserError: on every rank, where any rank's loader tells of a shard that cannot be read.
    """
    training = model.training
    model.eval()
    rows: list[tuple[int, float]] = []
    skipped: list[tuple[str, str]] = []
    batches = iter(loader)
    try:
        while True:
            batch = next(batches, None)
            faults = [] if batch is None else batch.faults
            told = [interrupted(), batch is not None, bool(faults)]
            state = torch.tensor(told, dtype=torch.int32, device=engine.device)
            stop, more, broken = engine.all_reduce(state, dist.ReduceOp.MAX).tolist()
            if stop:
                return None
            if not more:
                break
            if broken:
                stop_on_faults(engine, faults)
            if batch is not None:
                skipped += batch.skipped
                rows += _margins(engine, model, batch, image_only)
    finally:
        loader.close()
        model.train(training)
    rows = sorted(engine.gather_object(rows))
    return score(index, rows, engine.gather_object(skipped), resamples)


def _margins(engine: Engine, model: torch.nn.Module, batch: Batch, image_only: bool) -> list[tuple[int, float]]:
    """(row of the index, logit margin) of each readable photo."""
    there, view_mask = batch.weight > 0, batch.view_mask
    batch = batch.to(engine.device)
    metadata = None if image_only else batch.metadata
    outputs = model(batch.views, view_mask, metadata, batch.boxes, segmentation=False)
    margin = (outputs.logits[:, 1] - outputs.logits[:, 0]).float().cpu()
    return [(int(s), float(m)) for s, m, ok in zip(batch.sample.cpu(), margin, there, strict=True) if ok]


def prevalence_threshold(margin: NDArray[np.float64], label: NDArray[np.int64]) -> float:
    """The margin (log-odds) above which as many photos lie as are positive; 0 where the labels are of one class.

    margin float64 [N]; label int64 [N], 0 or 1.

    Focal loss, smoothing and the training draws' prior leave the margins anywhere but around 0 until prediction calibrates
    them, so models are compared at the threshold that gives the split's own share of positives.
    """
    positives = int(label.sum())
    if not 0 < positives < len(label):
        return 0.0
    ordered = np.sort(margin)[::-1]
    return float((ordered[positives - 1] + ordered[positives]) / 2)


def score(index: ShardIndex, rows: list[tuple[int, float]], skipped: list[tuple[str, str]], resamples: int) -> Scores:
    """Metrics from (row of the index, logit margin) pairs; unlabelled photos are left out."""
    sample = np.array([row for row, _ in rows], dtype=np.int64)
    margin = np.array([value for _, value in rows], dtype=np.float64)
    labelled = np.asarray(index.label)[sample] >= 0 if len(sample) else np.zeros(0, bool)
    sample, margin = sample[labelled], margin[labelled]
    label = np.asarray(index.label)[sample].astype(np.int64)
    probability = 1 / (1 + np.exp(-np.clip(margin - prevalence_threshold(margin, label), -60, 60)))
    if not len(label):
        return Scores(sample, probability, label, float("nan"), 0.0, (0.0, 0.0), skipped)
    loss = float(F.binary_cross_entropy_with_logits(torch.from_numpy(margin), torch.from_numpy(label).double()))
    groups = np.asarray(index.group)[sample]
    low, high = group_bootstrap(label, probability, groups, "mcc", resamples)
    return Scores(sample, probability, label, loss, float(mcc(confusion(label, probability))), (low, high), skipped)


def challenge_mcc(
    engine: Engine,
    model: RoadworkDetector,
    index: ShardIndex,
    config: Config,
    interrupted: Callable[[], bool] = bool,
) -> tuple[float, str] | None:
    """MCC of a split's labelled photos, and of predict.challenge_synthetic where it is given, as the challenge sends
    them: degraded, 224 px, pixels alone; and the halves that were asked ('real half only'). Collective.

    At the threshold that gives the questions' own share of positives, as `Scores.mcc`; the same questions each time.

    Args:
        interrupted: asked now and then; None is returned as soon as it says yes on any rank.
    """

    def go_on() -> None:
        vote = torch.tensor(interrupted(), dtype=torch.int32, device=engine.device)
        if engine.all_reduce(vote, dist.ReduceOp.MAX):
            raise Stopped

    sources, labels = halves(config, index, np.flatnonzero(np.asarray(index.label) >= 0))
    try:
        questions, answers = asked(model, engine, sources, labels, CHALLENGE_ROUNDS, config.seed, go_on)
    except Stopped:
        return None
    label = np.array([question.label for question in questions], dtype=np.int64)
    odds = np.clip(answers, 1e-9, 1 - 1e-9)
    margin = np.log(odds) - np.log1p(-odds)
    found = float(mcc(confusion(label, 1 / (1 + np.exp(prevalence_threshold(margin, label) - margin)))))
    return found, HALVES[len(sources) > 1]
