"""TensorBoard shows of the answers what the report shows."""

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from roadwork.config import Config
from roadwork.data.index import ShardIndex
from roadwork.evaluation.assess import evaluate
from roadwork.evaluation.errors import join
from roadwork.evaluation.events import breakdown_table, caption, write_events
from roadwork.evaluation.figures import evaluation_figures
from roadwork.monitoring.board import FINAL, Board
from tests.evaluation.fake_run import build_shards, probabilities

FIELDS = ("weather", "daytime", "scene", "city", "gps_cluster", "distance", "object_size")


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """(index, answers, evaluation)."""
    shards = build_shards(tmp_path_factory.mktemp("events") / "shards")
    index = ShardIndex.open(shards, "test")
    answers = probabilities(index, 0.4)
    systems = {"pretrained": answers, "image_only_224": probabilities(index, 0.1, 1)}
    found = evaluate(index, systems, "pretrained", resamples=20, centres=index.manifest["clusters"])
    return index, answers, found


def test_breakdowns_worst_errors_map_and_systems_are_there(scored, tmp_path):
    index, answers, found = scored
    figures = evaluation_figures(found, answers, None, index, index, index.manifest)
    write_events(tmp_path, found, join(index, answers), figures, Config(), "runs/x")
    events = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0}).Reload()
    wanted = {f"test_by/{field}" for field in FIELDS}
    wanted |= {f"test_worst/{kind}" for kind in ("false_positives", "false_negatives")}
    wanted |= {f"test/{name}" for name in ("confusion", "reliability", "recall", "systems")} | {"data/map_of_draws"}
    assert set(events.Tags()["images"]) == wanted
    assert "custom_scalars__config__" not in events.summary_metadata  # TensorBoard would add it to the training's
    for field in FIELDS:
        assert f"test_by/{field}/text_summary" in events.Tags()["tensors"]
    assert events.Scalars("final/mcc_image_only_224")[0].value == pytest.approx(found["systems"][-1]["mcc"])
    assert {"test/mcc_pretrained", "test/ece_image_only_224"} <= set(events.Tags()["scalars"])


def test_a_worst_error_says_whose_attention_it_shows(scored):
    error = scored[2]["errors"]["worst"]["false_positives"][0]
    assert caption(error).startswith(f"{error['probability']:.3f}  {error['id']}\n") and "attention" not in caption(
        error
    )
    told = caption(error | {"attention": [0.25, 0.75]}).splitlines()[-1]
    assert told == "the saved network's attention, pixels alone: view 1 (75%), the whole photo (25%) of 2 views"


def test_a_breakdown_s_table_says_all_that_the_report_says(scored):
    mixed = next(b for b in scored[2]["errors"]["breakdowns"] if not b["rows"][0]["one_class"])
    lines = breakdown_table(mixed).splitlines()
    assert lines[0].split(" | ")[1:] == [
        "n", "groups", "mcc", "mcc_interval", "accuracy", "precision", "recall", "f1", "fpr", "tpr |",
    ]  # fmt: skip
    row = mixed["rows"][0]
    assert lines[2].startswith(f"| {row['value']} | {row['n']} | {row['groups']} | {row['mcc']:.3f} | ")
    assert breakdown_table({"field": "x", "note": "", "rows": [row | {"one_class": True}]}).count("–") == 2


def test_training_and_evaluation_are_one_row_of_hparams_with_every_column(scored, tmp_path):
    index, answers, found = scored
    board = Board(tmp_path / "train")
    board.hparams(Config(), {"val_mcc": 0.5}, "runs/x")
    board.close()
    bare = found | {"errors": {"breakdowns": [], "worst": {}}}
    write_events(tmp_path / "evaluate", bare, join(index, answers), {}, Config(), "runs/x")
    groups, columns = set(), []
    for run in ("train", "evaluate"):
        metadata = EventAccumulator(str(tmp_path / run)).Reload().summary_metadata
        data = {tag: plugin_data_pb2.HParamsPluginData() for tag in ("session_start_info", "experiment")}
        for tag, message in data.items():
            message.ParseFromString(metadata[f"_hparams_/{tag}"].plugin_data.content)
        start, experiment = data["session_start_info"].session_start_info, data["experiment"].experiment
        groups.add(start.group_name)
        columns.append([info.name.tag for info in experiment.metric_infos])
        assert start.hparams["training.learning_rate"].number_value == pytest.approx(3.0e-4)
    assert groups == {"runs/x"}
    assert columns == [[f"final/{name}" for name in FINAL]] * 2


def test_calibration_is_undone_for_the_answers_that_it_made_only(scored):
    index, answers, found = scored
    details = {"calibration": {"temperature": 1.5, "bias": 0.4}}
    lines = {}
    for name in ("predictions.csv", "evaluation_predictions.csv"):
        figure = evaluation_figures(found | {"predictions": name}, answers, details, index, None, None)["reliability"]
        lines[name] = [line.get_label().split(":")[0] for line in figure.axes[0].lines]
    assert "before" in lines["predictions.csv"] and "before" not in lines["evaluation_predictions.csv"]
    assert np.isfinite(list(answers.values())).all()
