"""The classifier without pixels, and the figures: on every degenerate set that a run may end with."""

from __future__ import annotations

import io
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from roadwork.evaluation import plots
from roadwork.evaluation.baselines import metadata_classifier, metadata_features
from roadwork.evaluation.errors import great_circle_km


def columns(n: int, seed: int = 0, **changes: Any) -> SimpleNamespace:
    """Metadata of n photos in groups of four; by default they tell nothing of the label."""
    rng = np.random.default_rng(seed)
    group = np.arange(n) // 4
    values: dict[str, Any] = {
        "label": (rng.random(n) < 0.5).astype(np.int8),
        "group": np.array([f"v{g}" for g in group]),
        "latitude": 40 + rng.random(n),
        "longitude": -80 + rng.random(n),
        "weather": rng.integers(-1, 7, n),
        "daytime": rng.integers(-1, 5, n),
        "scene": rng.integers(-1, 6, n),
    }
    return SimpleNamespace(**(values | changes))


def test_features_of_every_known_and_unknown_value() -> None:
    found = metadata_features(
        columns(
            4,
            latitude=np.array([0.0, 90.0, math.nan, 10.0]),
            longitude=np.array([90.0, 0.0, 5.0, math.nan]),
            weather=np.array([-1, 0, 6, 15]),
            daytime=np.array([-1, -1, -1, -1]),
            scene=np.array([0, 0, 0, 40]),
        )
    )
    assert found.shape == (4, 4 + 3 * 17) and np.isfinite(found).all()
    np.testing.assert_allclose(found[:, :4], [[0, 1, 0, 1], [0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]], atol=1e-12)
    for first in (4, 21, 38):
        assert (found[:, first : first + 17].sum(axis=1) == 1).all(), "each tag is exactly one of its words"
    assert found[0, 4 + 16] == 1 and found[1, 4] == 1 and found[3, 38 + 15] == 1


@pytest.mark.parametrize(
    "labels", [np.zeros(20, int), np.ones(20, int), np.full(20, -1), np.array([1] * 10 + [-1] * 10)]
)
def test_without_two_classes_there_is_no_classifier(labels: np.ndarray) -> None:
    assert metadata_classifier(columns(20, label=labels), columns(8)) is None


def test_nothing_to_train_on_is_no_classifier() -> None:
    assert metadata_classifier(columns(0), columns(8)) is None


@pytest.mark.parametrize("tells", ["weather", "scene", "place"])
def test_what_metadata_tell_is_found_on_other_groups(tells: str) -> None:
    def made(n: int, seed: int) -> SimpleNamespace:
        found = columns(n, seed)
        label = found.label.astype(int)
        if tells == "place":
            found.latitude = np.where(label == 1, 40.0, 48.0) + np.random.default_rng(seed).normal(0, 0.3, n)
        else:
            setattr(found, tells, np.where(label == 1, 2, 3))
        return found

    held_out = made(60, 1)
    result = metadata_classifier(made(120, 0), held_out)
    assert result is not None
    probability, name = result
    assert probability.shape == (60,) and name in ("logistic regression", "random forest")
    assert ((probability > 0.5) == (held_out.label == 1)).mean() > 0.9


def test_answers_are_under_the_prior_of_use_and_repeatable() -> None:
    """Four of five training photos are positive, and nothing tells which: the answer must be the prior asked for."""
    label = (np.arange(120) % 5 > 0).astype(int)
    flat = {"weather": np.zeros(120, int), "daytime": np.zeros(120, int), "scene": np.zeros(120, int)}
    nowhere = {"latitude": np.full(120, math.nan), "longitude": np.full(120, math.nan)}
    train = columns(120, label=label, **flat, **nowhere)
    result, again = (metadata_classifier(train, train, 0.2) for _ in range(2))
    assert result is not None and again is not None and np.array_equal(result[0], again[0])
    assert result[0].mean() == pytest.approx(0.2, abs=0.05)


def test_at_most_so_many_photos_are_used() -> None:
    result = metadata_classifier(columns(100), columns(10), most=30)
    assert result is not None and np.isfinite(result[0]).all()


def test_distances_by_hand() -> None:
    found = great_circle_km(np.array([0.0, 0.0, math.nan]), np.array([0.0, 180.0, 1.0]), [[0.0, 0.0], [90.0, 0.0]])
    quarter = math.pi / 2 * 6371.0088
    np.testing.assert_allclose(found[:2], [[0, quarter], [2 * quarter, quarter]], rtol=1e-9, atol=1e-6)
    assert np.isnan(found[2]).all()


# --------------------------------------------------------------------------------------------------- figures


def drawn(figure: Any) -> Image.Image:
    """The figure as a picture; fails where matplotlib cannot lay it out."""
    picture = Image.open(io.BytesIO(plots.png(figure)))
    picture.load()
    return picture


SETS = {
    "both classes": ([0, 1, 1, 0, 1], [0.1, 0.9, 0.4, 0.6, 0.8]),
    "positives alone": ([1, 1, 1], [0.2, 0.9, 1.0]),
    "negatives alone": ([0, 0], [0.0, 0.5]),
    "nothing": ([], []),
    "one photo": ([1], [0.5]),
    "equal answers": ([0, 1], [0.5, 0.5]),
}


