"""The replicated challenge at its edges: windows, drawn questions, pictures of every kind, tables as people write them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import matthews_corrcoef

from roadwork.errors import UserError
from roadwork.evaluation import challenge
from roadwork.evaluation.challenge import (
    Challenge,
    ask,
    degrade,
    draw_challenges,
    moving_score,
    open_picture,
    read_synthetic,
    reward,
    rewards,
    square_crop,
    standing,
    window_accuracy,
    window_mcc,
)

given_answers = st.lists(
    st.tuples(st.one_of(st.floats(0, 1), st.just(-1.0)), st.integers(0, 1)), min_size=1, max_size=130
)


@settings(max_examples=80)
@given(given_answers)
def test_a_reward_is_a_share_and_the_windows_hold_what_they_say(rows: list[tuple[float, int]]) -> None:
    values, truth = np.array([p for p, _ in rows]), np.array([y for _, y in rows])
    found = reward(values, truth)
    assert 0 <= found <= 1
    assert found == reward(values[-100:], truth[-100:]), "nothing before the last hundred may count"
    if values[-1] == -1:
        assert found == 0
    answered = values != -1
    mcc, accuracy = window_mcc(values, truth), window_accuracy(values, truth)
    if len(set(truth[answered])) == 2:
        assert mcc == pytest.approx(max(0, matthews_corrcoef(truth[answered], np.round(values[answered]))))
    else:
        assert mcc == 0
    assert 0 <= accuracy <= 1


def test_rewards_after_each_answer_are_those_of_every_beginning() -> None:
    rng = np.random.default_rng(0)
    values, truth = rng.random(30), rng.integers(0, 2, 30)
    assert rewards(values, truth).tolist() == [reward(values[:k], truth[:k]) for k in range(1, 31)]
    assert rewards(np.zeros(0), np.zeros(0)).shape == (0,) and reward([], []) == 0.0


@settings(max_examples=60)
@given(st.lists(st.floats(0, 1), max_size=60), st.floats(0, 1))
def test_the_smoothed_score_stays_between_its_start_and_its_rewards(values: list[float], start: float) -> None:
    score = moving_score(values, start=start)
    assert min([start, *values]) - 1e-12 <= score <= max([start, *values]) + 1e-12
    if values:
        assert score == pytest.approx(0.05 * values[-1] + 0.95 * moving_score(values[:-1], start=start))


@settings(max_examples=60)
@given(st.integers(1, 600), st.integers(1, 600), st.integers(0, 1000))
def test_a_crop_is_a_square_inside_the_photo(height: int, width: int, seed: int) -> None:
    top, left, side = square_crop(height, width, np.random.default_rng(seed))
    assert side > 0 and 0 <= top <= height - side and 0 <= left <= width - side


@settings(max_examples=40)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(0, 3), st.integers(0, 100))
def test_a_photo_of_any_shape_is_sent_as_a_square(height: int, width: int, level: int, seed: int) -> None:
    photo = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    sent = degrade(photo, level, np.random.default_rng(seed), size=32)
    assert sent.shape == (32, 32, 3) and sent.dtype == np.uint8


@pytest.mark.parametrize(
    ("photo", "level", "words"),
    [
        (np.zeros((8, 8, 3), np.uint8), 4, "level must be 0 to 3, got 4"),
        (np.zeros((8, 8, 3), np.uint8), -1, "level must be 0 to 3"),
        (np.zeros((8, 8), np.uint8), 0, r"expected uint8 \[H, W, 3\]"),
        (np.zeros((8, 8, 4), np.uint8), 0, r"expected uint8 \[H, W, 3\]"),
        (np.zeros((8, 8, 3), np.float32), 0, "float32"),
    ],
)
def test_what_is_no_photo_or_level_is_named(photo: np.ndarray, level: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        degrade(photo, level, np.random.default_rng(0))


# ----------------------------------------------------------------------------------------------- questions


def test_questions_are_half_and_half_whatever_the_set_looks_like() -> None:
    real, generated = np.array([1] * 95 + [0] * 5 + [-1] * 20), np.array([0, 1, 1])
    asked = draw_challenges([real, generated], 4000, seed=3)
    assert np.mean([q.label for q in asked]) == pytest.approx(0.5, abs=0.03)
    assert np.mean([q.source for q in asked]) == pytest.approx(0.5, abs=0.03)
    for q in asked:
        assert (real, generated)[q.source][q.photo] == q.label and 0 <= q.level < 4
    assert asked == draw_challenges([real, generated], 4000, seed=3) != draw_challenges([real, generated], 4000, seed=4)


def test_a_class_that_one_source_lacks_is_asked_of_the_other() -> None:
    asked = draw_challenges([np.array([1, 1]), np.array([0])], 200, seed=0)
    assert {(q.source, q.label) for q in asked} == {(0, 1), (1, 0)}


def test_one_class_alone_is_asked_and_none_is_refused() -> None:
    assert {q.label for q in draw_challenges([np.ones(4, int)], 50, seed=0)} == {1}
    with pytest.raises(UserError, match="none of those given has a label of 0 or 1"):
        draw_challenges([np.full(4, -1)], 10, seed=0)


def photos(n: int = 6) -> list[np.ndarray]:
    return [np.random.default_rng(i).integers(0, 256, (40, 50, 3), dtype=np.uint8) for i in range(n)]


def test_any_sharing_out_of_the_questions_asks_the_same_pictures() -> None:
    questions = list(enumerate(draw_challenges([np.array([0, 1] * 3)], 20, seed=1)))

    def answer(pictures: list[np.ndarray]) -> list[float]:
        return [float(picture.mean()) / 255 for picture in pictures]

    whole = ask(answer, questions, [photos()], seed=1)
    for shares in (2, 3):
        parts = [ask(answer, questions[k::shares], [photos()], seed=1, batch=2) for k in range(shares)]
        joined = np.empty(20)
        for k, part in enumerate(parts):
            joined[k::shares] = part
        assert joined.tolist() == whole.tolist()


def test_answers_that_are_none_are_no_answers() -> None:
    questions = list(enumerate([Challenge(0, i, i % 2, 0) for i in range(4)]))
    found = ask(lambda pictures: [None, float("nan"), float("inf"), 0.25], questions, [photos(4)], seed=0)
    assert found.tolist() == [-1.0, -1.0, -1.0, 0.25]


def test_another_number_of_answers_than_pictures_is_refused() -> None:
    with pytest.raises(ValueError, match="gave 1 answers to 4 pictures"):
        ask(lambda pictures: [0.5], list(enumerate([Challenge(0, i, 0, 0) for i in range(4)])), [photos(4)], seed=0)


@pytest.mark.parametrize("fill", [-1.0, 2.0, 0.5, 0.0, 1.0])
def test_any_constant_answer_has_a_standing_without_nan(fill: float) -> None:
    questions = draw_challenges([np.array([0, 1] * 5)], 120, seed=2)
    found = standing(np.full(120, fill), questions, None, 10, False, 40, 2)
    json.dumps(found, allow_nan=False)
    assert found["mcc"] == 0.0 and 0 <= found["reward"] <= 1 and found["rounds"] == 120
    assert found["no_answer"] == (120 if fill == -1 else 0) and found["out_of_range"] == (120 if fill == 2 else 0)
    assert sum(level["n"] for level in found["levels"]) == 120


def test_a_standing_needs_an_answer_for_each_question() -> None:
    with pytest.raises(ValueError, match="expected 1 answers, one per question"):
        standing(np.zeros(2), [Challenge(0, 0, 1, 0)], None, 1, False, 10, 0)


# ------------------------------------------------------------------------------------------------- pictures


def encoded(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def test_pictures_of_every_form_are_one_array(tmp_path: Path) -> None:
    array = photos(1)[0]
    picture = Image.fromarray(array)
    (tmp_path / "a.png").write_bytes(encoded(picture))
    forms = [array, array.transpose(2, 0, 1), picture, encoded(picture), tmp_path / "a.png", str(tmp_path / "a.png")]
    for form in forms:
        found = open_picture(form)
        assert np.array_equal(found, array) and found.flags["C_CONTIGUOUS"]


def test_a_turned_picture_is_upright_and_grey_is_rgb() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert open_picture(encoded(Image.new("RGB", (40, 20)), "JPEG", exif=exif.tobytes())).shape == (40, 20, 3)
    assert open_picture(Image.new("L", (4, 4), 9)).tolist() == [[[9] * 3] * 4] * 4


@pytest.mark.parametrize("content", [None, b"", b"no picture"])
def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "a.jpg"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="a.jpg cannot be read: .*remove or replace it"):
        open_picture(path)


@pytest.mark.parametrize("text", ["path,label\na.jpg,0\nb.jpg,1\n", "\ufeffpath,label\r\na.jpg,0\r\nb.jpg,1\r\n"])
def test_a_table_of_generated_pictures_as_an_office_program_writes_it(tmp_path: Path, text: str) -> None:
    for name in "ab":
        (tmp_path / f"{name}.jpg").write_bytes(b"x")
    file = tmp_path / "t.CSV"
    file.write_bytes(text.encode())
    paths, labels = read_synthetic(file)
    assert [path.name for path in paths] == ["a.jpg", "b.jpg"] and labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "expected the header path,label"),
        (b"path,label\n", "expected the header path,label"),
        (b"file,label\na.jpg,1\n", "expected the header path,label"),
        (b"path,label\na.jpg,2\n", "label '2' of a.jpg; give 0"),
        (b"path,label\na.jpg\n", "label None of a.jpg"),
        (b"path,label\nabsent.jpg,1\n", "absent.jpg is not a file; paths are relative to the CSV"),
        (b"path,label\n,1\n", "is not a file"),
        (b"path,label\nM\xfcll.jpg,1\n", "not a CSV in UTF-8"),
    ],
)
def test_a_table_that_cannot_be_used_is_one_line(tmp_path: Path, data: bytes, words: str) -> None:
    (tmp_path / "a.jpg").write_bytes(b"x")
    file = tmp_path / "t.csv"
    file.write_bytes(data)
    with pytest.raises(UserError, match=words):
        read_synthetic(file)


def test_a_folder_of_generated_pictures_is_read_in_order_and_other_files_are_not(tmp_path: Path) -> None:
    for name in ("0/b.JPG", "0/a.png", "1/c.jpeg", "1/notes.txt", "2/d.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    paths, labels = read_synthetic(tmp_path)
    assert [path.name for path in paths] == ["a.png", "b.JPG", "c.jpeg"] and labels.tolist() == [0, 0, 1]
    with pytest.raises(UserError, match="no synthetic pictures in"):
        read_synthetic(tmp_path / "2")
    assert challenge.SIZE == 224
