"""Words and pictures made from result files, and the pure pieces of the benchmarks: no benchmark is run."""

from __future__ import annotations

import argparse
import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import build, results, run_all
from benchmarks.ablation_variants import BASE, CLAIMS, VARIANTS
from benchmarks.fairness import (
    Drawn,
    _balanced_threshold,
    _metadata,
    census,
    histogram_mcc,
    metadata_mcc,
    probe,
    view_boxes,
)
from benchmarks.headlines import HEADLINES
from benchmarks.loader_clock import WARM, measure
from benchmarks.order import count_errors, locality, weights_of
from benchmarks.results import commit, machine, newest, save
from benchmarks.tables import (
    BEGIN,
    END,
    ablation,
    block,
    claimed,
    consequence,
    figure,
    headlines,
    origin,
    picture,
    value,
    wanted,
)


def result(**changes: Any) -> dict[str, Any]:
    values = {
        "name": "order", "date": "2026-01-02", "commit": "abc", "command": "python -m benchmarks.order",
        "machine": {"gpu": None, "cores": 2, "processor": "a chip"},
        "figures": {line.key: 1234567.0 for line in HEADLINES if line.benchmark == "order"},
    }  # fmt: skip
    return values | changes


def claim(name: str, value: float, low: float, high: float, verdict: str) -> dict[str, Any]:
    auc = {"auc_value": value, "auc_low": low, "auc_high": high}
    facts = {
        "name": name,
        "what": f"{name} & more",
        "value": value,
        "low": low,
        "high": high,
        "seeds": 5,
        "mcc_without": 0.8,
    }
    return facts | auc | {"verdict": verdict, "claimed": "+5 %" if name == "ema" else ""}


ABLATION = result(
    name="ablation",
    figures={
        "test_photos": 300, "test_groups": 90, "mcc": 0.82,
        "rows": [claim("ema", 0.02, 0.01, 0.03, "helps"), claim("tta<b>", -0.04, -0.06, -0.02, "harms"),
                 claim("dora", 0.0, -0.05, 0.05, "not shown")],
    },
)  # fmt: skip


@pytest.mark.parametrize(
    ("low", "high", "found"),
    [
        (-0.01, 0.039, "excluded here"),
        (-0.01, 0.041, "not excluded"),
        (0.02, 0.2, "not excluded"),
        (0.041, 0.2, "holds here"),
    ],
)
def test_a_claim_is_held_to_its_smaller_number(low: float, high: float, found: str) -> None:
    row = claim("ema", (low + high) / 2, low, high, "not shown")
    assert claimed(row | {"claimed": "+5 to +7 %"}) == f"+5 to +7 %: {found}", "0.04 is 5 % of 0.8"
    assert claimed(row | {"claimed": ""}) == "none"


def test_where_a_figure_comes_from_is_told() -> None:
    assert origin(result()) == "2026-01-02, commit abc, 2 cores of a chip, `python -m benchmarks.order`"
    assert "an accelerator" in origin(result(machine={"gpu": "an accelerator", "cores": 2, "processor": ""}))


def test_headlines_are_shown_of_what_was_measured_and_a_lost_figure_is_named() -> None:
    lines = "\n".join(headlines({"order": result()}))
    assert lines.count("| 1,234,567 | order |") == sum(line.benchmark == "order" for line in HEADLINES) > 0
    assert "kornia" not in lines, "of a benchmark that has no result"
    kept = result()["figures"] | {"positions_per_s": None}
    del kept["worst_count_error_epoch"]
    text = "\n".join(headlines({"order": result(figures=kept)}))
    assert "positions per second" not in text and "furthest" not in text and "seconds to the first batch" in text
    assert "`positions_per_s` of order, `worst_count_error_epoch` of order" in text
    assert list(headlines({"order": result(figures={})}))[0].startswith("Not measured")


