"""Rows of the public schema: every quirk is read, repaired with a note, or rejected with a reason."""

from __future__ import annotations

import math

import pytest

from roadwork.data.record import DAYTIME, MASK_CLASSES, SCENE, WEATHER, Rejected, parse_row
from tests.data.photos import nested, row


def test_the_published_row() -> None:
    real = row(
        740,
        gps="[39.77160604, -86.18823935]",
        label=1,
        **{"video_info.vid_id": "clip-7", "scene_level_tags.weather": "['Partly Cloudy', 'Rain']"},
    )
    record = parse_row(real)
    assert (record.id, record.label, record.latitude, record.longitude) == ("740", 1, 39.77160604, -86.18823935)
    assert (record.group, record.city, record.description) == ("clip-7", "indianapolis", "men at work")
    assert WEATHER[record.weather] == "partly_cloudy"
    assert (DAYTIME[record.daytime], SCENE[record.scene]) == ("light", "urban")
    assert record.repairs == () and record.provenance == (1, 0, None, None, 740.0, 0)


def test_nested_structs_read_like_flat_dotted_columns() -> None:
    assert parse_row(nested(row(5))) == parse_row(row(5))


def test_vocabularies_have_the_sizes_of_the_model() -> None:
    assert (len(WEATHER), len(DAYTIME), len(SCENE), len(MASK_CLASSES)) == (8, 6, 7, 6)
    assert WEATHER[-1] == DAYTIME[-1] == SCENE[-1] == "unknown"


@pytest.mark.parametrize(
    ("gps", "note"),
    [
        (None, "gps_missing"),
        (math.nan, "gps_missing"),
        ("", "gps_empty"),
        ("  ", "gps_empty"),
        ("somewhere", "gps_not_a_pair"),
        ("[39.7]", "gps_not_a_pair"),
        ("['a', 'b']", "gps_not_a_pair"),
        ("__import__('os').getcwd()", "gps_not_a_pair"),
        ("[", "gps_not_a_pair"),
        ([math.nan, 4.0], "gps_not_finite"),
        ("[95.0, 200.0]", "gps_out_of_range"),
        ("[39.0, 181.0]", "gps_out_of_range"),
        ("[-122.4, 37.8]", "gps_swapped"),
        ("[-86.18, 39.77]", "gps_swapped"),
        ("[-79.99, 40.44]", "gps_swapped"),
        ("[-60.5, -33.0]", "gps_swapped"),
        ("[0.0, 0.0]", "gps_zero"),
        ("[0, 0]", "gps_zero"),
    ],
)
def test_an_unusable_coordinate_is_missing_and_counted(gps: object, note: str) -> None:
    record = parse_row(row(1, gps=gps))
    assert (record.latitude, record.longitude) == (None, None)
    assert record.repairs == (note,)


@pytest.mark.parametrize(
    "gps",
    [
        "[0.0, 10.0]",
        "(51.5, 0.0)",
        [90.0, 180.0],
        (-90.0, -180.0),
        "[-33.9, 151.2]",
        "[-54.8, -68.3]",
        "[-77.8, 166.7]",
    ],
)
def test_usable_coordinates_stay(gps: object) -> None:
    record = parse_row(row(1, gps=gps))
    assert record.latitude is not None and record.longitude is not None and record.repairs == ()


def test_a_coordinate_as_numpy_2_writes_it_is_repaired() -> None:
    record = parse_row(row(1, gps="[np.float64(40.31), np.float64(-79.54)]"))
    assert (record.latitude, record.longitude, record.repairs) == (40.31, -79.54, ("gps_numpy_text",))


@pytest.mark.parametrize(
    ("weather", "word", "repairs"),
    [
        ("['Sunny']", "sunny", ()),
        ("['Unknown', 'Rain', 'Snow']", "rain", ()),
        ("['Hail', 'Snow']", "snow", ()),
        ("['Hail']", None, ("weather_unrecognised",)),
        ("['Unknown']", None, ()),
        ("Partly Cloudy", "partly_cloudy", ()),
        ("[]", None, ()),
        (["Fog", "Rain"], "fog", ()),
        ("['Sunny'", None, ("weather_not_a_list",)),
        (None, None, ()),
        ("", None, ()),
        ("Overcast", "cloudy", ()),
    ],
)
def test_the_first_known_weather_of_several_counts(weather: object, word: str | None, repairs: tuple[str, ...]) -> None:
    record = parse_row(row(1, **{"scene_level_tags.weather": weather}))
    assert (None if record.weather is None else WEATHER[record.weather]) == word
    assert record.repairs == repairs


@pytest.mark.parametrize("label", [2, -1, 0.5, "roadwork", 7])
def test_a_label_outside_0_and_1_is_rejected(label: object) -> None:
    with pytest.raises(Rejected, match="label_outside_0_1"):
        parse_row(row(1) | {"label": label})


@pytest.mark.parametrize(
    ("label", "read"), [(None, None), (math.nan, None), ("", None), (True, 1), (0.0, 0), ("1", 1), ("0.0", 0)]
)
def test_labels(label: object, read: int | None) -> None:
    assert parse_row(row(1) | {"label": label}).label == read


def test_a_row_without_id_is_rejected() -> None:
    for empty in (None, "", " "):
        with pytest.raises(Rejected, match="missing_id"):
            parse_row(row(1) | {"id": empty})


@pytest.mark.parametrize("letter", ["\r", "\n", "\t", "\0", "\x1b", "\x7f", "\x85"])
def test_an_id_that_would_break_a_line_is_rejected(letter: str) -> None:
    """predictions.csv has a line per id; around an id such letters are blanks, within it they are part of a name."""
    with pytest.raises(Rejected, match="^id_control_character$"):
        parse_row(row(1) | {"id": f"a{letter}b"})
    if letter.isspace():
        assert parse_row(row(1) | {"id": f" ab{letter}"}).id == "ab"


@pytest.mark.parametrize("name", ["東京/1 é.jpg", "a b", "a\u2028b", "a\u200db", "a,\"b'", "🚧"])
def test_an_id_of_other_letters_stays_as_it_is(name: str) -> None:
    assert parse_row(row(1) | {"id": name}).id == name
