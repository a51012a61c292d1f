"""What holds for GPS weights of any places: agreement with scikit-learn, symmetry, order, borders; and hand-written CSVs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics.pairwise import haversine_distances

from roadwork.data import geo
from roadwork.errors import UserError

PITTSBURGH, MUNICH = (40.4406, -79.9959), (48.1351, 11.582)
HALF_ROUND_KM = np.pi * geo.EARTH_RADIUS_KM


def places(most: int = 12) -> st.SearchStrategy[np.ndarray]:
    """Degrees [N, 2], N from 1 to `most`, away from (0, 0) so that every one is usable."""
    pair = st.tuples(st.floats(-90, 90), st.floats(-180, 180)).filter(lambda p: max(map(abs, p)) > 1e-6)
    return st.lists(pair, min_size=1, max_size=most).map(lambda rows: np.array(rows, dtype=np.float64))


@settings(max_examples=100)
@given(places(), places())
def test_distances_are_scikit_learns(a: np.ndarray, b: np.ndarray) -> None:
    ours = geo.haversine_km(a[:, None], b[None])
    theirs = haversine_distances(np.radians(a), np.radians(b)) * geo.EARTH_RADIUS_KM
    assert ours.shape == (len(a), len(b))
    # near the other side of the globe a rounding of 1e-16 in the sine is a metre
    np.testing.assert_allclose(ours, theirs, rtol=1e-7, atol=0.01)


@settings(max_examples=100)
@given(places(3).filter(lambda p: len(p) == 3))
def test_distance_is_symmetric_bounded_and_obeys_the_triangle(p: np.ndarray) -> None:
    ab, bc, ac = geo.haversine_km(p[0], p[1]), geo.haversine_km(p[1], p[2]), geo.haversine_km(p[0], p[2])
    assert geo.haversine_km(p[1], p[0]) == ab and geo.haversine_km(p[0], p[0]) == 0
    assert 0 <= ab <= HALF_ROUND_KM + 1e-6
    assert ac <= ab + bc + 1e-3


@settings(max_examples=100)
@given(places())
def test_the_sphere_and_back(p: np.ndarray) -> None:
    xyz = geo.unit_sphere(p)
    np.testing.assert_allclose(np.linalg.norm(xyz, axis=1), 1.0, atol=1e-12)
    back = geo.from_sphere(xyz * 7.5)  # the length does not matter
    assert geo.haversine_km(p, back).max() < 1e-3


@settings(max_examples=60)
@given(places(20), places(20))
def test_the_nearest_point_is_found_as_by_looking_at_all(photos: np.ndarray, points: np.ndarray) -> None:
    everywhere = geo.haversine_km(photos[:, None], points[None]).min(axis=1)
    np.testing.assert_allclose(geo.nearest_km(photos, points), everywhere, rtol=1e-6, atol=0.01)


def test_the_nearest_of_nothing_is_not_a_number() -> None:
    assert np.isnan(geo.nearest_km(np.array([PITTSBURGH]), np.zeros((0, 2)))).all()
    assert geo.nearest_km(np.zeros((0, 2)), np.array([PITTSBURGH])).shape == (0,)
    found = geo.nearest_km(np.array([PITTSBURGH, (0.0, 0.0), (np.nan, 1.0)]), np.array([PITTSBURGH]))
    assert found[0] == pytest.approx(0.0, abs=1e-6) and np.isnan(found[1:]).all()


@pytest.mark.parametrize(
    ("latitude", "longitude", "good"),
    [
        (90.0, 180.0, True),
        (-90.0, -180.0, True),
        (0.0, 1e-9, True),
        (1e-9, 0.0, True),
        (0.0, 0.0, False),
        (-0.0, 0.0, False),
        (90.0000001, 0.0, False),
        (0.0, -180.0000001, False),
        (np.nan, np.nan, False),
        (5.0, np.inf, False),
        (-np.inf, 5.0, False),
    ],
)
def test_what_counts_as_a_place(latitude: float, longitude: float, good: bool) -> None:
    assert geo.usable(np.array([[latitude, longitude]])).tolist() == [good]


@settings(max_examples=25)
@given(places(20), places(6))
def test_weights_depend_on_each_photo_alone(photos: np.ndarray, target: np.ndarray) -> None:
    """Neither the order of the photos nor of the target's points, nor which other photos there are, moves a weight."""
    weights = geo.gps_weights(photos, target)
    order = np.random.default_rng(len(photos)).permutation(len(photos))
    assert geo.gps_weights(photos[order], target).tolist() == weights[order].tolist()
    assert geo.gps_weights(photos[:1], target).tolist() == weights[:1].tolist()
    assert set(weights) <= set(geo.DEFAULT.weights)