def test_a_figure_of_each_run_is_told_by_its_median() -> None:
    figures = {"low": 0.5, "runs": [{"seconds": s} for s in (3.0, 1.0, 9.0)]}
    assert value(figures, "runs.seconds") == 3.0 and value(figures, "low") == 0.5
    assert value(figures, "absent") is None and value({}, "runs.seconds") is None


@pytest.mark.parametrize(("given", "words"), [(1565059, "1,565,059"), (33.159, "33.2"), (0.0, "0"), (0, "0"), (7, "7")])
def test_a_figure_is_short(given: float, words: str) -> None:
    assert figure(given) == words


def test_without_results_the_block_says_so() -> None:
    assert block({}) == "No dated result lies in `benchmarks/results/` yet.\n"


def test_the_ablation_comes_first_and_claims_stand_beside_what_was_measured() -> None:
    text = block({"order": result(), "ablation": ABLATION})
    assert text.index("What each component is worth") < text.index("| measured |")
    row = next(line for line in ablation(ABLATION) if line.startswith("| ema"))
    assert row.startswith("| ema & more | +0.020 | +0.010 to +0.030 | +0.020 | +0.010 to +0.030 | 5 | helps | helps |")
    assert row.endswith("| on: it helps | +5 %: excluded here |") and "| none |" in text, (
        "a component without a claim says so"
    )
    assert "0.010 to 0.050 in MCC" in text, "what the run could have seen"


def test_what_was_not_measured_is_named() -> None:
    text = "\n".join(ablation(ABLATION))
    (line,) = [line for line in text.splitlines() if "not measured by this run" in line]
    assert all((f"`{claim.name}`" in line) == (claim.name not in ("ema", "dora")) for claim in CLAIMS)


@pytest.mark.parametrize(
    ("mcc", "auc", "words"),
    [
        ((0.01, 0.2), (-0.1, 0.1), "on: it helps"),
        ((-0.2, -0.01), (0.01, 0.1), "to be switched off: it harms"),
        ((-0.1, 0.1), (0.01, 0.1), "stays: it ranks better; "),
        ((-0.1, 0.1), (-0.1, -0.01), "stays: it ranks worse; "),
        ((-0.1, 0.1), (-0.1, 0.1), "stays: nothing shown; "),
    ],
)
def test_mcc_decides_about_a_default_and_auc_is_told(
    mcc: tuple[float, float], auc: tuple[float, float], words: str
) -> None:
    row = {"name": "ema", "value": 0.0, "low": mcc[0], "high": mcc[1], "auc_value": 0.0, "auc_low": auc[0]}
    assert consequence(row | {"auc_high": auc[1]}).startswith(words)


def test_the_picture_is_a_whole_svg_whose_marks_stand_in_order() -> None:
    root = ElementTree.fromstring(picture(ABLATION))
    assert root.tag.endswith("svg")
    width = float(root.attrib["viewBox"].split()[2])
    circles = [float(node.attrib["cx"]) for node in root.iter() if node.tag.endswith("circle")]
    assert len(circles) == 3 and circles[1] < circles[2] < circles[0] and all(0 < x < width for x in circles)
    texts = [node.text or "" for node in root.iter() if node.tag.endswith("text")]
    assert "tta<b> (harms)" in texts, "names are escaped, not dropped"
    middle = next(node for node in root.iter() if node.attrib.get("stroke-dasharray"))
    assert circles[2] == float(middle.attrib["x1"]), "a gain of 0 stands on the dashed line"


@pytest.mark.parametrize("readme", ["no markers", f"{BEGIN}\n{END}\n{BEGIN}\n{END}\n", f"{BEGIN}\nopen end"])
def test_a_readme_without_exactly_one_block_is_refused(readme: str) -> None:
    with pytest.raises(SystemExit, match="must hold one block"):
        wanted(readme, {})


