"""The comparison on photographs: which photos, how many of them, the plain classifier, and the paired difference."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import photographs
from benchmarks.fairness import pretrained_lite0
from benchmarks.photographs import Plain, budget, difference, main, photos_of
from roadwork.data.sources import open_source
from roadwork.evaluation import metrics
from roadwork.models.backbone import Backbone
from roadwork.models.weights import LITE0, load, plan
from tests.data.photos import encode


def table(folder: Path, text: str) -> Path:
    path = folder / "photos.csv"
    path.write_bytes(text.encode())
    return path


@pytest.mark.parametrize(
    "text",
    [
        "path,label\na.jpg,1\nb.jpg,0\nc.jpg,\n",
        "\ufeffPath,Label\r\na.jpg,1\r\nb.jpg,0\r\nc.jpg,\r\n",
        "id,path,label\nx, a.jpg ,1.0\n y ,b.jpg, 0\nz,c.jpg,nan\nw,d.jpg,7\n",
    ],
)
def test_the_plain_classifier_learns_from_the_photos_that_the_line_reads(tmp_path: Path, text: str) -> None:
    """The same ids and labels as the source gives the line: whatever it accepts or rejects."""
    path = table(tmp_path, text)
    for name in "abcd":
        (tmp_path / f"{name}.jpg").write_bytes(encode(np.full((32, 32, 3), 90, np.uint8)))
    line = {record.id: record.label for record in open_source(f"csv:{path}") if record.label is not None}
    plain = photos_of(path)
    assert {name: label for name, (_, label) in plain.items()} == line
    assert all(photo.is_file() for photo, _ in plain.values())


def test_the_budget_is_what_the_optimizer_saw_once_for_each_step(tmp_path: Path) -> None:
    """A run that was killed has some steps twice; the last line of each counts."""
    lines = [{"step": s, "samples_seen": 8 * s, "step_s": 0.5} for s in (1, 2, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert budget(tmp_path) == (24, 1.5)


def test_the_budget_holds_the_seconds_of_the_folds(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "samples_seen": 8, "step_s": 0.5}) + "\n")
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "dora_folds.json").write_text(json.dumps({"digest": "", "seconds": 20.25}))
    assert budget(tmp_path) == (8, 20.75)


def run(seed: int, gain: float, photos: int = 200, groups: int = 40) -> dict:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, photos)
    sides = {
        name: 1 / (1 + np.exp(-((2 * labels - 1) * strength + rng.normal(size=photos))))
        for name, strength in (("line", 0.8 + gain), ("plain", 0.8))
    }
    return {
        "seed": seed,
        "labels": labels.tolist(),
        "groups": [f"g{i % groups}" for i in range(photos)],
        **{name: values.tolist() for name, values in sides.items()},
    }


def test_the_difference_is_that_of_the_mcc_and_its_interval_holds_it() -> None:
    runs = [run(seed, 0.8) for seed in range(3)]
    found = difference(runs, resamples=200)
    by_hand = np.mean(
        [metrics.metric_value(r["labels"], r["line"]) - metrics.metric_value(r["labels"], r["plain"]) for r in runs]
    )
    assert found["difference"] == pytest.approx(by_hand, abs=1e-4) and found["low"] > 0
    assert found["low"] < found["difference"] < found["high"]
    assert found == difference(runs, resamples=200)


def test_equal_answers_differ_by_nothing() -> None:
    same = run(0, 0.0)
    same["line"] = same["plain"]
    assert difference([same], resamples=50) == {"difference": 0.0, "low": 0.0, "high": 0.0}


def test_whole_groups_are_drawn() -> None:
    """Groups of ten copies of a photo say as much as one photo each: the interval must not shrink."""
    once = run(1, 0.5, photos=60, groups=60)
    copied = {key: (list(np.repeat(value, 10)) if isinstance(value, list) else value) for key, value in once.items()}
    one, other = (difference([r], resamples=400) for r in (once, copied))
    assert other["high"] - other["low"] == pytest.approx(one["high"] - one["low"], abs=0.05)


def test_seeds_that_hold_the_same_photos_do_not_narrow_the_interval() -> None:
    """Five splits of one set of photos are not five sets."""
    split = run(1, 0.5)
    one, five = difference([split]), difference([split | {"seed": seed} for seed in range(5)])
    assert one == five
    others = [split | {"groups": [f"{seed}-{name}" for name in split["groups"]]} for seed in range(5)]
    assert np.diff(list(difference(others).values())[1:]) < 0.6 * (one["high"] - one["low"]), "other photos do"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A net of the same shape of output in place of the one of 1280 features, so that this takes a second."""

    def net() -> nn.Module:
        return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 1280), nn.ReLU())

    monkeypatch.setattr(photographs, "pretrained_lite0", net)


