"""TensorBoard on rank 0, laid out so that the first screen answers: is it learning, is it fast, is it healthy?"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from roadwork.losses import TERMS
from roadwork.monitoring.pictures import grid, overlay, to_uint8
from roadwork.monitoring.trackers import Tracker, open_trackers

_NO_SCALARS = frozenset({"step", "epoch", "position", "samples_seen", "time"})
_PERFORMANCE = frozenset(
    {
        "images_per_s", "step_s", "data_wait_s", "slowest_rank", "slowest_over_median", "memory_gib", "mfu",
    }
)  # fmt: skip

ROW = 4
"""Charts that a window of 1800 px shows side by side; 1300 px are then high enough for a row of each question."""

LAYOUT: dict[str, dict[str, list[Any]]] = {
    "1. Is it learning?": {
        "loss": ["Multiline", ["train/loss"]],
        "learning rate": ["Multiline", ["train/lr"]],
        "norm of the gradient": ["Multiline", ["train/grad_norm"]],
        "MCC on held-out groups, own threshold": ["Margin", ["val/mcc", "val/mcc_low", "val/mcc_high"]],
    },
    "2. Is it fast?": {
        "images per second": ["Multiline", ["perf/images_per_s"]],
        "seconds: step, data wait, checkpoint stall": [
            "Multiline",
            ["perf/step_s", "perf/data_wait_s", "perf/checkpoint_stall_s"],
        ],
        "share of the ceiling (MFU)": ["Multiline", ["perf/mfu"]],
        "slowest rank over the median": ["Multiline", ["perf/slowest_over_median"]],
    },
    "3. Is it healthy?": {
        "skipped photos and steps": ["Multiline", ["train/skipped_samples", "train/nonfinite_steps"]],
        "norm of the weights": ["Multiline", ["train/weight_norm"]],
        "entropy of the experts (1: even load)": ["Multiline", [r"experts/entropy_layer\d+"]],
        "memory, GiB": ["Multiline", ["perf/memory_gib"]],
    },
    "4. Details": {
        **{f"term of the loss: {term}": ["Multiline", [f"train/{term}"]] for term in TERMS if term != "loss"},
        "cross entropy on held-out groups": ["Multiline", ["val/loss"]],
        "MCC as the challenge sends the photos": ["Multiline", ["val/challenge_mcc"]],
        "kept views": ["Multiline", ["train/kept_views"]],
        "distance of the average (EMA)": ["Multiline", ["train/ema_distance"]],
        "share of the busiest expert": ["Multiline", [r"experts/max_layer\d+"]],
        "which rank is the slowest": ["Multiline", ["perf/slowest_rank"]],
    },
}
"""Custom scalars: category -> chart -> [kind, tags]; a question has at most ROW charts, so that all three fit a screen.

