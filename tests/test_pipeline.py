"""All stages in order: what each would run."""

import json
import subprocess
import sys

import pytest

from roadwork import pipeline
from roadwork.command_line import parse
from roadwork.errors import UserError
from roadwork.pipeline import describe
from tests.data.sheets import build


def test_fairness_measures_the_very_photos_of_the_run(capsys, tmp_path):
    options = ["--run.dir", str(tmp_path), "--pipeline.stages", "[fairness,shards]", "--seed", "3"]
    describe(parse("pipeline", [*options, "--pipeline.source", "street:40"]).config)
    fairness, shards = capsys.readouterr().out.splitlines()
    assert "benchmarks.fairness --photos 40 --first-seed 3" in fairness and f"{tmp_path}/fairness.json" in fairness
    assert "--source street:40" in shards and "--seed 3" in shards


def test_fairness_has_nothing_to_measure_on_real_photos(capsys, tmp_path):
    options = ["--run.dir", str(tmp_path), "--pipeline.stages", "[fairness]", "--pipeline.source", "csv:photos.csv"]
    describe(parse("pipeline", options).config)
    assert "benchmarks.fairness" not in capsys.readouterr().out


def test_a_stage_whose_product_is_gone_is_to_be_run_again(capsys, tmp_path):
    config = parse("pipeline", ["--run.dir", str(tmp_path), "--pipeline.stages", "[pretrain,evaluate]"]).config
    before = ""
    for stage in ("pretrain", "evaluate"):
        before = pipeline._digest(config, stage, before)
        pipeline._marker(config, stage).parent.mkdir(exist_ok=True)
        pipeline._marker(config, stage).write_text(json.dumps({"digest": before}))
        for path in pipeline._products(config, stage):
            path.parent.mkdir(exist_ok=True)
            path.touch()
    describe(config)
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["done", "done"]
    (tmp_path / "best" / "model.safetensors").unlink()
    describe(config)
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["to", "done"]


def test_the_closing_lines_name_every_place_and_what_is_not_there(tmp_path):
    (tmp_path / "model").mkdir()
    config = parse("pipeline", [f"--run.dir={tmp_path}", f"--data.shards={tmp_path / 'shards'}"]).config
    lines = list(pipeline._summary(config))
    assert lines[0] == "" and f"model:        {tmp_path / 'model'}" in lines
    assert f"report:       {tmp_path / 'report' / 'index.html'} (not made)" in lines
    assert f"shards:       {tmp_path / 'shards'} (not made)" in lines and not any("scores" in line for line in lines)
    (tmp_path / "evaluation.json").touch()
    assert list(pipeline._summary(config))[-1] == f"scores:       {tmp_path / 'evaluation.json'}"


def test_shards_behind_a_url_are_found(capsys, tmp_path):
    build(tmp_path / "shards")
    words = [
        f"--run.dir={tmp_path}",
        "--pipeline.stages=[shards,pretrain]",
        f"--data.shards=file://{tmp_path / 'shards'}",
    ]
    config = parse("pipeline", words).config
    describe(config)
    assert "pretrain: to do" in capsys.readouterr().out
    assert f"shards:       file://{tmp_path / 'shards'}" in pipeline._summary(config)
    (tmp_path / "shards" / "manifest.json").unlink()
    with pytest.raises(UserError, match="no shards in file://"):
        describe(config)


@pytest.mark.parametrize(("gpus", "used"), [(0, 0), (1, 1), (3, 2), (8, 4)])
def test_a_step_that_does_not_divide_over_all_gpus_takes_fewer(capsys, tmp_path, monkeypatch, gpus, used):
    """The demo's step is 4 micro-batches: its first command must work on a node of 8 GPUs, too."""
    monkeypatch.setattr(pipeline, "_gpus", lambda _: gpus)  # this machine's number must not matter
    demo = str(pipeline.ROOT / "launch" / "configs" / "demo.yaml")
    describe(parse("pipeline", ["--config", demo, f"--run.dir={tmp_path}", "--pipeline.stages=[pretrain]"]).config)
    said = capsys.readouterr().out
    assert (f"--num_processes {used} " in said) if used else ("--num_processes" not in said)


def test_a_training_that_was_stopped_is_not_done_though_its_ranks_exited_with_0(tmp_path):
    config = parse("pipeline", ["--run.dir", str(tmp_path), "--pipeline.stages", "[pretrain]"]).config
    assert not pipeline._ended(config, "pretrain"), "no checkpoint at all"
    for step, finished in ((2, False), (4, True)):
        folder = tmp_path / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "counters.json").write_text(json.dumps({"finished": finished}))
        (folder / "COMPLETE").write_text("{}")
        assert pipeline._ended(config, "pretrain") is finished


def test_a_run_folder_that_cannot_be_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        UserError, match=r"run\.dir .*file/x cannot be written: Not a directory; give another --run\.dir"
    ):
        pipeline.run_pipeline(parse("pipeline", [f"--run.dir={tmp_path / 'file' / 'x'}"]).config)


STOPPED = """
import os, sys
from roadwork import pipeline
from roadwork.cli import exit_on_user_error
from roadwork.command_line import parse
stage = "import os, signal, time; os.kill(os.getppid(), signal.SIGTERM); time.sleep(100)"
pipeline._command = lambda config, name, options: [sys.executable, "-c", stage]
exit_on_user_error(pipeline.run_pipeline)(parse("pipeline", sys.argv[1:]).config)
"""


def test_sigterm_to_the_pipeline_stops_its_stage_and_ends_as_a_stopped_stage_does(tmp_path):
    words = [f"--run.dir={tmp_path}", "--pipeline.stages=[pretrain,evaluate]", "--engine.device=cpu"]
    done = subprocess.run([sys.executable, "-c", STOPPED, *words], capture_output=True, text=True, timeout=90)
    assert done.returncode == 2 and done.stdout.count("\n") == 1, done.stdout + done.stderr
    assert done.stderr == ("error: stage pretrain was stopped before its end; start the same command again to go on\n")