@pytest.fixture
def pictures(tmp_path: Path) -> tuple[list[Path], list[int]]:
    """A dozen pictures: orange below for roadwork, grey below for none, of several shapes and kinds."""
    rng = np.random.default_rng(0)
    paths, labels = [], []
    for i in range(12):
        height, width = [(60, 90), (90, 60), (64, 64)][i % 3]
        rgb = rng.integers(60, 120, (height, width, 3), dtype=np.uint8)
        if i % 2:
            rgb[height // 2 :] = (240, 120, 10)
        path = tmp_path / f"{i}.{'png' if i == 3 else 'jpg'}"
        path.write_bytes(encode(rgb, "PNG" if i == 3 else "JPEG"))
        paths.append(path)
        labels.append(i % 2)
    return paths, labels


def test_the_plain_classifier_learns_what_a_dozen_pictures_show(
    small: None, pictures: tuple[list[Path], list[int]]
) -> None:
    paths, labels = pictures
    plain = Plain(paths, labels, seed=0)
    assert plain.photos.shape == (12, 3, 256, 256) and plain.photos.dtype == torch.uint8
    untrained = plain.predict(paths)
    trained = plain.fit(decoded=16 * 12, seconds=1e9).predict(paths)
    assert plain.decoded == 16 * 12
    assert trained.shape == (12,) and trained.dtype == np.float64 and ((trained >= 0) & (trained <= 1)).all()
    assert ((trained > 0.5) == np.array(labels)).mean() >= 11 / 12
    assert not np.allclose(trained, untrained)
    assert np.array_equal(trained, plain.predict(paths)), "prediction has no randomness"


@pytest.mark.parametrize(("decoded", "seen"), [(1, 16), (16, 16), (17, 32), (100, 112)])
def test_it_sees_as_many_photos_as_the_line_in_whole_batches(
    small: None, pictures: tuple[list[Path], list[int]], decoded: int, seen: int
) -> None:
    assert Plain(*pictures, seed=0).fit(decoded, seconds=1e9).decoded == seen


def test_time_ends_it_before_the_photos_do_and_it_says_how_many_it_saw(
    small: None, pictures: tuple[list[Path], list[int]]
) -> None:
    cut = Plain(*pictures, seed=0).fit(decoded=10**9, seconds=1e-6)
    assert 0 <= cut.decoded <= 16


def test_the_plain_net_starts_where_the_line_starts() -> None:
    """Weights, input scale and batch-norm epsilon are the trainer's own."""
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    recipe = plan(LITE0, "auto")
    line = Backbone(recipe, view_size=64)
    load(line.net, recipe, "auto")
    with torch.inference_mode():
        expected, found = line.eval()(pixels)[0], pretrained_lite0()(pixels)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_finished_seeds_are_kept_and_the_last_line_is_the_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = table(tmp_path, "path,label\na.jpg,1\n")
    for seed in (0, 1):
        made = run(seed, 0.5) | {"line_mcc": 0.6, "plain_mcc": 0.4 + seed / 10}
        (tmp_path / f"seed-{seed}.json").write_text(json.dumps(made))
    assert main(["--csv", str(source), "--out", str(tmp_path), "--splits", "2", "--json"]) == 0
    printed = capsys.readouterr().out.strip().splitlines()
    found = json.loads(printed[-1])
    assert len(printed) == 1 and (found["benchmark"], found["splits"]) == ("photographs", 2)
    assert found["line_mcc"] == 0.6 and found["plain_mcc"] == 0.45
    assert found["low"] <= found["difference"] <= found["high"] and math.isfinite(found["difference"])


def test_a_missing_table_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(["--csv", str(tmp_path / "absent.csv"), "--out", str(tmp_path)])
    assert error.value.code == 2 and "no such file" in capsys.readouterr().err
