"""The embedded benchmark's parts: every sprite, the camera's geometry, cities, strata, light. No whole photo is drawn."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roadwork.data import geo
from roadwork.data.sources import split_of_name
from roadwork.data.street import (
    _LENGTHS,
    _STARTS,
    COUNTERPARTS,
    MASK_CLASSES,
    TEST_PER_TEN,
    _describe,
    _locate,
    _row,
    _split,
    _stratum,
    _video,
    work_zone,
)
from roadwork.data.street_cities import CITIES, FAMILIES, TARGET
from roadwork.data.street_light import WEATHERS, Conditions
from roadwork.data.street_lookalikes import LOOKALIKES, TRAFFIC
from roadwork.data.street_objects import ROADWORK, Kind
from roadwork.data.street_pen import Pen, add_grey, pick, smooth_noise, vary
from roadwork.data.street_scene import EYE, FOCAL, Camera, build_place

KINDS = {**ROADWORK, **LOOKALIKES, **TRAFFIC}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("height", [3.0, 24.0, 180.0])
def test_every_sprite_is_drawn_at_every_size_in_every_family(name: str, height: float) -> None:
    kind: Kind = KINDS[name]
    for family in FAMILIES:
        pen = Pen(height, kind.aspect)
        kind.draw(pen, np.random.default_rng(4), family)
        rgb, alpha = pen.finish()
        assert alpha.shape == (max(2, round(height)), max(2, round(height * kind.aspect))) == rgb.shape[:2]
        assert np.isfinite(rgb).all() and alpha.min() >= 0 and alpha.max() <= 1
        assert alpha.mean() > 0.03, f"{name} in {family} of {height} px is hardly there"


@pytest.mark.parametrize("name", KINDS)
def test_a_sprite_looks_the_same_for_the_same_seed_and_differs_for_another(name: str) -> None:
    kind = KINDS[name]

    def drawn(seed: int) -> np.ndarray:
        pen = Pen(60, kind.aspect)
        kind.draw(pen, np.random.default_rng(seed), "rust")
        return pen.finish()[0]

    assert np.array_equal(drawn(1), drawn(1))
    assert any(not np.array_equal(drawn(1), drawn(seed)) for seed in range(2, 6))


def test_roadwork_has_a_class_and_nothing_else_has_one() -> None:
    assert {kind.mask_class for kind in ROADWORK.values()} == set(range(len(MASK_CLASSES)))
    assert all(kind.mask_class is None for kind in (*LOOKALIKES.values(), *TRAFFIC.values()))
    assert all(0 < kind.height[0] <= kind.height[1] and kind.aspect > 0 for kind in KINDS.values())


def test_every_roadwork_object_has_counterparts_of_its_size() -> None:
    """A negative has something like it at the same spot: size alone must not tell."""
    assert set(COUNTERPARTS) == set(ROADWORK)
    for name, options in COUNTERPARTS.items():
        assert set(options) <= set(LOOKALIKES)
        low, high = ROADWORK[name].height
        heights = [LOOKALIKES[option].height for option in options]
        assert min(h[0] for h in heights) < 2.5 * high and max(h[1] for h in heights) > low / 2.5, name


def test_favourites_of_every_family_exist() -> None:
    for name, family in FAMILIES.items():
        assert set(family.favourites) <= set(LOOKALIKES), name
        assert family.storeys[0] <= family.storeys[1] and family.tree in ("round", "palm", "conifer", "cactus")


def test_cities_are_real_places_whose_shares_add_up() -> None:
    assert sum(city.train_share for city in CITIES) == pytest.approx(1.0)
    assert sum(city.test_share for city in CITIES) == pytest.approx(1.0)
    assert len({city.name for city in CITIES}) == len(CITIES) and {city.family for city in CITIES} <= set(FAMILIES)
    assert geo.usable(np.array([[city.latitude, city.longitude] for city in CITIES])).all()
    assert all(len(city.weather) == len(WEATHERS) and min(city.weather) >= 0 < sum(city.weather) for city in CITIES)


def test_brackets_of_distance_are_all_there() -> None:
    """Cities lie within 50, 200 and 500 km of the target and beyond, so that every weight of the default occurs."""
    points = np.array([[city.latitude, city.longitude] for city in CITIES])
    target = points[[city.name in TARGET for city in CITIES]]
    weights = geo.gps_weights(points, target)
    assert set(weights) == set(geo.DEFAULT.weights)
    share = sum(city.test_share for city in CITIES if city.name in TARGET)
    assert share > 0.8, "the test split is served in the target region"


@settings(max_examples=60)
@given(st.integers(0, 10**7))
def test_photos_come_in_whole_videos(index: int) -> None:
    video, frame = _locate(index)
    assert 0 <= frame < _LENGTHS[video % len(_LENGTHS)]
    cycle, slot = divmod(video, len(_LENGTHS))
    assert cycle * _STARTS[-1] + _STARTS[slot] + frame == index


@settings(max_examples=30)
@given(st.integers(0, 2**40), st.integers(0, 10**6), st.integers(0, 50))
def test_ten_consecutive_numbers_come_from_ten_different_tenths(seed: int, block: int, stream: int) -> None:
    tenths = [int(_stratum(seed, stream, 10 * block + slot) * 10) for slot in range(10)]
    assert sorted(tenths) == list(range(10))


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_three_of_ten_videos_are_test_and_each_split_counts_through(seed: int) -> None:
    seen: dict[str, list[int]] = {"train": [], "test": []}
    for number in range(200):
        split, position = _split(seed, number)
        seen[split].append(position)
    assert len(seen["test"]) == 20 * TEST_PER_TEN
    for positions in seen.values():
        assert positions == list(range(len(positions)))


def test_a_video_is_a_function_of_its_number_and_the_seed() -> None:
    first = _video(17, 3)
    _video.cache_clear()
    assert _video(17, 3) == first != _video(17, 4)
    assert first.frames == _LENGTHS[17 % len(_LENGTHS)] and first.split == _split(3, 17)[0]
    away = geo.haversine_km(
        np.array([first.latitude, first.longitude]), np.array([first.city.latitude, first.city.longitude])
    )
    assert away <= 9.1


def test_both_splits_have_sites_in_their_share() -> None:
    videos = [_video(number, 8) for number in range(400)]
    share = {split: np.mean([video.site for video in videos if video.split == split]) for split in ("train", "test")}
    assert 0.75 < share["train"] < 0.95 and 0.40 < share["test"] < 0.65
    assert Counter(video.conditions.weather for video in videos).keys() == set(WEATHERS)
    assert all(video.conditions.daytime != "Dark" for video in videos if video.conditions.glare)


@pytest.mark.parametrize("seed", range(6))
def test_a_work_zone_holds_cones_or_drums_where_the_camera_sees_them(seed: int) -> None:
    place = build_place(seed, FAMILIES["rust"], "rust", "Urban", False)
    things = work_zone(np.random.default_rng(seed), place)
    names = [thing.kind.name for thing in things]
    assert 3 <= len(things) <= 16 and {"cone", "drum"} & set(names)
    for thing in things:
        assert thing.z >= 6.0 and abs(thing.x) <= 0.63 * thing.z
        assert thing.kind.height[0] <= thing.height <= thing.kind.height[1]
        assert thing.kind.mask_class is not None


def test_the_camera_is_a_pinhole() -> None:
    camera = Camera(horizon=400.0, centre=640.0, ahead=0.0)
    assert camera.point(0.0, EYE, 20.0) == (640.0, 400.0), "what is at eye height lies on the horizon"
    assert camera.point(2.0, 0.0, 10.0) == (640.0 + FOCAL * 0.2, 400.0 + FOCAL * EYE / 10)
    near, far = camera.point(2.0, 0.0, 10.0), camera.point(2.0, 0.0, 20.0)
    assert far[0] - 640 == pytest.approx((near[0] - 640) / 2)
    moved = Camera(400.0, 640.0, ahead=5.0)
    assert moved.point(2.0, 0.0, 15.0) == near, "going ahead is the same as everything coming nearer"
    assert all(np.isfinite(moved.point(1.0, 0.0, 0.0))), "what lies behind the camera has finite pixels"


@pytest.mark.parametrize("weather", WEATHERS)
def test_every_weather_has_its_clouds_and_its_visibility(weather: str) -> None:
    sky = Conditions(weather, "Light", False)
    assert 0 <= sky.cloud <= 1 and 40 <= sky.visibility <= 700 and len(sky.haze) == 3
    assert (sky.visibility < 200) == (weather in ("Rain", "Snow", "Fog"))


def test_words_say_what_the_masks_show_and_nothing_is_said_of_nothing() -> None:
    masks = np.zeros((720, 1280), np.uint8)
    masks[300:400, 100:200] = 1
    masks[300:400, 150:180] |= 1 << 3
    text, alteration = _describe(np.random.default_rng(0), masks)
    assert "cones" in text.lower() and "workers" in text and "on the left" in text and text[0].isupper()
    assert alteration.startswith("['") and alteration.endswith("']")
    video = _video(3, 0)
    positive, negative = _row(video, 8, 1, masks), _row(video, 8, 1, masks * 0)
    assert (positive["label"], negative["label"]) == (1, 0)
    assert negative["scene_description"] is None and negative["scene_level_tags.travel_alteration"] is None
    same = set(positive) - {"label", "scene_description", "scene_level_tags.travel_alteration"}
    assert all(positive[name] == negative[name] for name in same), "metadata must not tell the label"


def test_noise_has_no_mean_and_about_unit_spread() -> None:
    noise = np.stack([smooth_noise(np.random.default_rng(seed), 72, 128, 6) for seed in range(30)])
    assert noise.shape == (30, 72, 128) and abs(noise.mean()) < 0.1 and 0.5 < noise.std() < 1.5


def test_colours_vary_within_a_byte_and_grey_saturates() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        assert all(0 <= channel <= 255 for channel in vary(rng, (250, 4, 128), 40))
    assert all(0 <= channel <= 255 for channel in pick(rng, [(255, 255, 255), (0, 0, 0)]))
    image = np.full((2, 2, 3), 250, np.uint8)
    assert add_grey(image, np.full((2, 2), 20, np.float32)).max() == 255
    assert add_grey(image, np.full((2, 2), -300, np.float32)).min() == 0


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("data/train-00000-of-00026.parquet", "train"), ("train/part-0.parquet", "train"), ("x/valid_01.parquet", "val"),
        ("validation-00000.parquet", "val"), ("training.parquet", None), ("contest/rows.parquet", None),
        ("test/train-0.parquet", "train"), ("latest.parquet", None), ("data/predict.0.parquet", "predict"),
    ],
)  # fmt: skip
def test_a_files_name_tells_its_split_by_whole_words(path: str, split: str | None) -> None:
    assert split_of_name(path) == split
