"""Figures for TensorBoard and the report. Each returns a matplotlib Figure; none touches pyplot's global state."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from roadwork.evaluation import metrics

BLUE, ORANGE, GREY, GREEN = "#1f6fb4", "#e07b00", "#8a8a8a", "#2b8a3e"
CLASSES = ("no roadwork", "roadwork")
MAPPED = 50_000
"""Photos of one kind on a map: a picture shows no more, and rank 0 draws it before a run's first step."""


def _figure(width: float = 5.2, height: float = 3.8) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def png(figure: Figure, dpi: int = 110) -> bytes:
    """The figure as PNG bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def confusion_figure(labels: Any, probabilities: Any, threshold: float = 0.5) -> Figure:
    """Confusion table with counts and shares of each row; holds with one class or no photo."""
    table = metrics.confusion(labels, probabilities, threshold)
    shares = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    figure, axes = _figure(3.8, 3.4)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row in range(2):
        for column in range(2):
            dark = shares[row, column] > 0.5
            text = f"{table[row, column]}\n{shares[row, column]:.1%}"
            axes.text(column, row, text, ha="center", va="center", color="white" if dark else "black")
    axes.set_xticks([0, 1], CLASSES)
    axes.set_yticks([0, 1], CLASSES, rotation=90, va="center")
    axes.set_xlabel("answer")
    axes.set_ylabel("truth")
    axes.set_title(f"MCC {metrics.mcc(table):.3f}, n = {table.sum()}", fontsize=10)
    return figure


def reliability_figure(
    labels: Any, probabilities: Any, before: Any = None, weights: Any = None, bins: int = 10
) -> Figure:
    """Share of roadwork against its probability, after and (optionally) before calibration, with their ECE.

    labels [N], probabilities [N], before [N] or None; weights [N] reweight to the prior of use.
    """
    figure, axes = _figure(4.4, 4.0)
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle=":")
    rows = [("before", before, GREY), ("probability" if before is None else "after", probabilities, BLUE)]
    for name, values, colour in rows:
        if values is None or not len(labels):
            continue
        table = metrics.reliability_bins(labels, values, bins, weights)
        filled = table.weight > 0
        error = metrics.expected_calibration_error(labels, values, weights=weights)
        sizes = 15 + 150 * table.weight[filled] / table.weight.sum()
        axes.plot(table.confidence[filled], table.positives[filled], color=colour, label=f"{name}: ECE {error:.3f}")
        axes.scatter(table.confidence[filled], table.positives[filled], s=sizes, color=colour, alpha=0.6)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="probability of roadwork", ylabel="share of roadwork")
    if axes.get_legend_handles_labels()[1]:
        axes.legend(loc="upper left", fontsize=8)
    return figure


def precision_recall_figure(labels: Any, probabilities: Any) -> Figure:
    """Precision against recall; says so where a class is missing."""
    figure, axes = _figure(4.4, 3.6)
    axes.set(xlim=(0, 1.02), ylim=(0, 1.02), xlabel="recall", ylabel="precision")
    if len(np.unique(np.asarray(labels))) < 2:
        axes.text(0.5, 0.5, "one class only", ha="center")
        return figure
    from sklearn.metrics import average_precision_score, precision_recall_curve

    precision, recall, _ = precision_recall_curve(labels, probabilities)
    axes.step(recall, precision, where="post", color=BLUE)
    axes.set_title(f"average precision {average_precision_score(labels, probabilities):.3f}", fontsize=10)
    return figure


def curves_figure(records: Sequence[Mapping[str, Any]], names: Sequence[str], ylabel: str) -> Figure | None:
    """Lines of metrics.jsonl over the steps, smoothed where there are many; None where no name has a value."""
    figure, axes = _figure(6.4, 3.2)
    for name in names:
        points = [(r["step"], r[name]) for r in records if isinstance(r.get(name), int | float)]
        if not points:
            continue
        steps, values = np.asarray(points, dtype=np.float64).T
        width = max(1, len(values) // 100)
        if width > 1:
            axes.plot(steps, values, linewidth=0.4, alpha=0.35, color=GREY)
            kernel = np.ones(width)
            values = np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")
        axes.plot(steps, values, linewidth=1.4, label=name, marker="o" if len(values) == 1 else None)
    if not axes.get_legend_handles_labels()[1]:
        return None
    axes.set(xlabel="optimizer step", ylabel=ylabel)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.25)
    return figure


def intervals_figure(rows: Sequence[tuple[str, float, Sequence[float] | None]], xlabel: str = "MCC") -> Figure:
    """Systems one under the other: value and interval. rows: (name, value, [low, high] or None), best on top."""
    figure, axes = _figure(6.0, 0.8 + 0.38 * max(1, len(rows)))
    for y, (_, value, interval) in enumerate(rows):
        if interval is not None:
            axes.plot(interval, [y, y], color=BLUE, linewidth=2)
        axes.plot([value], [y], "o", color=BLUE)
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows], parse_math=False)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(xlabel)
    axes.grid(axis="x", alpha=0.25)
    return figure


def map_figure(
    latitude: Any, longitude: Any, weight: Any, centres: Any = (), held_out: tuple[Any, Any] | None = None
) -> Figure | None:
    """Training photos by their draws, held-out photos and the target region's centres, in degrees; None without places.

    latitude, longitude, weight [N] and held_out's latitude and longitude [M] (nan: unknown); centres [K, 2] latitude and
    longitude. Of many photos every so many-th is drawn, at most MAPPED of either kind.
    """
    latitude, longitude, weight = (_thinned(values) for values in (latitude, longitude, weight))
    known = np.isfinite(latitude) & np.isfinite(longitude)
    if not known.any():
        return None
    where = np.round(np.stack([latitude[known], longitude[known]], axis=1), 2)
    places, cell = np.unique(where, axis=0, return_inverse=True)
    draws = np.bincount(cell.reshape(-1), weights=weight[known])
    figure, axes = _figure(6.4, 4.2)
    sizes = 6 + 160 * draws / draws.max()
    axes.scatter(places[:, 1], places[:, 0], s=sizes, color=BLUE, alpha=0.45, label="training draws", linewidths=0)
    if held_out is not None:
        north, east = (_thinned(values) for values in held_out)
        axes.scatter(east, north, s=10, marker="+", color=GREEN, label="scored photos", linewidths=0.7)
    centres = np.asarray(centres, dtype=np.float64).reshape(-1, 2)
    if len(centres):
        axes.scatter(centres[:, 1], centres[:, 0], s=110, marker="x", color=ORANGE, label="target region", linewidths=2)
    axes.set(xlabel="longitude", ylabel="latitude")
    middle = np.radians(np.clip(np.median(places[:, 0]), -70, 70))
    axes.set_aspect(1 / np.cos(middle), adjustable="datalim")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.25)
    return figure


def _thinned(values: Any) -> Any:
    """Every so many-th of [N], float64, at most MAPPED; the same ones of each column of N photos."""
    return np.asarray(values[:: -(-len(values) // MAPPED) or 1], dtype=np.float64)


def errors_figure(pictures: Sequence[tuple[Any, str]], columns: int = 3) -> Figure:
    """Photos with a caption under each. pictures: (uint8 [H, W, 3], text), at least one."""
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    figure = Figure(figsize=(4.4 * columns, 3.9 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.axis("off")
    for axes, (picture, caption) in zip(figure.axes, pictures, strict=False):
        axes.imshow(picture)
        axes.set_title(caption, fontsize=8, parse_math=False)  # an id or a city may hold dollars
    return figure
