"""Error analysis of synthetic predictions on real small shards."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from geopy.distance import geodesic
from PIL import Image

from roadwork.data.index import ShardIndex
from roadwork.data.record import DAYTIME, WEATHER
from roadwork.errors import UserError
from roadwork.evaluation import metrics
from roadwork.evaluation.assess import evaluate
from roadwork.evaluation.baselines import metadata_classifier, metadata_features
from roadwork.evaluation.errors import analyse, great_circle_km, join
from roadwork.evaluation.photos import DARKEST, Photos, attention_words, looked_at, stitched, worst_photos
from tests.evaluation.fake_run import build_shards, probabilities

NAMES = {"weather": WEATHER, "daytime": DAYTIME}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_shards(tmp_path_factory.mktemp("errors") / "shards")


@pytest.fixture
def index(folder):
    return ShardIndex.open(folder, "test")


def test_every_breakdown_holds_every_photo_once_and_its_own_metrics(index):
    values = probabilities(index)
    found = analyse(join(index, values), NAMES, [[40.1, -70.1], [48.0, 2.0]], n=50)
    fields = {b["field"]: b for b in found["breakdowns"]}
    assert set(fields) == {"weather", "daytime", "scene", "city", "gps_cluster", "distance", "object_size"}
    for name in set(fields) - {"object_size"}:
        assert sum(row["n"] for row in fields[name]["rows"]) == len(index), name
    rain = next(row for row in fields["weather"]["rows"] if row["value"] == "rain")
    chosen = index.weather == WEATHER.index("rain")
    probability = np.array([values[str(i)] for i in index.id])
    assert rain["n"] == chosen.sum()
    assert rain["mcc"] == metrics.mcc(metrics.confusion(index.label[chosen], probability[chosen]))
    assert rain["mcc_interval"][0] <= rain["mcc"] <= rain["mcc_interval"][1]
    assert {row["value"] for row in fields["scene"]["rows"]} == {"unknown"}
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("centres", [(), [[40.1, -70.1]]])
def test_without_a_target_region_the_breakdowns_that_need_one_are_said_to_be_missing(index, centres):
    found = evaluate(index, {"model": probabilities(index)}, "model", resamples=5, centres=centres, shares={})
    fields = {breakdown["field"] for breakdown in found["errors"]["breakdowns"]}
    assert ({"gps_cluster", "distance"} <= fields) == bool(centres)
    assert any("no target region" in note for note in found["notes"]) != bool(centres)


def test_object_size_scores_each_band_against_all_negatives(index):
    found = analyse(join(index, probabilities(index)), n=10)
    sizes = next(b for b in found["breakdowns"] if b["field"] == "object_size")["rows"]
    negatives = int((index.label == 0).sum())
    assert {row["n"] - row["positives"] for row in sizes} == {negatives}
    assert sum(row["positives"] for row in sizes) == int((index.label == 1).sum())
    assert {"no masks", "over 2.0%"} <= {row["value"] for row in sizes}


def test_worst_errors_come_worst_first_of_both_kinds(index):
    ids = [str(i) for i in index.id]
    values = dict.fromkeys(ids, 0.5)
    values.update({i: 0.9 if label else 0.1 for i, label in zip(ids, index.label, strict=True)})
    negative, positive = (np.flatnonzero(index.label == c) for c in (0, 1))
    values[ids[negative[0]]], values[ids[negative[1]]] = 0.7, 0.99
    values[ids[positive[0]]], values[ids[positive[1]]] = 0.02, 0.3
    worst = analyse(join(index, values), n=5)["worst"]
    assert [e["id"] for e in worst["false_positives"]] == [ids[negative[1]], ids[negative[0]]]
    assert [e["id"] for e in worst["false_negatives"]] == [ids[positive[0]], ids[positive[1]]]
    assert len(worst_photos(index, {"worst": worst})) == 4


def test_one_class_and_nothing_are_stated(index):
    ids = [str(i) for i in index.id]
    only = {i: 0.4 for i, label in zip(ids, index.label, strict=True) if label == 1}
    found = analyse(join(index, only), NAMES, n=5)
    assert np.array(found["confusion"]).shape == (2, 2) and found["classes"] == [1]
    assert found["missing_count"] == len(ids) - len(only)
    assert all(row["one_class"] for b in found["breakdowns"] for row in b["rows"])
    empty = analyse(join(index, {}), n=5)
    assert empty["n"] == 0 and empty["confusion"] == [[0, 0], [0, 0]]
    json.dumps([found, empty], allow_nan=False)
    result = evaluate(index, {"model": {}}, "model", resamples=5)
    assert "nothing could be scored" in result["notes"][0]
    json.dumps(result, allow_nan=False)


def test_predictions_of_another_split_are_refused(index):
    with pytest.raises(UserError, match="1 of 2 predictions name photos.*'stranger'"):
        join(index, {"stranger": 0.5, str(index.id[0]): 0.5})


def test_distance_agrees_with_geopy():
    a, b = (52.52, 13.405), (-33.87, 151.21)
    found = great_circle_km(np.array([a[0], math.nan]), np.array([a[1], 0.0]), np.array([b]))
    assert found[0, 0] == pytest.approx(geodesic(a, b).km, rel=0.006) and math.isnan(found[1, 0])


def test_the_photo_has_its_own_proportions(index):
    row = int(np.argmax(index.width / index.height))
    picture = Image.fromarray(looked_at(index, row, []))
    assert picture.width / picture.height == pytest.approx(index.width[row] / index.height[row], rel=0.06)


def test_a_photo_is_dark_where_the_network_did_not_look(index):
    row = int(np.argmax(index.num_views))
    plain, number = stitched(index, row, 480), int(index.num_views[row])
    attention = [0.5] + [0.0] * (number - 1)
    assert (looked_at(index, row, attention) == plain).all()  # the whole photo alone: no place
    attention[-1] = 0.5
    shown = looked_at(index, row, attention)
    high, wide = plain.shape[:2]
    x0, y0, x1, y1 = np.round(index.boxes(row)[-1] * [wide, high, wide, high]).astype(int)
    assert (shown[y0:y1, x0:x1] == plain[y0:y1, x0:x1]).all()
    elsewhere = np.ones((high, wide), dtype=bool)
    elsewhere[y0:y1, x0:x1] = False
    assert np.abs(shown[elsewhere] - DARKEST * plain[elsewhere]).max() <= 1


def test_attention_in_words():
    assert attention_words([0.25, 0.0, 0.6, 0.15]) == "view 2 (60%), the whole photo (25%), view 3 (15%) of 4 views"
    assert attention_words([1.0, 0.0]) == "the whole photo (100%) of 2 views"
    assert attention_words([1.0]) == attention_words([]) == ""


def test_a_photo_is_put_together_from_its_finest_views(index):
    row = int(np.argmax(index.num_views))
    whole = stitched(index, row)
    assert whole.shape == (index.height[row], index.width[row], 3)
    x0, y0, x1, y1 = np.round(index.boxes(row)[-1] * ([index.width[row], index.height[row]] * 2)).astype(int)
    tile = index.read_views(row)[-1].transpose(1, 2, 0)
    side = min(x1 - x0, y1 - y0)
    shown = np.asarray(Image.fromarray(whole[y0:y1, x0:x1]).resize(tile.shape[:2]))
    assert side > 0 and np.abs(shown.astype(int) - tile).mean() < 6
    assert len(Photos(index, [row])) == 1 and (Photos(index, [row])[0] == whole).all()


def columns(n, seed, tells):
    """Metadata whose weather tells the label in a share of the photos."""
    rng = np.random.default_rng(seed)
    label = (rng.random(n) < 0.8).astype(int)
    weather = np.where(rng.random(n) < tells, label, rng.integers(0, 2, n))
    none = np.full(n, -1)
    group = np.array([f"{seed}-{i // 3}" for i in range(n)])
    nowhere = np.full(n, np.nan)
    return SimpleNamespace(
        label=label, group=group, weather=weather, daytime=none, scene=none, latitude=nowhere, longitude=nowhere
    )


def test_metadata_classifier_finds_what_metadata_tell_and_no_more():
    for tells, low, high in ((0.0, -0.15, 0.15), (0.9, 0.6, 1.0)):
        train, held_out = columns(600, 0, tells), columns(600, 1, tells)
        values, _ = metadata_classifier(train, held_out)
        weights = metrics.prior_weights(held_out.label, 0.5)
        assert low < metrics.metric_value(held_out.label, values, weights=weights) < high
    train.label = np.ones(600, dtype=int)
    assert metadata_classifier(train, held_out) is None


def test_metadata_features_never_hold_unknown_places():
    features = metadata_features(columns(5, 0, 0.0))
    assert np.isfinite(features).all() and (features[:, :4] == 0).all()


def test_systems_are_compared_on_the_same_photos(folder, index):
    good, weak = probabilities(index, 2.0), probabilities(index, 0.2, seed=1)
    partial = dict(list(weak.items())[:5])
    result = evaluate(
        index, {"ensemble": good, "pretrained": weak, "half": partial}, "ensemble",
        train=ShardIndex.open(folder, "train"), resamples=200, names=NAMES,
    )  # fmt: skip
    first, *others = result["systems"]
    assert first["name"] == "ensemble" and first["chosen"] and first["gain"] is None
    assert {row["name"] for row in others} == {"pretrained", "metadata"}
    gain = next(row for row in others if row["name"] == "pretrained")["gain"]
    assert gain["difference"] > 0 and gain["helps"] and gain["low"] > 0
    assert any("half has no answer for every photo" in note for note in result["notes"])
    json.dumps(result, allow_nan=False)
