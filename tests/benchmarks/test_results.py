"""Dated results, and README's block that is made of them."""

import json
from pathlib import Path

import pytest

from benchmarks import demo, results, run_all, tables
from benchmarks.headlines import HEADLINES

ROOT = Path(__file__).resolve().parents[2]
ROW = {
    "name": "ema", "what": "average of the <weights>", "claimed": "", "value": 0.02, "low": -0.01, "high": 0.05,
    "seeds": 3, "verdict": "not shown", "mcc_with": 0.7, "mcc_without": 0.68, "auc_value": 0.01, "auc_low": 0.0,
    "auc_high": 0.02,
}  # fmt: skip
BEGAN = results.provenance()
BEGAN["machine"] |= {"load": 0.01}


def test_the_readme_is_what_the_result_files_say(capsys):
    assert tables.main(["--check"]) == 0, capsys.readouterr().out


def test_the_newest_result_of_each_benchmark_counts(tmp_path):
    path = results.save("order", {"positions_per_s": 5, "list": [1]}, "python -m benchmarks.order", BEGAN, tmp_path)
    record = json.loads(path.read_text())
    assert {"date", "commit", "machine", "command", "figures"} <= set(record) and record["machine"]["cores"] >= 1
    assert record["machine"]["load"] == BEGAN["machine"]["load"], "that before the benchmark, which loads the machine"
    older = {**record, "date": "2001-01-01", "figures": {"positions_per_s": 1}}
    (tmp_path / "2001-01-01-order.json").write_text(json.dumps(older))
    assert results.newest(tmp_path)["order"]["figures"]["positions_per_s"] == 5


def test_a_stale_block_and_a_stale_picture_are_noticed_and_mended(tmp_path, capsys):
    (tmp_path / "docs").mkdir()
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n")
    found = {"rows": [ROW], "test_photos": 100, "test_groups": 40, "mcc": 0.7}
    results.save("ablation", found, "python -m benchmarks.ablation", BEGAN, tmp_path / "results")
    order = dict.fromkeys((line.key for line in HEADLINES if line.benchmark == "order"), 2.5e6)
    results.save("order", order, "python -m benchmarks.order", BEGAN, tmp_path / "results")
    words = ["--root", str(tmp_path), "--results", str(tmp_path / "results")]
    assert tables.main([*words, "--check"]) == 1 and "README.md, docs/ablation.svg" in capsys.readouterr().out
    assert tables.main(words) == 0 and tables.main([*words, "--check"]) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "+0.020 | -0.010 to +0.050" in text
    assert "| 2,500,000 | order |" in text
    assert "ema (not shown)" in (tmp_path / "docs" / "ablation.svg").read_text()
    readme.write_text(text.replace("+0.020", "+0.200"))
    assert tables.main([*words, "--check"]) == 1


def test_a_readme_without_its_block_is_refused():
    with pytest.raises(SystemExit, match="holds 0"):
        tables.wanted("no markers", {})


def test_every_module_is_a_benchmark_or_said_not_to_be():
    for name in run_all.names():
        text = (ROOT / "benchmarks" / f"{name}.py").read_text()
        assert '"--json"' in text and "__main__" in text, f"benchmarks/{name}.py is no benchmark: see NOT_BENCHMARKS"
    assert set(run_all.ARGUMENTS) <= set(run_all.names())


def test_one_that_fails_is_named_and_the_status_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(run_all.ARGUMENTS, "order", run_all.Words(("--big", "many")))
    assert run_all.main(["--only", "order", "--results", str(tmp_path / "r")]) == 1
    assert "order: status 2" in capsys.readouterr().out and not list(tmp_path.glob("r/*"))


def test_the_last_line_is_the_result():
    assert run_all.last_json_line('words\n{"a": 1}\n\n') == {"a": 1}
    assert run_all.last_json_line("") is None and run_all.last_json_line("[1]") is None


def test_a_finished_run_is_read_and_another_is_refused_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        demo.main(["--run", str(tmp_path)])
    assert ended.value.code == 2 and "holds no evaluation.json" in capsys.readouterr().err
    row = {"name": "ensemble", "chosen": True, "mcc": 0.75, "mcc_interval": [0.6, 0.9], "n": 10, "groups": 4}
    other = {**row, "name": "metadata", "chosen": False, "mcc": 0.1, "mcc_interval": None}
    evaluation = {"chosen": "ensemble", "split": "test", "systems": [row, other]}
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    (tmp_path / "stages").mkdir()
    for stage, seconds in (("shards", 20.0), ("pretrain", 70.0)):
        (tmp_path / "stages" / f"{stage}.json").write_text(json.dumps({"digest": "", "seconds": seconds}))
    assert demo.main(["--run", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["minutes"] == 1.5 and found["chosen_mcc"] == found["ensemble_mcc"] == 0.75
    assert found["ensemble_low"] == 0.6 and found["metadata_low"] is None and found["groups"] == 4
