"""What TensorBoard's own reader finds."""

import json
import sys

import numpy as np
import pytest
import torch
from accelerate import PartialState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from roadwork.config import Config
from roadwork.errors import UserError
from roadwork.losses import TERMS
from roadwork.monitoring.board import ABOUT, LAYOUT, ROW, Board, flat_options, tagged
from roadwork.monitoring.pictures import MASK_COLOURS, grid, overlay

RECORD = {
    "step": 3, "epoch": 0, "position": 96, "samples_seen": 96, "loss": 0.7, "focal": 0.3, "consistency": 0.1,
    "weather": 0.2, "segmentation": 0.4, "lr": 1e-4, "grad_norm": 1.5, "images_per_s": 40.0, "data_wait_s": 0.01,
    "mfu": None, "note": "text", "val/mcc": 0.5,
}  # fmt: skip


def read(folder):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0, "histograms": 0})
    return events.Reload()


def test_a_line_of_metrics_appears_under_the_tags_of_the_contract(tmp_path):
    board = Board(tmp_path)
    board.record(RECORD)
    board.close()
    events = read(tmp_path)
    wanted = {f"train/{t}" for t in ("loss", "focal", "consistency", "weather", "segmentation", "lr", "grad_norm")}
    assert set(events.Tags()["scalars"]) == wanted | {"perf/images_per_s", "perf/data_wait_s", "val/mcc"}
    (event,) = events.Scalars("train/loss")
    assert event.step == 3 and event.value == pytest.approx(0.7)


def test_curves_do_not_overlap_after_a_resume(tmp_path):
    board = Board(tmp_path)
    for step in range(10):
        board.scalars(step, {"train/loss": 100.0 + step})
    board.close()
    board = Board(tmp_path, purge_step=6)  # a kill after step 9, the newest checkpoint was that of step 6
    for step in range(6, 12):
        board.scalars(step, {"train/loss": float(step)})
    board.close()
    events = read(tmp_path).Scalars("train/loss")
    assert [e.step for e in events] == list(range(12))
    assert [e.value for e in events] == [100.0 + s for s in range(6)] + [float(s) for s in range(6, 12)]


def test_flushed_events_survive_without_close(tmp_path):
    board = Board(tmp_path)
    board.scalars(0, {"train/loss": 1.0})
    board.flush()
    assert len(read(tmp_path).Scalars("train/loss")) == 1
    board.close()
    board.close()


def test_pictures_curves_experts_and_hyper_parameters(tmp_path):
    from matplotlib.figure import Figure

    board = Board(tmp_path)
    views = torch.rand(5, 3, 16, 16)
    board.images("train/views", 1, views, torch.zeros(5, 6, 4, 4))
    figure = Figure(figsize=(2, 2))
    figure.subplots().plot([0, 1])
    board.figures(1, {"val/confusion": figure})
    board.pr_curve("val/pr", 1, [0, 1, 1], [0.2, 0.6, 0.9])
    board.expert_load(1, torch.tensor([[0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0]]))
    board.hparams(Config(), {"mcc": 0.75, "ece": None}, "runs/x")
    with pytest.raises(ValueError, match="accuracy is no column"):
        board.hparams(Config(), {"accuracy": 0.75}, "runs/x")
    board.close()
    events = read(tmp_path)
    assert {"train/views", "val/confusion"} <= set(events.Tags()["images"])
    assert events.Scalars("experts/entropy_layer0")[0].value == pytest.approx(1.0)
    assert events.Scalars("experts/entropy_layer1")[0].value == pytest.approx(0.0)
    assert "experts/load_layer0" in events.Tags()["histograms"]
    assert events.Scalars("final/mcc")[0].value == 0.75
    assert "val/pr" in events.Tags()["tensors"]
    assert {"_hparams_/experiment", "_hparams_/session_start_info"} <= set(events.summary_metadata)
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == []


def test_the_layout_asks_the_three_questions_with_tags_that_are_written(tmp_path):
    assert [name[3:] for name in LAYOUT] == ["Is it learning?", "Is it fast?", "Is it healthy?", "Details"]
    Board(tmp_path).close()
    assert "custom_scalars__config__" in read(tmp_path).summary_metadata
    charted = {tag for charts in LAYOUT.values() for _, tags in charts.values() for tag in tags}
    assert set(tagged(RECORD)) | {f"train/{term}" for term in TERMS} <= charted


