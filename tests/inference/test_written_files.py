"""predictions.csv and what stands beside it: one line per photo, numbers that read back to the last bit, folds in order."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from roadwork.config import Config
from roadwork.errors import UserError
from roadwork.evaluation.standing import standing_words
from roadwork.inference.calibration import Calibration
from roadwork.inference.collect import Answers
from roadwork.inference.ensemble import System
from roadwork.inference.members import fold_paths
from roadwork.inference.output import write_predictions
from roadwork.inference.parts import PartWriter, merge, open_parts, part_paths, read_parts
from roadwork.inference.plan import Plan
from roadwork.inference.transforms import LUMA, Transform, gaussian_blur, transforms
from roadwork.training.folds import check_finished

IDS = ["1", "a,b", 'with "quotes"', "line\nbreak", "東京/3", " blank "]


def plan(temperature: float = 1.0, bias: float = 0.0, **changes: Any) -> Plan:
    calibration = Calibration(temperature, bias)
    systems = {"pretrained": System("pretrained", calibration, np.zeros(0), {})}
    values: dict[str, Any] = {"chosen": "pretrained", "network": "pretrained", "details": {"chosen": "pretrained"}}
    values |= {"member_weights": np.array([1.0]), "temperature": math.inf, "systems": systems}
    values |= {"network_system": systems["pretrained"], "network_single_view": {}}
    return Plan(**(values | changes))


def answers(labels: list[int] | None = None, readable: list[bool] | None = None) -> Answers:
    n = len(IDS)
    log_odds = np.linspace(-3, 3, n)[:, None, None]
    return Answers(
        list(IDS), np.array(labels or [-1] * n), np.array([f"g{i}" for i in range(n)]), log_odds, log_odds[:, 0],
        None, None, np.array(readable or [True] * n),
    )  # fmt: skip


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"), newline="")))


def test_every_photo_has_its_line_whatever_it_is_called(tmp_path: Path) -> None:
    write_predictions(tmp_path, answers(), plan(0.7, -0.2), Config())
    found = rows(tmp_path / "predictions.csv")
    assert [row["id"] for row in found] == IDS and set(found[0]) == {"id", "probability", "prediction"}
    expected = Calibration(0.7, -0.2).probability(np.linspace(-3, 3, len(IDS)))
    assert [float(row["probability"]) for row in found] == expected.tolist(), "every bit must read back"
    assert [row["prediction"] for row in found] == ["1" if p > 0.5 else "0" for p in expected]


def test_labels_are_written_where_any_is_known(tmp_path: Path) -> None:
    write_predictions(tmp_path, answers([1, 0, -1, 1, -1, 0]), plan(), Config())
    for name in ("predictions.csv", "predictions_tta.csv"):
        assert [row["label"] for row in rows(tmp_path / name)] == ["1", "0", "", "1", "", "0"]


def test_a_photo_without_pixels_gets_the_prior_and_is_named(tmp_path: Path) -> None:
    config = Config()
    config.predict.prior = 0.3
    write_predictions(tmp_path, answers(readable=[True, False, True, True, True, False]), plan(), config)
    found = rows(tmp_path / "predictions.csv")
    assert [float(found[i]["probability"]) for i in (1, 5)] == [0.3, 0.3] and found[1]["prediction"] == "0"
    details = json.loads((tmp_path / "predict_details.json").read_text())
    assert details["unreadable"] == [IDS[1], IDS[5]] and details["photos"] == len(IDS)
    assert details["calibration"] == {"temperature": 1.0, "bias": 0.0} and details["kept_share"] is None


def test_what_foods_kept_is_written_photo_by_photo(tmp_path: Path) -> None:
    n, config = len(IDS), Config()
    config.predict.filter, config.predict.keep = "knn", "threshold"
    given_answers = answers()
    given_answers.log_odds = np.repeat(given_answers.log_odds, 3, axis=1)
    given_answers.distances = np.full((n, 3, 3), 0.5)
    given_answers.distances[:, 2, 1] = 3.0  # too far at one depth
    systems = {name: System(name, Calibration(), np.zeros(0), {}) for name in ("pretrained", "pretrained_tta")}
    write_predictions(tmp_path, given_answers, plan(systems=systems, chosen="pretrained_tta"), config)
    found = rows(tmp_path / "predictions_tta.csv")
    assert {row["kept"] for row in found} == {"110"} and {row["distance"] for row in found} == {"0.5"}
    why = rows(tmp_path / "predictions_distances.csv")
    assert [(row["id"], row["augmentation"]) for row in why] == [(name, str(a)) for name in IDS for a in range(3)]
    assert {(row["augmentation"], row["knn_depth_2"]) for row in why} == {("0", "0.5"), ("1", "0.5"), ("2", "3.0")}
    assert set(why[0]) == {"id", "augmentation", "kept", "knn_depth_1", "knn_depth_2", "mahalanobis"}
    for row in found:
        assert float(row["pretrained"]) == pytest.approx(float(row["pretrained_tta"]))
    assert json.loads((tmp_path / "predict_details.json").read_text())["kept_share"] == pytest.approx(2 / 3)
    write_predictions(tmp_path, answers(), plan(), config)
    assert not (tmp_path / "predictions_distances.csv").exists(), "nothing was augmented this time"


# ----------------------------------------------------------------------------------------------------- parts

ids = st.lists(st.text(min_size=1, max_size=8), unique=True, max_size=12)


@settings(max_examples=40)
@given(ids, st.integers(1, 4))
def test_any_ids_by_any_number_of_processes_merge_once(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], processes: int
) -> None:
    folder = tmp_path_factory.mktemp("parts")
    for rank in range(processes):
        with PartWriter(folder, "test", rank) as writer:
            for name in names[rank::processes]:
                writer.append([{"id": name, "log_odds": 0.1}])
    merged = merge(read_parts(folder, "test"), names, "split test")
    assert [record["id"] for record in merged] == names
    assert len(part_paths(folder, "test")) == processes


def test_parts_of_another_split_are_not_read(tmp_path: Path) -> None:
    for split in ("test", "test-8", "val"):
        with PartWriter(tmp_path, split, 0) as writer:
            writer.append([{"id": split}])
    assert set(read_parts(tmp_path, "test")) == {"test"}, "test-8 is the same split under more augmentations"


@pytest.mark.parametrize("line", ["[1, 2]", "3", '"text"', "{}", '{"name": "a"}'])
def test_a_line_that_is_no_record_is_named(tmp_path: Path, line: str) -> None:
    with PartWriter(tmp_path, "test", 0) as writer:
        writer.append([{"id": "a"}])
    path = part_paths(tmp_path, "test")[0]
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(UserError, match="line 2 is damaged; remove"):
        read_parts(tmp_path, "test")


def test_the_stamp_decides_whether_parts_are_continued(tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    assert open_parts(folder, "one") is False
    with PartWriter(folder, "test", 0) as writer:
        writer.append([{"id": "a"}])
    assert open_parts(folder, "one") is True and set(read_parts(folder, "test")) == {"a"}
    assert open_parts(folder, "two") is False and read_parts(folder, "test") == {}


# ----------------------------------------------------------------------------------------------------- folds


def fold(run: Path, number: int, wanted: int, base: str = "digest", complete: bool = True) -> None:
    path = run / "folds" / f"fold-{number}"
    path.mkdir(parents=True)
    (path / "fold.json").write_text(json.dumps({"base": base, "folds": {"num_folds": wanted}}))
    if complete:
        (path / "COMPLETE").touch()


def test_folds_are_found_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    assert fold_paths(tmp_path, "digest") == []
    for number in reversed(range(12)):
        fold(tmp_path, number, 12)
    assert [path.name for path in fold_paths(tmp_path, "digest")] == [f"fold-{i}" for i in range(12)]


def test_folds_that_are_not_all_there_are_refused(tmp_path: Path) -> None:
    fold(tmp_path, 0, 3)
    fold(tmp_path, 1, 3, complete=False)
    fold(tmp_path, 2, 3)
    with pytest.raises(UserError, match="has fold-0, fold-2 of 3 folds; run launch/dora_folds.py to finish them"):
        fold_paths(tmp_path, "digest")


def test_folds_of_which_none_is_finished_are_not_left_out_in_silence(tmp_path: Path) -> None:
    """A stage that was stopped in its first fold, or before it."""
    for make in (lambda: (tmp_path / "folds").mkdir(), lambda: fold(tmp_path, 0, 3, complete=False)):
        make()
        with pytest.raises(UserError, match="no finished fold; run launch/dora_folds.py .*--predict.ensemble off"):
            fold_paths(tmp_path, "digest")


def test_what_is_no_fold_is_passed_over(tmp_path: Path) -> None:
    fold(tmp_path, 0, 1)
    shutil.copytree(tmp_path / "folds" / "fold-0", tmp_path / "folds" / "fold-0.kept")
    (tmp_path / "folds" / "fold-0.lock").touch()
    assert [path.name for path in fold_paths(tmp_path, "digest")] == ["fold-0"]


@pytest.mark.parametrize(
    "content", ['{"base": "dig', "[]", '{"base": "digest"}', '{"base": "digest", "folds": {}}', None]
)
def test_a_damaged_fold_is_named(tmp_path: Path, content: str | None) -> None:
    fold(tmp_path, 0, 1)
    path = tmp_path / "folds" / "fold-0" / "fold.json"
    path.unlink() if content is None else path.write_text(content)
    for read in (lambda: fold_paths(tmp_path, "digest"), lambda: check_finished(tmp_path / "folds", 1, {})):
        with pytest.raises(UserError, match=r"fold-0/fold.json is damaged \(.*; remove .*fold-0 and run") as caught:
            read()
        assert "\n" not in str(caught.value)


def test_folds_of_other_weights_are_refused(tmp_path: Path) -> None:
    fold(tmp_path, 0, 1, base="older")
    with pytest.raises(UserError, match="was trained from other weights"):
        fold_paths(tmp_path, "digest")


# ------------------------------------------------------------------------------------------------- transforms


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 16), st.floats(0, 30), st.floats(0, 0.5))
def test_every_magnitude_stays_within_what_was_asked_for(seed: int, number: int, degrees: float, colour: float) -> None:
    made = transforms(number, seed, degrees, colour)
    assert len(made) == number and made[0] == Transform()
    for one in made:
        assert abs(one.degrees) <= degrees and abs(one.hue) <= degrees
        assert 1 - 1e-9 <= one.zoom <= 1 + colour + 1e-9 and 0 <= one.blur <= 1 / 256
        for factor in (one.brightness, one.contrast, one.saturation):
            assert 1 - colour - 1e-9 <= factor <= 1 + colour + 1e-9


def test_a_list_depends_on_its_seed_alone() -> None:
    assert transforms(16, 3) == transforms(16, 3) != transforms(16, 4)
    assert transforms(5, 3) == transforms(16, 3)[:5]


VIEWS = torch.rand(2, 3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
MASK = torch.ones(2, 3, dtype=torch.bool)


def test_the_identity_returns_the_very_views() -> None:
    assert Transform()(VIEWS, MASK) is VIEWS


def test_two_flips_are_none_and_a_flip_is_exact() -> None:
    flip = Transform(flip=True)
    assert torch.equal(flip(VIEWS, MASK), VIEWS.flip(-1)) and torch.equal(flip(flip(VIEWS, MASK), MASK), VIEWS)


@pytest.mark.parametrize(
    "one", [Transform(contrast=0.7), Transform(saturation=0.5), Transform(hue=20.0), Transform(blur=0.03)]
)
def test_grey_pictures_of_one_tone_are_left_alone(one: Transform) -> None:
    flat = torch.full((1, 2, 3, 16, 16), 0.4)
    torch.testing.assert_close(one(flat, MASK[:1, :2]), flat, atol=1e-5, rtol=0)


def test_padding_does_not_move_the_contrast() -> None:
    padded = torch.cat([VIEWS, torch.zeros(2, 2, 3, 32, 32)], 1)
    mask = torch.tensor([[True] * 3 + [False] * 2] * 2)
    one = Transform(contrast=1.3)
    torch.testing.assert_close(one(padded, mask)[:, :3], one(VIEWS, MASK))


def test_a_photo_is_changed_alike_whatever_stands_beside_it() -> None:
    for one in transforms(16, 7):
        together = one(VIEWS, MASK)
        torch.testing.assert_close(together[1:], one(VIEWS[1:], MASK[1:]), atol=1e-6, rtol=0)
        assert together.min() >= 0 and together.max() <= 1 and together.isfinite().all()


def test_colour_matrices_keep_luma_and_grey() -> None:
    luma = torch.tensor(LUMA)
    for one in (Transform(hue=25.0), Transform(saturation=0.3), Transform(hue=-10.0, saturation=1.4)):
        matrix = one.colour_matrix()
        torch.testing.assert_close(luma @ matrix, luma, atol=1e-4, rtol=0)
        torch.testing.assert_close(matrix @ torch.ones(3), torch.ones(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(Transform(brightness=1.2).colour_matrix(), 1.2 * torch.eye(3))


@pytest.mark.parametrize("sigma", [0.6, 2.0, 50.0])
def test_blur_keeps_the_mean_and_its_borders_reflect(sigma: float) -> None:
    blurred = gaussian_blur(VIEWS, sigma)
    assert blurred.shape == VIEWS.shape and blurred.isfinite().all()
    assert blurred.mean().item() == pytest.approx(VIEWS.mean().item(), abs=0.01)
    assert blurred.std() < VIEWS.std()


def test_the_standing_is_one_line() -> None:
    words = standing_words(
        {"what": "real half only", "mcc": 0.5, "accuracy": 0.75, "reward": 0.2, "reward_interval": [0.1, 0.31]}
    )
    assert words == "challenge (real half only): MCC 0.500, accuracy 0.750, reward 0.200 (0.100 to 0.310)"