@pytest.mark.parametrize("name", SETS)
def test_every_set_has_its_figures(name: str) -> None:
    label, probability = (np.array(part, dtype=kind) for part, kind in zip(SETS[name], (int, float), strict=True))
    confusion = plots.confusion_figure(label, probability)
    axes = confusion.axes[0]
    counts = [int(text.get_text().split("\n")[0]) for text in axes.texts]
    assert sum(counts) == len(label) and f"n = {len(label)}" in axes.get_title()
    reliability = plots.reliability_figure(label, probability, before=probability)
    curve = plots.precision_recall_figure(label, probability)
    said = [text.get_text() for text in curve.axes[0].texts]
    assert ("one class only" in said) == (len(set(SETS[name][0])) < 2)
    for figure in (confusion, reliability, curve):
        assert min(drawn(figure).size) > 100


def test_reliability_names_the_error_before_and_after() -> None:
    label, probability = np.array([0, 1, 1, 0]), np.array([0.2, 0.8, 0.7, 0.4])
    both = plots.reliability_figure(label, probability, before=probability**2)
    names = [text.get_text() for text in both.axes[0].get_legend().get_texts()]
    assert names[0].startswith("before: ECE ") and names[1].startswith("after: ECE ")
    alone = plots.reliability_figure(label, probability)
    assert alone.axes[0].get_legend().get_texts()[0].get_text().startswith("probability: ECE ")


def test_curves_show_what_was_logged_and_nothing_where_nothing_was() -> None:
    records = [{"step": i, "loss": 1 / i, "note": "x", "lr": None} for i in range(1, 500)]
    figure = plots.curves_figure(records, ["loss", "absent", "note", "lr"], "loss")
    assert figure is not None
    names = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert names == ["loss"] and figure.axes[0].get_xlabel() == "optimizer step"
    line = next(line for line in figure.axes[0].lines if line.get_label() == "loss")
    assert len(line.get_xdata()) == 499 and np.isfinite(line.get_ydata()).all()
    assert plots.curves_figure([], ["loss"], "loss") is None
    assert plots.curves_figure([{"step": 1, "loss": None}], ["loss"], "loss") is None
    single = plots.curves_figure([{"step": 1, "loss": 0.5}], ["loss"], "loss")
    assert single is not None and drawn(single).size[0] > 100


def test_smoothing_keeps_a_constant_constant_to_its_ends() -> None:
    records = [{"step": i, "loss": 2.0} for i in range(1000)]
    figure = plots.curves_figure(records, ["loss"], "loss")
    assert figure is not None
    smooth = next(line for line in figure.axes[0].lines if line.get_label() == "loss")
    np.testing.assert_allclose(smooth.get_ydata(), 2.0)


def test_systems_stand_in_their_order_with_their_intervals() -> None:
    figure = plots.intervals_figure([("best", 0.7, [0.6, 0.8]), ("other", 0.5, None)])
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["best", "other"]
    bottom, top = axes.get_ylim()
    assert bottom > top, "the first row is on top"
    assert sum(len(line.get_xdata()) == 2 for line in axes.lines) == 1
    assert drawn(plots.intervals_figure([])).size[0] > 100


def test_dollars_in_the_names_of_photos_and_cities_are_no_formula() -> None:
    name = "img_$_20_$30_x^^.jpg"
    shown = plots.errors_figure([(np.zeros((8, 8, 3), np.uint8), name)])
    rows = plots.intervals_figure([(name, 0.7, [0.6, 0.8])])
    assert min(drawn(shown).size) > 100 and min(drawn(rows).size) > 100
    assert shown.axes[0].get_title() == name and [t.get_text() for t in rows.axes[0].get_yticklabels()] == [name]


def test_a_map_needs_one_place_and_adds_draws_of_the_same_one() -> None:
    unknown = np.array([math.nan, 1.0])
    assert plots.map_figure(unknown, unknown[::-1], np.ones(2)) is None
    figure = plots.map_figure(
        [40.0, 40.001, math.nan], [-80.0, -80.001, 3.0], [1.0, 2.0, 9.0], [[40.0, -80.0]], ([41.0], [-81.0])
    )
    assert figure is not None
    names = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert names == ["training draws", "scored photos", "target region"]
    draws = figure.axes[0].collections[0].get_offsets()
    assert len(draws) == 1, "two photos of one corner are one spot"
    assert min(drawn(figure).size) > 100


def test_a_map_of_very_many_photos_draws_a_part_of_them(monkeypatch):
    """A run's first rank draws it before the first step, while the others wait."""
    monkeypatch.setattr(plots, "MAPPED", 10)
    places = np.linspace(-60.0, 60.0, 105)
    figure = plots.map_figure(places, places, np.ones(105), held_out=(places[:19], places[1:20]))
    train, scored = (drawn.get_offsets() for drawn in figure.axes[0].collections)
    assert 5 <= len(train) <= 10 and 5 <= len(scored) <= 10
    assert scored.tolist() == [[places[1 + k], places[k]] for k in range(0, 19, 2)], "longitude first, of one photo"
