"""The page: what it holds, what it says when parts are missing, and what a real browser makes of it."""

import html
import json
import re

import numpy as np
import pytest
import yaml

from roadwork.data.index import ShardIndex
from roadwork.evaluation import plots
from roadwork.evaluation.assess import WHAT, evaluate
from roadwork.evaluation.challenge import draw_challenges, standing
from roadwork.evaluation.figures import evaluation_figures, uncalibrated
from roadwork.evaluation.report import collect, curves, number, read_probabilities, write_report
from roadwork.losses import TERMS
from tests.evaluation.browser import look
from tests.evaluation.fake_run import build_run, build_shards, probabilities

FIGURES = (
    "MCC and interval of each system", "Loss and its terms", "Validation MCC with its interval", "Learning rate",
    "Gradient norm", "Images per second", "Waiting for data", "Map of draws and target region", "Confusion table",
    "Reliability diagram", "Precision against recall",
)  # fmt: skip
"""In the order of the page; photos of the worst errors follow."""
PARTS = ("systems", "training", "answers", "where", "worst", "masks", "challenge", "data", "run")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(run folder with evaluation, scored index, training index)."""
    folder = tmp_path_factory.mktemp("report")
    shards = build_shards(folder / "shards")
    run = build_run(folder / "run", shards)
    scored, train = ShardIndex.open(shards, "test"), ShardIndex.open(shards, "train")
    chosen = read_probabilities(run / "predictions.csv")
    systems = {"ensemble": chosen, "pretrained": probabilities(scored, 0.5, 1)}
    systems |= {"image_only": probabilities(scored, 0.4, 2), "image_only_224": probabilities(scored, 0.2, 3)}
    result = evaluate(scored, systems, "ensemble", train=train, resamples=100, centres=scored.manifest["clusters"])
    (run / "evaluation.json").write_text(json.dumps(result))
    return run, scored, train


def text_of(page):
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page)))


def test_the_result_and_its_interval_come_first(made):
    run, scored, train = made
    page = write_report(run, scored=scored, train=train).read_text()
    result = json.loads((run / "evaluation.json").read_text())["systems"][0]
    text = text_of(page[page.index("<header>") :])
    expected = (
        f"MCC {result['mcc']:.3f} 95 % interval {result['mcc_interval'][0]:.3f} to {result['mcc_interval'][1]:.3f}"
    )
    assert text.index(expected) < 120
    rows = {row["name"]: row for row in json.loads((run / "evaluation.json").read_text())["systems"]}
    for name, words in (("image_only", "as the service runs it"), ("image_only_224", "as the challenge sends it")):
        mcc, (low, high) = rows[name]["mcc"], rows[name]["mcc_interval"]
        assert f"{words}: MCC {mcc:.3f} ({low:.3f} to {high:.3f})" in text
    assert "10 held-out groups" in text and "Backbone weights: random" in text
    assert "Nothing was fitted on this split." in text
    assert re.findall(r'<h2 id="(\w+)">', page) == list(PARTS) and page.index("<h1>Result</h1>") < page.index("<h2 ")


def run_that_scored(made, folder, split):
    """A run folder with the configuration of `made`, and its evaluation as if it were of `split`."""
    evaluation = json.loads((made[0] / "evaluation.json").read_text()) | {"split": split}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    (folder / "config.yaml").write_text((made[0] / "config.yaml").read_text())
    return folder


@pytest.mark.parametrize(
    ("split", "told", "groups"),
    [
        ("val", "This split chose the weights", "of 10 held-out groups"),
        ("train", "was trained on this", "of 10 groups"),
    ],
)
def test_a_split_that_had_a_part_in_the_run_is_told(made, tmp_path, split, told, groups):
    run = run_that_scored(made, tmp_path, split)
    (tmp_path / "link").symlink_to(made[1].folder)
    for shards in (None, made[1].folder, tmp_path / "link"):
        text = text_of(write_report(run, shards=shards).read_text())
        assert told in text and "are optimistic" in text and "Nothing was fitted" not in text and groups in text


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_nothing_is_claimed_of_the_photos_of_other_shards(made, tmp_path, split):
    run = run_that_scored(made, tmp_path, split)
    for foreign, configured in ((tmp_path / "elsewhere", True), (made[1].folder, False)):
        if not configured:
            (run / "config.yaml").unlink()
        text = text_of(write_report(run, shards=foreign).read_text())
        assert "It is not known whether training saw these photos." in text and "of 10 groups" in text
        assert "trained on this split" not in text and "Nothing was fitted on this" not in text
        assert "This split chose" not in text


def sizes_on_the_map(train, weighted):
    figure = evaluation_figures(None, {}, None, None, train, None, weighted)["map"]
    return figure.axes[0].collections[0].get_sizes()


def test_the_map_is_of_the_draws_that_the_run_makes(made, tmp_path):
    run, _, train = made
    assert len(set(sizes_on_the_map(train, True))) > len(set(sizes_on_the_map(train, False))) == 1
    config = yaml.safe_load((run / "config.yaml").read_text())
    shown = []
    for weighted in (True, False):
        config["data"]["gps_weighted"] = weighted
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        shown.append(collect(tmp_path, train=train)["figures"]["map"])
    assert shown[0] != shown[1]


def test_every_part_is_there_with_its_figures(made):
    run, scored, train = made
    page = write_report(run, scored=scored, train=train).read_text()
    text = text_of(page)
    pictures = re.findall(r'<img src="data:image/png;base64,[^"]+" alt="([^"]+)"', page)
    assert pictures == list(FIGURES)
    for wanted in (
        "no pixels: GPS", "Ensemble of folds is on", "FOODS test-time augmentation is off", "0.050 (0.010 to 0.090)",
        "These give the label away: description (missing)", "1 records were rejected", "truncated_image 1",
        "1 samples could not be read", "training.learning_rate", "checkpoints/step-00000030", "Not simulated",
        "within 50 km 0.720 0.300 0.700", "Validation MCC with its interval",
        "are optimistic: the network below", "48 photos of 12 groups of split val", "a share of roadwork of 50.0 %",
        "ensemble 0.360 0.610 0.510 to 0.710 0.330 0.050 0.900 0.400 1.500 -0.300",
        "pretrained 0.270 0.520 0.420 to 0.620 0.330 0.050 0.900 0.400 0.900 -0.300",
    ):  # fmt: skip
        assert wanted in text, wanted
    assert "<b>broken</b>" not in page and "&lt;b&gt;broken&lt;/b&gt;" in page
    errors = json.loads((run / "evaluation.json").read_text())["errors"]["worst"]
    assert page.count("data:image/jpeg") == sum(len(kind) for kind in errors.values()) > 0
    assert "nan" not in text.lower().split()


def test_what_went_wrong_in_training_is_counted_and_the_newest_spikes_are_named(made):
    text = text_of(write_report(made[0]).read_text())
    assert "Samples skipped: 2. Steps skipped for a gradient that was not finite: 2. Losses that stood out: 7." in text
    named = re.findall(r"step (\d+): 9\.500, usual 0\.250; photos ([^ ]+), ", text)
    assert named == [(str(step), f"spiky-{step}-0") for step in (26, 25, 24, 23, 22)]
    assert "spiky-26-7 and 2 more" in text and "spiky-26-8" not in text


def test_options_and_decisions_are_shown_to_the_last_digit(made, tmp_path):
    config = yaml.safe_load((made[0] / "config.yaml").read_text())
    config["training"] |= {"ema_decay": 0.9999, "learning_rate": 0.0015}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "predict_details.json").write_text(json.dumps({"calibration": {"temperature": 1.0004}}))
    text = text_of(write_report(tmp_path).read_text())
    for wanted in ("training.ema_decay 0.9999 ", "training.learning_rate 0.0015 ", "calibration.temperature 1.0004 "):
        assert wanted in text, wanted


def test_the_page_needs_nothing_from_outside(made):
    run, scored, train = made
    page = write_report(run, scored=scored, train=train).read_text()
    links = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert links and all(link.startswith(("data:", "#")) for link in links)
    assert "<script" not in page and "http" not in re.sub(r"data:[^\"]*", "", page)


def test_an_empty_folder_gives_a_page_that_says_what_is_missing(tmp_path):
    page = write_report(tmp_path / "nothing").read_text()
    text = text_of(page)
    for wanted in ("No result yet", "No predictions have been scored", "No metrics.jsonl", "No checkpoints", "No folds",
                   "No config.yaml", "No manifest.json", "No rejected.jsonl", "No pseudo-masks were made",
                   "whether training skipped samples is not known"):  # fmt: skip
        assert wanted in text, wanted
    assert "No sample was skipped" not in text, "nobody has trained"


@pytest.mark.parametrize(
    ("missed", "told"),
    [(0, "No sample was skipped in training."), (3, "Samples skipped in training: 3; no skipped.jsonl names them.")],
)
def test_skipped_samples_are_denied_only_by_the_metrics(tmp_path, missed, told):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 0.5, "skipped_samples": missed}) + "\n")
    assert told in text_of(write_report(tmp_path).read_text())


@pytest.mark.parametrize(
    ("missed", "told"),
    [(200, "200 samples could not be read in training "),
     (1234, "1,234 samples could not be read in training; the first 200: ")],
)  # fmt: skip
def test_many_skipped_samples_are_all_counted_and_the_first_are_named(tmp_path, missed, told):
    lines = [json.dumps({"id": f"torn-{k:04d}"}) for k in range(missed)]
    (tmp_path / "skipped.jsonl").write_text("\n".join(lines) + "\n")
    text = text_of(write_report(tmp_path).read_text())
    assert f"{told}torn-0000" in text and "torn-0199" in text and "torn-0200" not in text


def test_every_term_that_the_run_has_is_drawn_with_its_loss(monkeypatch):
    drawn = {}
    monkeypatch.setattr(plots, "curves_figure", lambda lines, names, unit: drawn.setdefault(unit, names) and None)
    lines = [{"step": step, "lr": 0.1} | dict.fromkeys(TERMS, 0.25 * step) for step in (0, 1)]
    curves([line | {"segmentation": 0.0} for line in lines])
    assert drawn["loss"] == [term for term in TERMS if term != "segmentation"]
    assert {"view", "view_labels", "balance"} <= set(drawn["loss"])


def test_a_system_keeps_its_capitals_at_the_head_of_the_page(made, tmp_path):
    evaluation = json.loads((made[0] / "evaluation.json").read_text())
    evaluation["systems"][0]["what"] = WHAT["ensemble_tta"]
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    assert "Ensemble with FOODS test-time augmentation, on 40 photos" in text_of(write_report(tmp_path).read_text())


def test_damaged_files_do_not_stop_it(made, tmp_path):
    for name in ("evaluation.json", "config.yaml", "predict_details.json", "metrics.jsonl", "predictions.csv"):
        (tmp_path / name).write_text("{torn")
    assert "No result yet" in write_report(tmp_path).read_text()


def test_what_lies_beside_remote_shards_is_read(made, tmp_path):
    run, scored, _ = made
    (tmp_path / "rejected.jsonl").write_text('{"row": 3, "reason": "no_image"}\n')
    (tmp_path / "manifest.json").write_text((scored.folder / "manifest.json").read_text())
    content = collect(run, shards=f"file://{tmp_path}")
    assert content["manifest"] == scored.manifest and content["rejected"]["reasons"] == [("no_image", 1)]
    assert collect(run, shards="file:///nowhere")["manifest"] is None


def test_without_indexes_and_predictions_the_rest_is_there(made):
    run, _, _ = made
    text = text_of(write_report(run).read_text())
    assert "photo not at hand" in text and "No labelled predictions at hand" in text and "95 % interval" in text


def test_undoing_the_calibration():
    odds = np.array([-2.0, 0.0, 3.0])
    probability = 1 / (1 + np.exp(-(odds / 1.5 - 0.3)))
    before = uncalibrated(probability, {"calibration": {"temperature": 1.5, "bias": -0.3}})
    assert before == pytest.approx(1 / (1 + np.exp(-odds)))
    assert uncalibrated(probability, None) is None


def test_figures_survive_one_class_and_nothing():
    for labels in ([], [1, 1]):
        values = [0.3, 0.9][: len(labels)]
        for draw in (plots.confusion_figure, plots.reliability_figure, plots.precision_recall_figure):
            assert plots.png(draw(np.array(labels), np.array(values)))[:4] == b"\x89PNG"
    assert plots.curves_figure([], ["loss"], "loss") is None
    assert plots.map_figure([np.nan], [np.nan], [1.0]) is None


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1200])
def test_a_real_browser_loads_every_picture_without_an_error(made, tmp_path, width):
    run, scored, train = made
    look(write_report(run, scored=scored, train=train), tmp_path, width)


@pytest.mark.parametrize("place", ["challenge.json", "evaluation.json"])
def test_a_standing_is_shown_whichever_stage_simulated_it(made, tmp_path, place):
    rng = np.random.default_rng(0)
    questions = draw_challenges([np.array([0, 1] * 8)], 120, seed=0)
    asked = standing(rng.random(120), questions, None, 16, synthetic=False, bootstrap=20, seed=0)
    evaluation = json.loads((made[0] / "evaluation.json").read_text())
    if place == "evaluation.json":
        evaluation["challenge"] = asked
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    of = {"split": "test", "shards": str(made[1].folder.resolve())}
    (tmp_path / "challenge.json").write_text(json.dumps(asked | of if place == "challenge.json" else {"mcc": 9}))
    page = write_report(tmp_path, shards=made[1].folder).read_text()
    text = text_of(page[page.index('<h2 id="challenge">') : page.index('<h2 id="data">')])
    low, high = asked["mcc_interval"]
    assert f"MCC {asked['mcc']:.3f} ({low:.3f} to {high:.3f}), accuracy {asked['accuracy']:.3f}, reward" in text
    assert "over 120 simulated rounds: real half only." in text and "Not simulated" not in text
    for level in asked["levels"]:
        assert f"{level['level']} {level['n']} {number(level['mcc'])} {number(level['accuracy'])}" in text


@pytest.mark.parametrize("of", [{}, {"split": "val"}, {"shards": "/elsewhere"}])
def test_a_standing_on_other_photos_is_not_shown(made, tmp_path, of):
    """`of`: where challenge.json differs from what the evaluation is of; {}: it does not say what it is of."""
    own = {"split": "test", "shards": str(made[1].folder.resolve())} | of if of else {}
    (tmp_path / "challenge.json").write_text(json.dumps({"mcc": 0.123} | own))
    (tmp_path / "evaluation.json").write_text((made[0] / "evaluation.json").read_text())
    assert "Not simulated on this split" in text_of(write_report(tmp_path, shards=made[1].folder).read_text())


FAIRNESS = {
    "photos": 720, "histogram_mcc": 0.36, "global_mcc": 0.51, "tiles_mcc": 0.72, "metadata_mcc": 0.12,
    "gate_histogram": False, "gate_tiles": True,
    "runs": [
        {
            "object_height_px_quantiles_10_50_90": [14, 40, 118], "objects_per_positive": 3.1,
            "lookalikes_per_positive": 4.2, "lookalikes_per_negative": 4.4,
        }
    ],
}  # fmt: skip


def test_the_fairness_of_the_embedded_benchmark_is_shown_with_its_verdict(made, tmp_path):
    (tmp_path / "fairness.json").write_text(json.dumps(FAIRNESS))
    text = text_of(write_report(tmp_path).read_text())
    assert "logistic regression 0.360 under 0.35: FAILS" in text
    assert "the same net on tiles 0.720 at least 0.10 above one view: holds" in text
    assert "14, 40, 118 px high" in text and "measured on" not in text
    assert "embedded benchmark fair" not in text_of(write_report(made[0]).read_text())


def test_without_an_own_measurement_the_dated_fairness_stands_there_for_drawn_photos_only(tmp_path, monkeypatch):
    monkeypatch.setattr("roadwork.evaluation.report.RESULTS", tmp_path)
    record = {"name": "fairness", "date": "2026-02-03", "commit": "abc", "figures": FAIRNESS}
    (tmp_path / "2026-02-03-fairness.json").write_text(json.dumps(record))
    for spec, shown in (("street:40", True), ("csv:photos.csv", False)):
        (tmp_path / "manifest.json").write_text(json.dumps({"source": {"spec": spec}}))
        text = text_of(write_report(tmp_path, shards=tmp_path).read_text())
        assert ("measured on 2026-02-03 at commit abc" in text) == shown
