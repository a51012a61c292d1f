"""What a run writes beside its weights: metrics, events, unreadable photos. A full disk costs lines, never the run."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
from torch import Tensor

from roadwork.config import Config
from roadwork.data.batch import Batch
from roadwork.data.index import ShardIndex
from roadwork.monitoring.board import Board
from roadwork.monitoring.runlog import RunLog
from roadwork.training.atomic import write_atomic
from roadwork.training.validation import Scores

log = logging.getLogger(__name__)
REOPEN_S = 60.0
"""Seconds between the tries to open a TensorBoard writer anew: each leaves a file, whether there is room or not."""


class Journal:
    """The log files and TensorBoard events of one run. Rank 0 writes; elsewhere every method does nothing.

    Lines that a full disk refuses are kept in memory and written when there is room again; events are lost until then.

    Args:
        config: the run's options.
        folder: the run folder.
        is_main: whether this process writes.
        step: optimizer steps done. Later events of a dead process disappear from the curves.
        subfolder: for a trial beside the run: its events go to `tensorboard/SUBFOLDER`, lines go nowhere.
    """

    def __init__(self, config: Config, folder: Path, is_main: bool, step: int, subfolder: str = "") -> None:
        self._config, self._folder, self._main = config, folder, is_main
        self._keeps = is_main and not subfolder
        self._events = folder / "tensorboard" / subfolder
        # What is written at step S comes before S's checkpoint; only what follows will be written again.
        continues = step > 0 or any(self._events.glob("events.*"))
        self._board = Board.open(config, self._events, is_main, (step + 1 if step else 0) if continues else None)
        self._reopen_at: float | None = None  # while the writer is lost
        self._logs: dict[str, RunLog] = {}
        self._waiting: dict[str, list[dict[str, Any]]] = {"metrics": [], "validation": [], "spikes": []}
        if self._keeps:
            self._logs = {name: RunLog(folder / f"{name}.jsonl") for name in self._waiting}

    def record(self, record: dict[str, Any]) -> None:
        """One optimizer step."""
        self._append("metrics", record)
        with self.board() as board:
            board.record(record)

    def validation(self, step: int, scores: Scores, distance: float | None) -> None:
        """One validation; `distance`: of the average from the weights, relative."""
        from roadwork.evaluation import plots

        low, high = scores.interval
        figures = {"val/mcc": scores.mcc, "val/loss": scores.loss, "val/mcc_low": low, "val/mcc_high": high}
        challenge: dict[str, Any] = {}
        if scores.challenge is not None:
            challenge = {"challenge_mcc": scores.challenge[0], "challenge": scores.challenge[1]}
            figures["val/challenge_mcc"] = scores.challenge[0]
        with self.board() as board:
            board.scalars(step, figures | ({} if distance is None else {"train/ema_distance": distance}))
            board.pr_curve("val/precision_recall", step, scores.label, scores.probability)
            board.figures(
                step,
                {
                    "val/confusion": plots.confusion_figure(scores.label, scores.probability),
                    "val/reliability": plots.reliability_figure(scores.label, scores.probability),
                },
            )
        line = {"step": step, "mcc": scores.mcc, "low": low, "high": high, "loss": scores.loss}
        self._append("validation", line | challenge)
        log.info("step %d: validation MCC %.3f (%.3f to %.3f)", step, scores.mcc, low, high)
        if scores.challenge is not None:
            log.info("step %d: challenge (%s): MCC %.3f", step, scores.challenge[1], scores.challenge[0])

    def experts(self, step: int, load: Tensor, kept_views: float) -> None:
        """Share of the tokens of each expert [layers, experts], and the mean number of views that pruning kept."""
        with self.board() as board:
            board.expert_load(step, load)
            board.scalars(step, {"train/kept_views": kept_views})

    def pictures(self, step: int, views: Tensor, batch: Batch, masks: Tensor | None, outputs: Any) -> None:
        """The first photo of a micro-batch as the model saw it, its masks, and the masks that were predicted.

        views [B, V, 3, S, S] in [0, 1]; masks [B, V, 6, s, s].
        """
        valid = batch.view_mask[0].cpu()
        first = views[0].float().cpu()
        with self.board() as board:
            board.images("augmented/views", step, first[valid])
            if masks is not None:
                board.images("augmented/masks", step, first[valid], masks[0].cpu()[valid])
            if outputs.seg_logits is not None:
                kept = outputs.kept[0].cpu()[outputs.view_mask[0].cpu()]
                guess = outputs.seg_logits[0].detach().float().cpu().sigmoid()[: len(kept)] > 0.5
                board.images("predicted/masks", step, first[kept], guess.float())

    def spike(self, record: dict[str, Any]) -> None:
        """One loss that stands out, with the photos of its step."""
        self._append("spikes", record)

    def draws(self, train: ShardIndex) -> None:
        """A map of where the order draws from, beside the target region."""
        if not self._main:
            return
        from roadwork.evaluation import plots

        weights = train.gps_weight if self._config.data.gps_weighted else np.ones(len(train))
        figure = plots.map_figure(train.latitude, train.longitude, weights, train.manifest.get("clusters") or ())
        if figure is not None:
            with self.board() as board:
                board.figures(0, {"data/map_of_draws": figure})

    def _append(self, name: str, record: dict[str, Any]) -> None:
        if name not in self._logs:
            return
        waiting = self._waiting[name]
        waiting.append(record)
        try:
            while waiting:
                self._logs[name].append(waiting[0])
                waiting.pop(0)
        except OSError as error:
            if len(waiting) == 1:
                log.error("%s; the lines are kept until there is room", error)

    @contextmanager
    def board(self) -> Iterator[Board]:
        """The TensorBoard writer. What it cannot write is lost with one error line, and so are events until it is opened
        anew, REOPEN_S later."""
        if self._reopen_at is not None and monotonic() >= self._reopen_at:
            self._reopen()
        try:
            yield self._board
        except OSError as error:
            log.error("TensorBoard events of %s are lost: %s", self._events, error)
            self._drop_board()

    def _drop_board(self) -> None:
        lost, self._board = self._board, Board(self._events, is_main=False)
        self._reopen_at = monotonic() + REOPEN_S
        try:
            lost.close()
        except OSError:
            return

    def _reopen(self) -> None:
        try:
            self._board = Board.open(self._config, self._events, self._main)
            self._reopen_at = None
        except OSError:
            self._reopen_at = monotonic() + REOPEN_S

    def unreadable(self, photos: list[list[str]]) -> None:
        """Replace `skipped.jsonl` by these (id, reason)."""
        if not self._keeps:
            return
        lines = [json.dumps({"id": name, "reason": reason}, ensure_ascii=False) + "\n" for name, reason in photos]
        try:
            write_atomic(self._folder / "skipped.jsonl", "".join(lines))
        except OSError as error:
            log.error("skipped.jsonl not written: %s", error)

    def close(self) -> None:
        """Close every file."""
        with self.board() as board:
            board.close()
        for kept in self._logs.values():
            kept.close()