TensorBoard gives a run ONE colour: tags of one chart differ by their markers only, so each term of the loss has its own.
It puts charts with a margin behind the others of their category.
"""

_OWN_SHARE = "at the threshold that gives the scored photos their own share of positives, not at 0.5"
ABOUT = {
    "val/mcc": f"MCC of the validation photos {_OWN_SHARE}: until prediction calibrates them, raw answers lie anywhere.",
    "val/mcc_low": "Lower end of the 95 % interval of val/mcc, by bootstrap over groups.",
    "val/mcc_high": "Upper end of the 95 % interval of val/mcc, by bootstrap over groups.",
    "val/challenge_mcc": f"MCC of the validation photos as the challenge sends them, {_OWN_SHARE}.",
    "val/loss": "Mean cross entropy of the raw answers to the validation photos; no term of the training loss.",
}
"""What some curves are; TensorBoard shows it under Text, since its fast reader drops the descriptions of scalars."""

FINAL = ("val_mcc", "val_challenge_mcc", "mcc", "ece", "mcc_image_only", "mcc_image_only_224")
"""Columns of HPARAMS: best MCC on validation groups, of their photos or as the challenge sends them (what chose best/),
then what the evaluation found on the scored split.
"""


def tagged(record: Mapping[str, Any]) -> dict[str, float]:
    """Scalars of one line of metrics.jsonl under their tags: `loss` -> `train/loss`, `data_wait_s` ->
    `perf/data_wait_s`.

    Names that already hold a '/' are kept; counters of the position in the run, text and None are left out.
    """
    tags = {}
    for name, value in record.items():
        if name in _NO_SCALARS or isinstance(value, str | bool | list | dict) or value is None:
            continue
        tags[name if "/" in name else f"{'perf' if name in _PERFORMANCE else 'train'}/{name}"] = float(value)
    return tags


def flat_options(config: Any, prefix: str = "") -> dict[str, bool | int | float | str]:
    """A tree of dataclasses or dicts as `training.learning_rate: 0.0003`; lists become text."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        config = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    flat: dict[str, bool | int | float | str] = {}
    for name, value in config.items():
        if isinstance(value, Mapping) or dataclasses.is_dataclass(value):
            flat.update(flat_options(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat


class Board:
    """Writes events under `directory` where `is_main`; on other ranks every method does nothing.

    purge_step: the first optimizer step that this process will write again (its start step) when it continues a run.
    What a dead process wrote at and after that step disappears from the curves, so none overlap: at once for readers
    that heed the mark (TensorBoard's own in Python), and for its data server a tag at a time, when it is written again.
    None for a new run.
    trackers: extra receivers of scalars, see `roadwork.monitoring.trackers`. layout: write LAYOUT, and ABOUT where a run
    begins; false for a run without curves, since TensorBoard adds the layouts of all runs up.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        is_main: bool = True,
        purge_step: int | None = None,
        trackers: Iterable[Tracker] = (),
        layout: bool = True,
    ) -> None:
        self.directory = Path(directory)
        self.writer: Any = None
        self.trackers = list(trackers) if is_main else []
        if is_main:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(directory), purge_step=purge_step, flush_secs=10)
            if layout:
                self.writer.add_custom_scalars(LAYOUT)
            if layout and not purge_step:
                self.text("about", "\n".join(f"- `{tag}`: {what}" for tag, what in ABOUT.items()))

    @classmethod
    def open(
        cls, config: Any, directory: str | os.PathLike[str], is_main: bool, purge_step: int | None = None
    ) -> Board:
        """With the trackers of `config.monitoring.trackers` (a roadwork.config.Config); TensorBoard is always
        written.
        """
        names = config.monitoring.trackers if is_main else []
        return cls(directory, is_main, purge_step, open_trackers(names, directory, flat_options(config)))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Values under their full tags; those that are not finite are drawn as gaps (NaN)."""
        if self.writer is None:
            return
        for tag, value in values.items():
            self.writer.add_scalar(tag, float(value), step)
        for tracker in self.trackers:
            tracker.scalars(step, values)

    def record(self, record: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl (it holds `step`) under the tags of `tagged`."""
        self.scalars(int(record["step"]), tagged(record))

    def images(self, tag: str, step: int, views: Any, masks: Any = None, columns: int = 4, limit: int = 12) -> None:
        """Views [N, 3, S, S] (uint8, or float in [0, 1]) as one grid; with masks [N, 6, s, s] laid over them."""
        if self.writer is None:
            return
        shown = to_uint8(views[:limit])
        if masks is not None:
            shown = overlay(shown, masks[:limit])
        self.writer.add_image(tag, grid(shown, columns), step)

    def figures(self, step: int, figures: Mapping[str, Any]) -> None:
        """Matplotlib figures by tag, for example `val/confusion` and `val/reliability` of
        `roadwork.evaluation.plots`.
        """
        if self.writer is None:
            return
        for tag, figure in figures.items():
            figure.set_dpi(100)
            canvas = _canvas(figure)
            canvas.draw()
            pixels = np.asarray(canvas.buffer_rgba())[..., :3]
            self.writer.add_image(tag, pixels, step, dataformats="HWC")

    def pr_curve(self, tag: str, step: int, labels: Any, probabilities: Any) -> None:
        """Precision against recall, with TensorBoard's threshold slider. labels [N] in {0, 1}, probabilities [N]."""
        if self.writer is not None and len(labels):
            self.writer.add_pr_curve(tag, np.asarray(labels), np.asarray(probabilities, dtype=np.float64), step)

    def expert_load(self, step: int, load: Any) -> None:
        """Load [L, E] (share of tokens per expert): a histogram over the experts and the entropy (1: even) per
        layer.
        """
        if self.writer is None:
            return
        table = np.asarray(load.detach().float().cpu() if hasattr(load, "detach") else load, dtype=np.float64)
        for layer, row in enumerate(table / np.maximum(table.sum(axis=1, keepdims=True), 1e-12)):
            experts = np.arange(len(row))
            self.writer.add_histogram_raw(
                f"experts/load_layer{layer}", min=-0.5, max=len(row) - 0.5, num=1.0, sum=float((row * experts).sum()),
                sum_squares=float((row * experts**2).sum()), bucket_limits=(experts + 0.5).tolist(),
                bucket_counts=row.tolist(), global_step=step,
            )  # fmt: skip
            entropy = -float((row[row > 0] * np.log(row[row > 0])).sum()) / math.log(max(2, len(row)))
            self.scalars(
                step, {f"experts/entropy_layer{layer}": entropy, f"experts/max_layer{layer}": float(row.max())}
            )

    def hparams(self, options: Any, metrics: Mapping[str, float | None], trial: str) -> None:
        """Options (a tree) with final metrics, so that TensorBoard's HPARAMS tab compares runs.

        metrics: some of FINAL. trial: the run's name; what several stages write under one name is one row there.
        Written into the run's own events, not into a run of its own.
        """
        if unknown := metrics.keys() - set(FINAL):
            raise ValueError(f"{min(unknown)} is no column of HPARAMS; add it to FINAL")
        if self.writer is None:
            return
        from tensorboard.plugins.hparams import summary_v2

        final = {f"final/{name}": float(value) for name, value in metrics.items() if value is not None}
        flat = flat_options(options)
        # TensorBoard reads the columns from one run, whichever it finds first: so every run names them all.
        columns = [summary_v2.Metric(f"final/{name}") for name in FINAL]
        listed = [summary_v2.HParam(name) for name in flat]
        for summary in (
            summary_v2.hparams_config_pb(listed, columns),
            summary_v2.hparams_pb(flat, trial_id=os.path.normpath(trial)),
        ):
            self.writer.file_writer.add_summary(summary)
        for tag, value in final.items():
            self.writer.add_scalar(tag, value)

    def text(self, tag: str, text: str, step: int = 0) -> None:
        """Markdown."""
        if self.writer is not None:
            self.writer.add_text(tag, text, step)

    def flush(self) -> None:
        """Events on disk. Call it before a checkpoint becomes complete: then no curve has a hole after a kill."""
        if self.writer is not None:
            self.writer.flush()

    def close(self) -> None:
        """Flushes and ends; further calls do nothing."""
        if self.writer is not None:
            self.writer.close()
            self.writer = None
        for tracker in self.trackers:
            tracker.close()
        self.trackers = []


def _canvas(figure: Any) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    return FigureCanvasAgg(figure)
