"""GPS weights against geopy's geodesic, and everything that is not a place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from geopy.distance import geodesic
from hypothesis import given, settings
from hypothesis import strategies as st

from roadwork.data import geo
from roadwork.errors import UserError

PITTSBURGH = (40.4406, -79.9959)
places = st.tuples(st.floats(-90, 90), st.floats(-180, 180))


@settings(max_examples=300, deadline=None)
@given(places, places)
def test_distance_is_within_0_6_percent_of_the_geodesic(a: tuple[float, float], b: tuple[float, float]) -> None:
    true = geodesic(a, b).km
    assert abs(float(geo.haversine_km(np.array(a), np.array(b))) - true) <= 0.006 * true + 1e-6


def test_antimeridian_and_poles() -> None:
    suva, other_side = np.array([-17.0, 179.9]), np.array([-17.0, -179.9])
    assert geo.haversine_km(suva, other_side) == pytest.approx(geodesic(suva, other_side).km, rel=0.006)
    assert geo.nearest_km(np.array([[89.99, 0.0]]), np.array([[89.99, 180.0]]))[0] < 3
    assert list(geo.gps_weights(np.array([[-17.0, -179.95], [-17.0, 0.0]]), suva[None])) == [5.0, 0.3]
    around = np.array([[-17.0, 179.8], [-17.0, -179.8]])
    centre = geo.clusters(around, 1)
    assert abs(centre[0, 1]) > 179.9 and centre[0, 0] == pytest.approx(-17.0, abs=0.01)
    pole = geo.clusters(np.array([[89.0, 0.0], [89.0, 120.0], [89.0, -120.0]]), 1)
    assert pole[0, 0] > 89.9


def test_brackets_at_their_borders() -> None:
    target = np.array([[0.0, 20.0]])
    km = np.array([0.0, 49.0, 51.0, 199.0, 201.0, 499.0, 501.0, 9000.0])
    east = 20.0 + np.degrees(km / geo.EARTH_RADIUS_KM)
    weights = geo.gps_weights(np.stack([np.full(8, 1e-9), east], axis=1), target)
    assert weights.tolist() == [5.0, 5.0, 2.5, 2.5, 1.0, 1.0, 0.3, 0.3]
    own = geo.gps_weights(np.array([[0.0, 20.0], [0.0, 90.0]]), target, brackets=geo.Brackets((10.0,), (2.0, 0.5)))
    assert own.tolist() == [2.0, 0.5]


def test_what_is_no_place_weighs_one() -> None:
    odd = [[np.nan, 4.0], [4.0, np.nan], [0.0, 0.0], [91.0, 4.0], [4.0, -181.0], [np.inf, 0.0], [-0.0, 0.0]]
    weights = geo.gps_weights(np.array([*odd, list(PITTSBURGH)]), np.array([PITTSBURGH]))
    assert weights.tolist() == [1.0] * len(odd) + [5.0]
    assert weights.dtype == np.float64


@pytest.mark.parametrize("target", [np.zeros((0, 2)), np.array([[0.0, 0.0]]), np.full((3, 2), np.nan), []])
def test_without_a_usable_target_every_weight_is_one(target: np.ndarray) -> None:
    assert geo.gps_weights(np.array([PITTSBURGH, (48.0, 11.0)]), target).tolist() == [1.0, 1.0]


def test_more_clusters_than_places() -> None:
    target = np.array([PITTSBURGH] * 4 + [(48.1351, 11.582)])
    assert len(geo.clusters(target, 5)) == 2
    assert geo.gps_weights(target, target, n_clusters=50).tolist() == [5.0] * 5


def test_clusters_lie_on_the_sphere_at_the_places() -> None:
    rng = np.random.default_rng(0)
    cities = np.array([[40.44, -80.0], [48.13, 11.58], [-33.9, 151.2]])
    target = np.concatenate([city + rng.normal(0, 0.05, (50, 2)) for city in cities])
    centres = geo.clusters(target, 3)
    assert geo.nearest_km(cities, centres).max() < 5
    assert np.array_equal(centres, geo.clusters(target, 3))
    everywhere = geo.clusters(np.array([[0, 0.1], [0, 90], [0, 180], [0, -90], [90, 0], [-90, 0.0]]), 1)
    assert geo.usable(everywhere).all()


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[N, 2\]"):
        geo.gps_weights(np.zeros((3, 3)), np.zeros((1, 2)))
    assert geo.gps_weights(np.zeros((0, 2)), np.array([PITTSBURGH])).shape == (0,)


def test_coverage_counts_draws_not_photos() -> None:
    latlon = np.array([PITTSBURGH, (48.1351, 11.582), (np.nan, np.nan)])
    even = geo.coverage(latlon, np.ones(3), np.array([PITTSBURGH]))
    assert even["within_50_km"] == 0.5 and even["unknown_draws"] == pytest.approx(1 / 3)
    near = geo.coverage(latlon, np.array([3.0, 1.0, 1.0]), np.array([PITTSBURGH]))
    assert near["within_50_km"] == 0.75 and near["within_100_km"] == 0.75
    assert near["mean_km"] == pytest.approx(geodesic(PITTSBURGH, (48.1351, 11.582)).km / 4, rel=0.006)
    assert near["effective_sample_size"] == pytest.approx(25 / 11)
    assert near["targets_met"] is False
    assert geo.coverage(latlon[:1], np.ones(1), latlon[:1])["targets_met"] is True
    assert geo.coverage(latlon, np.ones(3), np.zeros((0, 2)))["mean_km"] is None


def test_class_balance_keeps_the_prior_of_the_draws() -> None:
    rng = np.random.default_rng(1)
    labels = (rng.random(500) < 0.8).astype(int)
    weights = np.where(labels == 1, 5.0, 0.3) * rng.choice([1.0, 2.5], 500)

    def prior(w: np.ndarray) -> float:
        return float(w[labels == 1].sum() / w.sum())

    assert prior(weights) > 0.95
    assert prior(geo.balance_classes(weights, labels, "keep")) == pytest.approx(labels.mean())
    assert prior(geo.balance_classes(weights, labels, "equal")) == pytest.approx(0.5)
    assert np.array_equal(geo.balance_classes(weights, labels, "none"), weights)
    kept = geo.balance_classes(weights, labels, "keep")
    assert np.allclose((kept / weights)[labels == 1], (kept / weights)[labels == 1][0])


def test_target_files(tmp_path: Path) -> None:
    good = tmp_path / "t.csv"
    good.write_text("latitude,longitude\n40.44,-79.99\n40.3,-79.5\n")
    assert geo.read_target(good).tolist() == [[40.44, -79.99], [40.3, -79.5]]
    for text, word in [
        ("lat,lon\n1,2\n", "header"),
        ("latitude,longitude\n1,x\n", "line 2"),
        ("latitude,longitude\n1,2\n99,2\n", "line 3"),
        ("latitude,longitude\n", "no coordinate"),
    ]:
        good.write_text(text)
        with pytest.raises(UserError, match=word):
            geo.read_target(good)
    with pytest.raises(UserError, match="no file"):
        geo.read_target(tmp_path / "absent.csv")
