"""All stages in order: what each would run."""

import json

from roadwork import pipeline
from roadwork.command_line import parse
from roadwork.pipeline import describe


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
    lines = list(pipeline._summary(tmp_path, tmp_path / "shards"))
    assert lines[0] == "" and f"model:        {tmp_path / 'model'}" in lines
    assert f"report:       {tmp_path / 'report' / 'index.html'} (not made)" in lines
    assert f"shards:       {tmp_path / 'shards'} (not made)" in lines and not any("scores" in line for line in lines)
    (tmp_path / "evaluation.json").touch()
    assert list(pipeline._summary(tmp_path, tmp_path / "shards"))[-1] == f"scores:       {tmp_path / 'evaluation.json'}"


def test_a_training_that_was_stopped_is_not_done_though_its_ranks_exited_with_0(tmp_path):
    config = parse("pipeline", ["--run.dir", str(tmp_path), "--pipeline.stages", "[pretrain]"]).config
    assert not pipeline._ended(config, "pretrain"), "no checkpoint at all"
    for step, finished in ((2, False), (4, True)):
        folder = tmp_path / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "counters.json").write_text(json.dumps({"finished": finished}))
        (folder / "COMPLETE").write_text("{}")
        assert pipeline._ended(config, "pretrain") is finished
