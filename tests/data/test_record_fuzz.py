"""Any value in any column: a record whose fields are in their ranges, or a named rejection; never another error."""

from __future__ import annotations

import math
import unicodedata
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roadwork.data.record import (
    DAYTIME,
    REQUIRED_COLUMNS,
    ROADS_SOUTH,
    SCENE,
    WEATHER,
    Record,
    Rejected,
    flatten,
    image_bytes,
    parse_gps,
    parse_label,
    parse_row,
    parse_tag,
    parse_text,
)
from tests.data.photos import nested, row

anything = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**40), 2**40),
    st.floats(),
    st.text(max_size=12),
    st.lists(st.one_of(st.floats(), st.text(max_size=5), st.none()), max_size=4),
    st.sampled_from(["[", "]", "[39.0, -86.0]", "(1,)", "['Sunny', None]", "[[1, 2], [3, 4]]", "9" * 400, "{}", "nan"]),
)
COLUMNS = sorted({*REQUIRED_COLUMNS, "scene_level_tags.travel_alteration"} - {"image"})


BASE = row(1)


@settings(max_examples=150)
@given(st.dictionaries(st.sampled_from(COLUMNS), anything), st.booleans())
def test_no_row_breaks_the_parser(changes: dict[str, Any], as_structs: bool) -> None:
    raw = BASE | changes
    try:
        record = parse_row(nested(raw) if as_structs else raw)
    except Rejected as error:
        assert error.reason.partition(":")[0] in ("missing_id", "id_control_character", "label_outside_0_1")
        return
    assert record.id and record.id == record.id.strip()
    assert not any(unicodedata.category(letter) == "Cc" for letter in record.id)
    assert record.label in (0, 1, None)
    assert (record.latitude is None) == (record.longitude is None)
    if record.latitude is not None and record.longitude is not None:
        assert abs(record.latitude) <= 90 and abs(record.longitude) <= 180
        assert (record.latitude, record.longitude) != (0.0, 0.0)
    for value, vocabulary in ((record.weather, WEATHER), (record.daytime, DAYTIME), (record.scene, SCENE)):
        assert value is None or 0 <= value < len(vocabulary) - 1
    assert all(isinstance(note, str) and note for note in record.repairs)


@settings(max_examples=200)
@given(st.floats(ROADS_SOUTH, 90), st.floats(-180, 180))
def test_every_place_with_roads_survives_every_way_to_write_it(latitude: float, longitude: float) -> None:
    if latitude == 0.0 and longitude == 0.0:
        return
    for form in ([latitude, longitude], (latitude, longitude), f"[{latitude!r}, {longitude!r}]"):
        notes: list[str] = []
        assert parse_gps(form, notes) == (latitude, longitude) and notes == []
    text = f"[np.float64({latitude!r}), np.float32({longitude!r})]"
    notes = []
    assert parse_gps(text, notes) == (latitude, longitude) and notes == ["gps_numpy_text"]


@pytest.mark.parametrize(
    ("pair", "note"),
    [
        ([180.0, 90.0], "gps_swapped"),
        ([180.0000001, 0.0], "gps_out_of_range"),
        ([91.0, 91.0], "gps_out_of_range"),
        ([-90.0000001, 45.0], "gps_swapped"),
        ([45.0, -180.0000001], "gps_out_of_range"),
        ([math.inf, 0.0], "gps_not_finite"),
        ([1.0, 2.0, 3.0], "gps_not_a_pair"),
        ([[1.0], [2.0]], "gps_not_a_pair"),
        ({"lat": 1.0, "lon": 2.0}, "gps_not_a_pair"),
        (np.array([1.0, 2.0]), "gps_not_a_pair"),
        (b"[1.0, 2.0]", "gps_not_a_pair"),
        (True, "gps_not_a_pair"),
    ],
)
def test_a_pair_that_is_none_has_one_note(pair: Any, note: str) -> None:
    notes: list[str] = []
    assert parse_gps(pair, notes) == (None, None) and notes == [note]