@settings(max_examples=60)
@given(places(20))
def test_nearer_photos_never_weigh_less(photos: np.ndarray) -> None:
    target = np.array([PITTSBURGH])
    order = np.argsort(geo.nearest_km(photos, target), kind="stable")
    assert (np.diff(geo.gps_weights(photos, target)[order]) <= 0).all()


def test_a_distance_on_the_border_belongs_to_the_inner_bracket() -> None:
    centre = np.array([[10.0, 20.0]])
    photo = np.array([[10.5, 20.0]])
    exact = float(geo.nearest_km(photo, centre)[0])
    at = geo.Brackets((exact,), (2.0, 1.0))
    below = geo.Brackets((np.nextafter(exact, 0),), (2.0, 1.0))
    assert geo.weights_to_centres(photo, centre, at).tolist() == [2.0]
    assert geo.weights_to_centres(photo, centre, below).tolist() == [1.0]


@pytest.mark.parametrize(
    ("max_km", "weights", "words"),
    [
        ((50.0, 200.0), (5.0, 2.5), "2 rising distances need 3 weights"),
        ((200.0, 50.0), (5.0, 2.5, 1.0), "rising"),
        ((50.0, 50.0), (5.0, 2.5, 1.0), "rising"),
        ((50.0,), (5.0, 0.0), "weights must be finite and above 0"),
        ((50.0,), (5.0, -1.0), "weights must be finite and above 0"),
        ((50.0,), (np.inf, 1.0), "weights must be finite and above 0"),
        ((50.0,), (np.nan, 1.0), "weights must be finite and above 0"),
        ((-5.0,), (5.0, 1.0), "distances must be 0 km or more"),
        ((np.nan,), (5.0, 1.0), "distances must be 0 km or more"),
    ],
)
def test_impossible_brackets_say_what_is_wrong(max_km: tuple, weights: tuple, words: str) -> None:
    with pytest.raises(UserError, match=words):
        geo.Brackets(max_km, weights)


def test_one_bracket_for_the_whole_globe() -> None:
    everywhere = geo.Brackets((), (2.0,))
    assert geo.gps_weights(np.array([PITTSBURGH, MUNICH]), np.array([MUNICH]), brackets=everywhere).tolist() == [2, 2]


@settings(max_examples=25)
@given(places(30), st.integers(1, 6))
def test_clusters_are_places_on_the_globe_and_never_more_than_asked_for(target: np.ndarray, number: int) -> None:
    centres = geo.clusters(target, number)
    assert 1 <= len(centres) <= min(number, len(np.unique(target, axis=0)))
    assert np.isfinite(centres).all() and (np.abs(centres) <= [90.0 + 1e-9, 180.0 + 1e-9]).all()


def test_no_cluster_is_asked_for() -> None:
    with pytest.raises(UserError, match="at least 1"):
        geo.clusters(np.array([PITTSBURGH]), 0)


def test_opposite_points_have_a_centre_that_is_one_of_them() -> None:
    """Their mean is the middle of the Earth, which has no coordinates."""
    target = np.array([[0.0, 1.0], [0.0, -179.0]] * 3 + [[0.0, 91.0], [0.0, -89.0]] * 3)
    centre = geo.clusters(target, 1)
    assert geo.nearest_km(centre, target)[0] < 1e-3


@settings(max_examples=100)
@given(arrays(np.float64, st.integers(1, 50), elements=st.floats(1e-3, 1e3)), st.floats(1e-3, 1e3))
def test_effective_sample_size_lies_between_one_and_all_and_knows_no_unit(weights: np.ndarray, scale: float) -> None:
    size = geo.effective_sample_size(weights)
    assert 1 - 1e-9 <= size <= len(weights) * (1 + 1e-9)
    assert geo.effective_sample_size(weights * scale) == pytest.approx(size, rel=1e-6)


def test_effective_sample_size_at_its_ends() -> None:
    assert geo.effective_sample_size(np.full(7, 0.3)) == pytest.approx(7)
    assert geo.effective_sample_size(np.array([1.0, 0, 0])) == 1
    assert geo.effective_sample_size(np.zeros(3)) == geo.effective_sample_size(np.zeros(0)) == 0


labelled = st.lists(st.tuples(st.floats(0.1, 10), st.sampled_from([-1, 0, 1])), min_size=1, max_size=60)


