"""best/: what chooses it, and how it comes back where somebody removed it."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from roadwork.models import RoadworkDetector
from roadwork.monitoring.runlog import read_lines
from roadwork.training import folds, validation
from roadwork.training.counters import Counters
from roadwork.training.pretrain import closing
from roadwork.training.validation import challenge_mcc
from tests.training.small_trainer import Make, make_trainer, options, sheets  # noqa: F401 - fixtures


def weights(run: Path) -> bytes:
    return (run / "best" / "model.safetensors").read_bytes()


def test_a_finished_run_makes_it_again_from_the_checkpoint_that_it_came_from(
    trainer: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    trainer().run()
    before = weights(run)
    shutil.rmtree(run / "best")
    counters = trainer().run()
    assert weights(run) == before and counters.best_step == 6
    assert "made again from the checkpoint of step 6" in caplog.text


def test_it_cuts_photos_as_the_shards_were_cut(trainer: Make, shards: Path, tmp_path: Path) -> None:
    shutil.copytree(shards, tmp_path / "four")
    manifest = json.loads((tmp_path / "four" / "manifest.json").read_text())
    (tmp_path / "four" / "manifest.json").write_text(json.dumps(manifest | {"options": {"max_views": 4}}))
    trainer(f"--data.shards={tmp_path / 'four'}", "--training.max_steps=1").run()
    assert RoadworkDetector.from_pretrained(tmp_path / "run" / "best").max_views == 4


def test_without_that_checkpoint_the_last_weights_are_judged_and_the_folds_can_go_on(
    trainer: Make, shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    first = trainer("--training.validate_every_steps=3", "--checkpoint.every_steps=1")
    first.run()
    stored = run / "checkpoints" / "step-00000006" / "counters.json"
    counters = json.loads(stored.read_text())
    # As if step 3, whose checkpoint has been retired, had been the best.
    first.counters.best_step, first.counters.best_mcc, first.counters.stale_validations = 3, 0.99, 7
    first._save()
    first.close()
    shutil.rmtree(run / "best")
    again = trainer("--training.validate_every_steps=3").run()
    assert "so is the checkpoint of step 3" in caplog.text
    assert (again.best_step, again.step, again.finished) == (6, 6, True)
    assert again.best_mcc < 0.99 and again.stale_validations == 7, "why it had ended was forgotten"
    assert json.loads(stored.read_text())["best_step"] == 6 and counters["step"] == 6
    assert folds.prepare(options(run, shards, "--folds.num_folds=2")).best == run / "best"


def test_an_unfinished_run_goes_on_and_its_next_validation_makes_it(trainer: Make, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = trainer("--training.validate_every_steps=2", "--checkpoint.every_steps=1", "--training.max_steps=4")
    first.run()
    first.counters.best_step, first.counters.best_mcc = 2, 0.99
    first._save()
    first.close()
    shutil.rmtree(run / "best")
    counters = trainer("--training.validate_every_steps=2", "--training.max_steps=8").run()
    assert counters.best_step > 2 and (run / "best" / "model.safetensors").is_file()


def test_a_run_that_has_not_validated_misses_nothing(trainer: Make, tmp_path: Path) -> None:
    made = trainer()
    made._mend_best()
    assert not (tmp_path / "run" / "best").exists() and made.counters.best_step == -1


def test_the_best_weights_may_be_those_that_the_challenge_would_choose(
    trainer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validation, "CHALLENGE_ROUNDS", 64)  # two turns of questions
    made = trainer("--training.select_on=challenge", "--training.validate_every_steps=3")
    counters = made.run()
    lines = list(read_lines(tmp_path / "run" / "validation.jsonl"))
    assert [line["step"] for line in lines] == [3, 6] and all(-1 <= line["challenge_mcc"] <= 1 for line in lines)
    best = max(lines, key=lambda line: (line["challenge_mcc"], -line["loss"]))
    assert (counters.best_step, counters.best_mcc) == (best["step"], pytest.approx(best["challenge_mcc"]))
    assert {line["challenge"] for line in lines} == {"real half only"}
    # Named as what it is: in HPARAMS, on the progress line and at the end.
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert events.Scalars("final/val_challenge_mcc")[0].value == pytest.approx(counters.best_mcc)
    assert "final/val_mcc" not in events.Tags()["scalars"]
    last = lines[-1]["challenge_mcc"]
    assert counters.judged() == {"challenge MCC": last, "best challenge MCC": counters.best_mcc}
    told = f"challenge MCC {counters.best_mcc:.3f} on the validation photos, at step {counters.best_step}"
    assert f"({told})" in next(line for line in closing(counters, 6, tmp_path) if line.startswith("best weights: "))
    again = challenge_mcc(made.engine, made.model, made.data.val, made.config)
    assert again == challenge_mcc(made.engine, made.model, made.data.val, made.config)


def test_the_console_is_told_the_last_mcc_and_the_best_one_as_far_as_they_are_known() -> None:
    assert Counters().judged() == {}
    assert Counters(last_mcc=0.25, best_mcc=0.5, best_step=3).judged() == {"MCC": 0.25, "best MCC": 0.5}
    assert Counters(best_mcc=0.5, best_step=3).judged() == {"best MCC": 0.5}, "of an older checkpoint"


def test_the_generated_half_is_asked_where_it_is_given(
    trainer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validation, "CHALLENGE_ROUNDS", 24)
    for label in "01":
        (tmp_path / "drawn" / label).mkdir(parents=True)
        Image.new("RGB", (300, 240), (255 * int(label),) * 3).save(tmp_path / "drawn" / label / "one.png")
    made = trainer("--training.select_on=challenge", f"--predict.challenge_synthetic={tmp_path / 'drawn'}")
    seen: list[float] = []
    predict_batch = made.model.predict_batch
    made.model.predict_batch = lambda photos: seen.extend(float(p.std()) for p in photos) or predict_batch(photos)
    asked = challenge_mcc(made.engine, made.model, made.data.val, made.config)
    assert asked is not None and asked[1] == "real and synthetic halves"
    assert len(seen) == 24 and sum(spread == 0 for spread in seen) >= 2, "pictures of one colour are the generated ones"
