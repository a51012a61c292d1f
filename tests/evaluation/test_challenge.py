"""The service's scoring and pictures, on cases computed by hand."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from roadwork.errors import UserError
from roadwork.evaluation import challenge


def street(height=120, width=200, seed=0):
    return np.random.default_rng(seed).integers(0, 256, size=(height, width, 3), dtype=np.uint8)


# --- scoring


def test_perfect_answers_earn_one():
    labels = [0, 1] * 50
    assert challenge.reward(labels, labels) == 1.0


def test_reward_by_hand():
    # 100 answers, balanced, 5 wrong of each class: MCC 0.9; of the last 10 one is wrong: accuracy 0.9
    labels = np.array([0, 1] * 50)
    answers = labels.astype(float).copy()
    answers[[0, 1, 2, 3, 4, 5, 6, 7, 8, 99]] = 1 - answers[[0, 1, 2, 3, 4, 5, 6, 7, 8, 99]]
    assert challenge.window_mcc(answers, labels) == pytest.approx(0.8)
    assert challenge.window_accuracy(answers[-10:], labels[-10:]) == 0.9
    assert challenge.reward(answers, labels) == pytest.approx(((0.8 + 0.9) / 2) ** 3)


def test_only_the_last_100_and_the_last_10_count():
    labels = [0, 1] * 100
    wrong_first = [1 - label for label in labels[:100]] + labels[100:]
    assert challenge.reward(wrong_first, labels) == 1.0
    answers = list(map(float, labels))
    answers[-11] = 1 - answers[-11]
    assert challenge.window_accuracy(answers[-10:], labels[-10:]) == 1.0


def test_a_negative_mcc_counts_as_zero():
    labels = [0, 1] * 50
    assert challenge.window_mcc([1 - label for label in labels], labels) == 0.0
    assert challenge.reward([1 - label for label in labels], labels) == 0.0


def test_one_class_in_the_window_has_mcc_zero():
    assert challenge.window_mcc([1.0] * 20, [1] * 20) == 0.0
    assert challenge.reward([1.0] * 20, [1] * 20) == pytest.approx(0.5**3)


def test_no_answer_and_answers_outside_earn_nothing_now():
    labels = [0, 1] * 50
    for bad in (-1.0, -0.2, 1.2, float("nan")):
        assert challenge.reward([*map(float, labels[:-1]), bad], labels) == 0.0


def test_missing_answers_leave_the_window_but_keep_their_place():
    labels = [0, 1] * 10
    answers = [-1.0] * 10 + list(map(float, labels[10:]))
    assert challenge.window_accuracy(answers, labels) == 1.0
    assert challenge.window_accuracy([-1.0], [1]) == 0.0 and challenge.window_mcc([], []) == 0.0
    # 100 places: 90 unanswered and 10 right; older wrong answers are outside of the window
    long = [1.0] * 50 + [-1.0] * 90 + [float(i % 2) for i in range(10)]
    truth = [0] * 50 + [0] * 90 + [i % 2 for i in range(10)]
    assert challenge.window_mcc(long[-100:], truth[-100:]) == 1.0


def test_exactly_one_half_is_rounded_to_no():
    assert challenge.window_accuracy([0.5, 0.5], [0, 1]) == 0.5


def test_an_answer_of_two_is_wrong_for_either_class():
    assert challenge.window_accuracy([2.0, 2.0], [0, 1]) == 0.0
    assert challenge.window_mcc([2.0, 1.0, 0.0, 1.0], [0, 1, 0, 1]) < 1.0


def test_smoothing_by_hand():
    assert challenge.moving_score([1.0, 1.0]) == pytest.approx(0.05 + 0.95 * 0.05)


def test_known_accuracies_earn_the_published_rewards():
    # a simulation in the project's notes: accuracy .95 -> reward .79, .97 -> .87, .99 -> .96
    rng = np.random.default_rng(0)
    for accuracy, expected in ((0.95, 0.79), (0.97, 0.87), (0.99, 0.96)):
        labels = rng.integers(2, size=(400, 100))
        answers = np.where(rng.random(labels.shape) < accuracy, labels, 1 - labels).astype(float)
        mean = np.mean([challenge.reward(a, y) for a, y in zip(answers, labels, strict=True)])
        assert mean == pytest.approx(expected, abs=0.02)


# --- pictures


def test_every_level_gives_224_and_depends_on_the_seed_alone():
    photo = street()
    for level in range(4):
        a, b, c = (challenge.degrade(photo, level, np.random.default_rng(s)) for s in (1, 1, 2))
        assert a.shape == (224, 224, 3) and a.dtype == np.uint8
        assert (a == b).all()
        assert (a != c).any() or level == 0
    with pytest.raises(ValueError, match="level must be 0 to 3, got 4"):
        challenge.degrade(photo, 4, np.random.default_rng(0))


def test_level_0_is_the_centred_square():
    photo = np.zeros((100, 300, 3), dtype=np.uint8)
    photo[:, 100:200] = 200
    assert (challenge.degrade(photo, 0, np.random.default_rng(0)) == 200).all()


def test_rotation_has_black_corners_turns_counter_clockwise_and_does_not_blend():
    photo = np.full((101, 101, 3), 90, dtype=np.uint8)
    photo[50, 80] = 250
    turned = challenge.rotated(photo, 20)
    assert turned[0, 0].max() == 0 and turned[50, 50, 0] == 90
    assert set(np.unique(turned)) <= {0, 90, 250}
    ((row, column),) = np.argwhere(turned[..., 0] == 250)
    assert (row, column) == (round(50 - 30 * np.sin(np.radians(20))), round(50 + 30 * np.cos(np.radians(20))))


def test_crops_are_square_inside_and_span_the_stated_areas():
    rng = np.random.default_rng(0)
    crops = [challenge.square_crop(100, 110, rng) for _ in range(2000)]
    assert all(top >= 0 and top + side <= 100 and left >= 0 and left + side <= 110 for top, left, side in crops)
    shares = np.array([side**2 / 11000 for *_, side in crops])
    assert 0.19 < shares.min() < 0.22 and shares.max() > 0.88
    assert challenge.square_crop(10, 1000, rng) == (0, 495, 10)


def test_colour_steps_by_hand():
    photo = np.full((4, 4, 3), (200, 100, 50), dtype=np.uint8)
    luma = 0.299 * 200 + 0.587 * 100 + 0.114 * 50
    assert challenge.desaturated(photo, 0.4)[0, 0].tolist() == [int(luma + 0.4 * (v - luma)) for v in (200, 100, 50)]
    assert challenge.dimmed(photo, 0.85)[0, 0].tolist() == [170, 85, 42]


def test_resampling_loses_detail_and_keeps_the_mean():
    photo = street(224, 224)
    coarse = challenge.resampled(photo, 2)
    assert coarse.std() < 0.7 * photo.std() and coarse.mean() == pytest.approx(photo.mean(), rel=0.02)


def test_noise_has_the_stated_strength():
    grey = np.full((224, 224, 3), 128, dtype=np.uint8)
    grain = challenge.noisy(grey, 0.001, np.random.default_rng(0)).astype(float) - 128
    luma = grain @ np.array([0.299, 0.587, 0.114])
    assert luma.std() == pytest.approx(np.sqrt(0.001) * 255 * 255 / 219, rel=0.03)
    assert np.corrcoef(grain[..., 0].ravel(), grain[..., 2].ravel())[0, 1] < 0.6  # coloured, not grey


def test_blur_is_a_gaussian_of_a_sixth_of_its_kernel():
    point = np.zeros((31, 31, 3), dtype=np.uint8)
    point[15, 15] = 255
    spread = challenge.blurred(point, 7)[15, :, 0].astype(float)
    assert spread[16] / spread[15] == pytest.approx(np.exp(-1 / (2 * (7 / 6) ** 2)), abs=0.03)
    assert spread[15 + 4] == 0


def test_what_is_sent_is_a_jpeg_of_quality_75():
    sent = challenge.jpeg(street(224, 224))
    other = io.BytesIO()
    Image.fromarray(street(224, 224)).save(other, format="JPEG")
    assert sent == other.getvalue()


def test_level_3_uses_severities_0_to_2_and_level_2_only_0_and_1(monkeypatch):
    seen = {2: set(), 3: set()}
    for level in (2, 3):
        monkeypatch.setattr(challenge, "dimmed", lambda p, f, level=level: seen[level].add(f) or p)
        for seed in range(60):
            challenge.degrade(street(40, 40), level, np.random.default_rng(seed))
    assert seen == {2: {0.85}, 3: {0.85, 0.725}}


# --- standing


def coloured(n=60):
    """Photos that one colour tells apart, 4 to a group."""
    labels = np.arange(n) // 4 % 2
    return [np.full((64, 96, 3), 200 if y else 40, dtype=np.uint8) for y in labels], labels, np.arange(n) // 4


def test_a_perfect_model_stands_at_one_and_a_random_one_near_nothing():
    images, labels, groups = coloured()

    def perfect(pictures):
        return [float(p.mean() > 60) for p in pictures]

    standing = challenge.score_challenge(perfect, images, labels, seed=0, rounds=300, groups=groups, bootstrap=100)
    assert standing["mcc"] == 1.0 and standing["reward"] == 1.0 and standing["mcc_interval"] == [1.0, 1.0]
    assert standing["what"] == "real half only" and [level["n"] > 40 for level in standing["levels"]] == [True] * 4
    json.dumps(standing, allow_nan=False)
    rng = np.random.default_rng(0)
    chance = challenge.score_challenge(lambda p: rng.random(len(p)), images, labels, rounds=300, groups=groups)
    assert abs(chance["mcc"]) < 0.2 and chance["reward"] < 0.1
    assert chance["mcc_interval"][0] < chance["mcc"] < chance["mcc_interval"][1]


def test_the_same_seed_asks_the_same_pictures_in_any_batch():
    images, labels, groups = coloured()
    seen = []
    for batch in (7, 32):
        sent = []
        challenge.score_challenge(
            lambda p, sent=sent: sent.extend(p) or [0.5] * len(p), images, labels, 3, 50, groups, None, batch, 10
        )
        seen.append(np.stack(sent))
    assert (seen[0] == seen[1]).all()


def test_labels_are_asked_half_and_half_and_levels_evenly():
    questions = challenge.draw_challenges([np.array([1] * 80 + [0] * 20), np.array([0, 1])], 4000, 0)
    for name, share in (("label", 0.5), ("source", 0.5)):
        assert np.mean([getattr(q, name) for q in questions]) == pytest.approx(share, abs=0.03)
    assert np.bincount([q.level for q in questions]) / 4000 == pytest.approx([0.25] * 4, abs=0.03)


def test_unlabelled_and_one_class_sets_are_stated():
    images, _, _ = coloured(8)
    with pytest.raises(UserError, match="labelled pictures"):
        challenge.score_challenge(lambda p: [0.5] * len(p), images, [-1] * 8)
    standing = challenge.score_challenge(lambda p: [0.9] * len(p), images, [1] * 8, rounds=120, bootstrap=20)
    assert standing["labels"] == [1] and standing["mcc"] == 0.0 and standing["accuracy"] == 1.0


def test_synthetic_half_is_read_and_asked(tmp_path):
    for label in (0, 1):
        (tmp_path / str(label)).mkdir()
        Image.fromarray(street(seed=label)).save(tmp_path / str(label) / "a.png")
    synthetic = challenge.read_synthetic(tmp_path)
    images, labels, groups = coloured(8)
    standing = challenge.score_challenge(
        lambda p: [None] + [float("nan")] + [1.5] + [0.5] * (len(p) - 3), images, labels, 0, 100, groups, synthetic
    )
    assert standing["what"] == "real and synthetic halves" and standing["photos"] == 8
    assert standing["no_answer"] == 8 and standing["out_of_range"] == 4
    with pytest.raises(UserError, match="no synthetic pictures"):
        challenge.read_synthetic(tmp_path / "0")


def test_synthetic_half_may_be_a_table(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (40, 30)).save(tmp_path / name)
    table = tmp_path / "made.csv"
    table.write_text("path,label\na.png,1\nb.png,0\n")
    paths, labels = challenge.read_synthetic(table)
    assert [path.name for path in paths] == ["a.png", "b.png"] and labels.tolist() == [1, 0]
    for text, message in {
        "path,label\n": "no synthetic pictures",
        "file,label\na.png,1\n": "path,label",
        "path,label\na.png,yes\n": "label 'yes' of a.png",
        "path,label\nc.png,1\n": "c.png is not a file",
    }.items():
        table.write_text(text)
        with pytest.raises(UserError, match=message):
            challenge.read_synthetic(table)