@settings(max_examples=100)
@given(labelled)
def test_class_balance_moves_classes_and_nothing_within_them(rows: list[tuple[float, int]]) -> None:
    weights, labels = np.array([w for w, _ in rows]), np.array([y for _, y in rows])
    kept, equal = (geo.balance_classes(weights, labels, mode) for mode in ("keep", "equal"))
    for label in np.unique(labels):
        chosen = labels == label
        assert kept[chosen].mean() == pytest.approx(1.0)
        for balanced in (kept, equal):
            np.testing.assert_allclose((balanced / weights)[chosen], (balanced / weights)[chosen][0])
    known = labels >= 0
    if known.any():
        draws = [equal[labels == c].sum() for c in (0, 1) if (labels == c).any()]
        np.testing.assert_allclose(draws, known.sum() / len(draws))


def test_an_unknown_class_balance_is_named() -> None:
    with pytest.raises(UserError, match="none, keep, equal; given 'half'"):
        geo.balance_classes(np.ones(2), np.array([0, 1]), "half")


@settings(max_examples=60)
@given(places(15), places(5))
def test_coverage_is_a_share_that_grows_with_distance(photos: np.ndarray, target: np.ndarray) -> None:
    report = geo.coverage(photos, np.ones(len(photos)), target)
    near, far = report["within_50_km"], report["within_100_km"]
    assert near is not None and far is not None and 0 <= near <= far <= 1
    assert report["photos"] == len(photos) and report["without_coordinate"] == 0 and report["unknown_draws"] == 0


@pytest.mark.parametrize(
    ("weights", "met"), [((0.70, 0.15, 0.15), True), ((0.69, 0.16, 0.15), False), ((0.70, 0.14, 0.16), False)]
)
def test_targets_are_met_from_70_and_85_percent_on(weights: tuple[float, ...], met: bool) -> None:
    """One photo at the place, one some 80 km away, one some 400 km away: mean distance below 150 km in every case."""
    latlon = np.array([[40.0, -80.0], [40.72, -80.0], [43.6, -80.0]])
    assert geo.coverage(latlon, np.array(weights), latlon[:1])["targets_met"] is met


def test_coverage_of_photos_without_weight_or_place() -> None:
    target = np.array([PITTSBURGH])
    nowhere = geo.coverage(np.full((2, 2), np.nan), np.ones(2), target)
    assert nowhere["unknown_draws"] == 1.0 and nowhere["mean_km"] is None and nowhere["without_coordinate"] == 2
    unweighted = geo.coverage(np.array([PITTSBURGH]), np.zeros(1), target)
    assert unweighted["unknown_draws"] is None and unweighted["targets_met"] is None
    none = geo.coverage(np.zeros((0, 2)), np.zeros(0), target)
    assert none["photos"] == 0 and none["effective_sample_size"] == 0.0


@pytest.mark.parametrize(
    "text",
    [
        "latitude,longitude\n40.5,-80.25\n",
        "\ufefflatitude,longitude\r\n40.5,-80.25\r\n",
        "Latitude , LONGITUDE\n 40.5 , -80.25 \n",
        "name,longitude,latitude\nhere,-80.25,40.5\n",
        "latitude,longitude\n\n40.5,-80.25\n\n",
        'latitude,longitude,note\n40.5,-80.25,"two\nlines"\n',
    ],
)
def test_target_files_as_people_write_them(tmp_path: Path, text: str) -> None:
    file = tmp_path / "target.csv"
    file.write_bytes(text.encode())
    assert geo.read_target(file).tolist() == [[40.5, -80.25]]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"latitude,longitude\n1.5,2.5\n\n1.5\n", "line 4 holds no two numbers"),
        (b"latitude,longitude\n1.5,2.5\n\n\n95.0,2.5\n", "line 5 is no place on Earth"),
        (b'latitude,longitude,note\n1.5,2.5,"a\nb"\n0,0,x\n', "line 4 is no place on Earth"),
        (b"latitude,longitude\nnan,2.5\n", "line 2 is no place on Earth"),
        (b"latitude,longitude\n1,5;2,5\n", "line 2 holds no two numbers"),
        (b"", "the header must hold latitude,longitude"),
        (b"latitude,longitude,city\n1.5,2.5,M\xfcnchen\n", "not a CSV in UTF-8"),
        (b"PAR1\x00\xff\xfe\x00", "not a CSV in UTF-8"),
    ],
)
def test_target_files_at_fault_name_the_line(tmp_path: Path, data: bytes, words: str) -> None:
    file = tmp_path / "target.csv"
    file.write_bytes(data)
    with pytest.raises(UserError, match=words):
        geo.read_target(file)