def test_each_question_is_one_row_and_no_two_terms_share_a_chart_since_they_would_share_its_colour():
    assert ROW == 4 and all(len(charts) <= ROW for name, charts in LAYOUT.items() if "?" in name)
    terms = {f"train/{term}" for term in TERMS}
    assert all(len(terms.intersection(tags)) <= 1 for charts in LAYOUT.values() for _, tags in charts.values())


def test_tensorboard_says_once_at_which_threshold_the_mcc_is(tmp_path):
    for purge_step in (None, 6):  # a new run, and its relaunch
        Board(tmp_path, purge_step=purge_step).close()
    (event,) = read(tmp_path).Tensors("about/text_summary")
    (text,) = event.tensor_proto.string_val
    lines = dict(line.decode().removeprefix("- ").split(": ", 1) for line in text.split(b"\n"))
    assert list(lines) == [f"`{tag}`" for tag in ABOUT]
    assert all("own share of positives, not at 0.5" in lines[tag] for tag in ("`val/mcc`", "`val/challenge_mcc`"))
    assert all(any(tag in tags for charts in LAYOUT.values() for _, tags in charts.values()) for tag in ABOUT)


def test_other_ranks_write_nothing(tmp_path):
    board = Board(tmp_path / "b", is_main=False)
    board.record(RECORD)
    board.images("x", 0, torch.rand(1, 3, 4, 4))
    board.hparams(Config(), {}, "runs/x")
    board.close()
    assert not (tmp_path / "b").exists()


def test_options_become_a_flat_table():
    flat = flat_options(Config())
    assert flat["training.learning_rate"] == 3.0e-4 and flat["seed"] == 0
    assert all(isinstance(value, bool | int | float | str) for value in flat.values())


def test_unknown_and_missing_trackers_are_one_line(tmp_path):
    config = Config()
    config.monitoring.trackers = ["tensorboard", "wandbb"]
    with pytest.raises(UserError, match="unknown tracker 'wandbb'.*tensorboard, wandb"):
        Board.open(config, tmp_path, is_main=True)
    Board.open(config, tmp_path / "other", is_main=False)
    config.monitoring.trackers = ["tensorboard"]
    Board.open(config, tmp_path, is_main=True).close()


RECORDER = """
import json, os
class Run:
    def log(self, values, step=None): note("log", values, step)
    def finish(self): note("finish")
class config:
    @staticmethod
    def update(values, allow_val_change): note("config", values)
def note(*what): open(os.environ["NOTES"], "a").write(json.dumps(what) + "\\n")
def init(**options):
    note("init", options)
    return Run()
"""


def test_wandb_gets_the_scalars_through_accelerate_and_goes_on_under_its_id(tmp_path, monkeypatch):
    PartialState(cpu=True)  # Accelerate's trackers write to its log, as in a run
    (tmp_path / "wandb.py").write_text(RECORDER)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    config = Config()
    config.monitoring.trackers = ["wandb"]
    for step in (1, 2):
        board = Board.open(config, tmp_path / "run" / "tensorboard", is_main=True, purge_step=step - 1)
        board.record(RECORD | {"step": step})
        board.close()
    monkeypatch.delitem(sys.modules, "wandb")
    notes = [json.loads(line) for line in (tmp_path / "notes").read_text().splitlines()]
    assert [note[0] for note in notes] == ["init", "config", "log", "finish"] * 2
    first, second = (note[1] for note in notes if note[0] == "init")
    assert first == second and first["resume"] == "allow" and first["name"] == "run"
    assert notes[1][1]["training.learning_rate"] == 3.0e-4
    assert notes[2][1]["train/loss"] == 0.7 and [note[2] for note in notes if note[0] == "log"] == [1, 2]


def test_masks_are_laid_over_where_they_are():
    masks = np.zeros((1, 6, 2, 2), dtype=np.uint8)
    masks[0, 2, 0, 1] = 1
    picture = overlay(np.zeros((1, 3, 8, 8), dtype=np.uint8), masks, opacity=1.0)
    assert picture[0, :, 1, 6].tolist() == list(MASK_COLOURS[2])
    assert picture[0, :, :4, :4].max() == 0 and picture[0, :, 4:].max() == 0
    with pytest.raises(ValueError, match="masks must have shape"):
        overlay(np.zeros((1, 3, 8, 8), dtype=np.uint8), masks[:, :3])


def test_grid_holds_every_picture():
    sheet = grid(np.stack([np.full((3, 4, 4), 10 * i, dtype=np.uint8) for i in range(5)]), columns=3, gap=1)
    assert sheet.shape == (3, 10, 15)
    assert [sheet[0, 5 * (i // 3), 5 * (i % 3)] for i in range(5)] == [0, 10, 20, 30, 40]
