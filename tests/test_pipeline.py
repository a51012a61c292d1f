"""All stages in order: what each would run."""

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