@pytest.mark.parametrize(
    ("value", "label"),
    [
        (1, 1), (0, 0), (1.0, 1), (False, 0), ("1", 1), (" 0 ", 0), ("1.0", 1), ("1e0", 1), ("-0", 0), (np.int64(1), 1),
        (None, None), ("", None), ("  ", None), (math.nan, None), (np.float64("nan"), None),
        ("nan", None), ("NaN", None), ("None", None), ("null", None),
    ],
)  # fmt: skip
def test_labels_as_tables_write_them(value: Any, label: int | None) -> None:
    """Also the words with which pandas and others write a label that is not there."""
    assert parse_label(value) == label


@pytest.mark.parametrize("value", ["yes", "roadwork", 2, -1, 0.5, "0.999", math.inf, "inf", [], {}, b"1x"])
def test_what_is_no_label_is_rejected_with_its_value(value: Any) -> None:
    with pytest.raises(Rejected, match="label_outside_0_1: "):
        parse_label(value)


def test_a_long_wrong_label_is_cut_in_the_report() -> None:
    with pytest.raises(Rejected) as error:
        parse_label("x" * 10_000)
    assert len(error.value.reason) < 80


@pytest.mark.parametrize("empty", [None, math.nan, "", "  ", "None", "nan", "NULL", " null "])
def test_words_for_nothing_are_nothing(empty: Any) -> None:
    assert parse_text(empty) == ""


@pytest.mark.parametrize("text", ["Nantes", "none of it", "nullify", "0", "äöü 東京"])
def test_words_that_begin_like_nothing_stay(text: str) -> None:
    assert parse_text(f"  {text} ") == text


@pytest.mark.parametrize("vocabulary", [WEATHER, DAYTIME, SCENE])
def test_every_word_of_a_vocabulary_is_read_however_it_is_spelt(vocabulary: tuple[str, ...]) -> None:
    for number, word in enumerate(vocabulary[:-1]):
        for spelt in (word, word.upper(), word.replace("_", " ").title(), word.replace("_", "-"), f" {word} "):
            for form in (spelt, [spelt], f"['{spelt}']", f"('unknown', '{spelt}')"):
                notes: list[str] = []
                assert parse_tag(form, vocabulary, "tag", notes) == number and notes == []


def test_unknown_is_not_a_repair_and_a_strange_word_is() -> None:
    notes: list[str] = []
    assert parse_tag("['Unknown', None, '']", WEATHER, "weather", notes) is None and notes == []
    assert parse_tag("['Unknown', 'Hail']", WEATHER, "weather", notes) is None and notes == ["weather_unrecognised"]
    assert parse_tag(17, WEATHER, "weather", notes) is None and notes[1:] == ["weather_unrecognised"]


def test_structs_are_opened_and_the_photo_is_not() -> None:
    raw = {"image": {"bytes": b"x", "path": None}, "video_info": {"vid_id": "a", "seq_id": None}, "id": 1, "tags": None}
    assert flatten(raw) == {
        "image": {"bytes": b"x", "path": None},
        "video_info.vid_id": "a",
        "video_info.seq_id": None,
        "id": 1,
        "tags": None,
    }


@pytest.mark.parametrize(
    ("value", "data"),
    [({"bytes": b"ab"}, b"ab"), ({"bytes": None}, b""), ({"path": "x"}, b""), (b"ab", b"ab"), (None, b""),
     (bytearray(b"ab"), b"ab"), (memoryview(b"ab"), b"ab")],
)  # fmt: skip
def test_photos_come_as_structs_or_bytes(value: Any, data: bytes) -> None:
    assert image_bytes(value) == data


def test_repairs_add_up_and_the_record_is_not_changed() -> None:
    record = Record("1", repairs=("a",))
    later = record.but("b", "c", label=1, split="val")
    assert (later.repairs, later.label, later.split, later.id) == (("a", "b", "c"), 1, "val", "1")
    assert (record.repairs, record.label, record.split) == (("a",), None, None)