def test_only_the_block_changes() -> None:
    readme = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    made = wanted(readme, {"order": result()})
    text = made[Path("README.md")]
    assert text is not None and text.startswith(f"before\n{BEGIN}\n") and text.endswith(f"{END}\nafter\n")
    assert "old" not in text and made[Path("docs/ablation.svg")] is None
    again = wanted(text, {"order": result()})
    assert again[Path("README.md")] == text, "writing twice changes nothing"


def test_results_are_kept_by_day_and_the_newest_counts(tmp_path: Path) -> None:
    path = save("order", {"rate": 1.5}, "a command", results.provenance(), tmp_path / "deep")
    record = json.loads(path.read_text())
    assert re.fullmatch(r"\d{4}-\d{2}-\d{2}-order\.json", path.name) and record["figures"] == {"rate": 1.5}
    assert {"processor", "cores", "memory_gib", "load", "gpu", "python", "torch"} <= set(record["machine"])
    (path.parent / "2001-01-01-order.json").write_text(json.dumps(result(date="2001-01-01")))
    (path.parent / "notes.json").write_text("not a result")
    assert newest(path.parent)["order"]["figures"] == {"rate": 1.5}
    with pytest.raises(ValueError, match="JSON compliant"):
        save("order", {"rate": float("nan")}, "a command", results.provenance(), tmp_path)


def test_the_machine_has_no_name_and_the_commit_is_short() -> None:
    import socket

    assert socket.gethostname() not in json.dumps(machine())
    assert re.fullmatch(r"[0-9a-f]{12}(\+changes)?|unknown", commit())


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"a": 1}\n', {"a": 1}),
        ('words\n{"a": 1}\n\n', {"a": 1}),
        ("", None),
        ("words", None),
        ("[1]", None),
        ("1", None),
    ],
)
def test_the_last_line_is_the_result_or_there_is_none(text: str, found: dict | None) -> None:
    assert run_all.last_json_line(text) == found


def test_folders_stand_where_a_benchmark_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    options = argparse.Namespace(run="runs/x", shards=None, quick=False, peers_venv=None)
    assert run_all.command("tta", options) == [
        "-m", "benchmarks.tta", "--run", "runs/x", "--shards", "runs/x/shards", "--json",
    ]  # fmt: skip
    assert "runs/x/model" in run_all.command("serve", options)
    quick = argparse.Namespace(run="runs/x", shards="elsewhere", quick=True, peers_venv="peers")
    assert "elsewhere" in run_all.command("folds", quick) and "peers" in run_all.command("loader", quick)
    assert "--quick" in run_all.command("ablation", quick)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "--profile" not in run_all.command("train_step", options)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert "--profile" in run_all.command("train_step", options)
    assert "518,512,128" in run_all.command("augment", options)
    assert run_all.names()[-1] == "ablation", "the long one is last"


def test_every_claim_compares_sides_that_differ() -> None:
    for one in CLAIMS:
        assert one.with_it != one.without and BASE in (one.with_it.variant, one.without.variant)
        assert {one.with_it.variant, one.without.variant} <= set(VARIANTS)
    assert len({one.name for one in CLAIMS}) == len(CLAIMS)


# ----------------------------------------------------------------------------------------- pieces of benchmarks


def test_count_errors_and_locality_are_what_the_order_promises() -> None:
    epoch, ten = count_errors(600, epochs=12)
    assert 0 < epoch < 1 and 0 < ten < 2
    found = locality(4096, per_shard=64, window=512)
    assert found["shards"] == 64 and found["shards_per_window_windowed"] < 0.4 * found["shards_per_window_global"]
    assert set(np.unique(weights_of(1000))) == {0.3, 1.0, 2.5, 5.0}


def test_the_clock_leaves_the_first_batches_out() -> None:
    taken = []

    class Views:
        dtype, shape = "torch.uint8", (4, 12, 3, 8, 8)

    def source() -> Any:
        for i in range(WARM + 5):
            taken.append(i)
            yield Views()

    rate, cpu = measure(source, batches=5, batch=4)
    assert len(taken) == WARM + 5 and rate > 0 and cpu >= 0


@pytest.mark.parametrize(("width", "height"), [(1280, 720), (640, 480), (800, 800)])
def test_tiles_of_the_fairness_gates_cover_the_photo(width: int, height: int) -> None:
    boxes = view_boxes(width, height)
    assert len(boxes) == 9 and boxes[0] == (0, 0, width, height)
    grid = np.zeros((height, width), bool)
    for x0, y0, x1, y1 in boxes[1:]:
        assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height and x1 - x0 == y1 - y0 == height // 2
        grid[y0:y1, x0:x1] = True
    assert grid.all() == (4 * (height // 2) >= width)


def drawn(i: int, tells: str) -> Drawn:
    rng = np.random.default_rng(i)
    label = i % 2
    histogram = rng.random(512)
    if tells == "colour":
        histogram[:20] += 3 * label
    weather = ("Sunny" if label else "Rain") if tells == "weather" else str(rng.choice(["Sunny", "Rain", "Snow"]))
    row = {
        "gps": f"[{rng.normal()}, {rng.normal()}]" if i % 5 else None,
        "scene_level_tags.weather": f"['{weather}']",
        "scene_level_tags.daytime": "Light",
        "scene_level_tags.scene_environment": "Urban",
    }
    objects = (("cone", 0, 30.0 + i, 200),) * label + (("bench", None, 40.0, 100), ("car_side", None, 80.0, 500))
    return Drawn(label, "train", f"g{i // 4}", histogram / histogram.sum(), row, objects, np.zeros(0), np.zeros(9))


@pytest.mark.parametrize(("gate", "tells"), [(histogram_mcc, "colour"), (metadata_mcc, "weather")])
def test_each_gate_sees_what_is_planted_and_little_in_noise(gate: Any, tells: str) -> None:
    def score(what: str) -> float:
        return gate([drawn(i, what) for i in range(120)], [drawn(i, what) for i in range(200, 320)])

    assert score(tells) > 0.8 and score("nothing") < 0.35


def test_metadata_without_a_place_or_a_known_word() -> None:
    blank = drawn(0, "nothing")
    blank.row = dict.fromkeys(blank.row, "Unknown") | {"gps": None}
    values = _metadata(blank)
    assert np.isnan(values[:2]).all() and not any(values[2:])


def test_the_census_counts_objects_and_lookalikes() -> None:
    found = census([drawn(i, "nothing") for i in range(10)])
    assert found["objects_per_positive"] == 1.0
    assert found["lookalikes_per_positive"] == found["lookalikes_per_negative"] == 1.0, "cars are traffic"
    assert found["object_height_px_by_class"] == {"cone": [32, 35, 38]}


def test_the_threshold_parts_separable_scores_whatever_the_prior() -> None:
    labels = np.array([1] * 90 + [0] * 10)
    scores = np.where(labels == 1, 2.0, -2.0) + np.linspace(-0.5, 0.5, 100)
    assert -1.5 < _balanced_threshold(labels, scores) < 1.5


def test_a_probe_finds_the_view_that_shows_it() -> None:
    import torch

    rng = np.random.default_rng(0)
    y = np.arange(160) % 2
    pixels = np.zeros((160, 4), int)
    pixels[y == 1, rng.integers(0, 4, 80)] = 500
    x = torch.from_numpy(rng.normal(size=(160, 4, 6)).astype(np.float32))
    x[..., 0] += torch.from_numpy(8.0 * (pixels > 0)).float()
    scores = probe(x[:100], pixels[:100], y[:100], np.arange(100) // 2, x[100:])
    assert ((scores > 0) == (y[100:] == 1)).mean() > 0.9


def test_a_build_is_set_beside_bare_decoding_and_encoding():
    found = build.run(photos=24, view_size=64, rounds=1)
    assert found["ratio"] == pytest.approx(2 * found["ours"] / (found["limit_before"] + found["limit_after"]), rel=0.01)
    assert found["drawn"] > 0 and found["photos"] == 24
