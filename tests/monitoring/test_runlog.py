"""metrics.jsonl: what is on disk after a kill, and what counts of it."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from roadwork.monitoring.runlog import RunLog, read_last_per_step, read_lines


def test_a_line_is_on_disk_when_append_returns(tmp_path):
    log = RunLog(tmp_path / "run" / "metrics.jsonl")
    log.append({"step": 1, "loss": torch.tensor(0.1, dtype=torch.float64), "n": np.int64(3)})
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == '{"step": 1, "loss": 0.1, "n": 3}\n'


def test_floats_keep_every_bit(tmp_path):
    value = 0.1 + 0.2
    with RunLog(tmp_path / "m.jsonl") as log:
        log.append({"step": 0, "loss": value, "bad": math.nan})
    (record,) = read_lines(tmp_path / "m.jsonl")
    assert record["loss"] == value and record["bad"] is None


@pytest.mark.parametrize(
    "tail", ['{"step": 3, "lo', '{"step": 3, "loss": 1.0}', "\0\0\0\0", '{"step": 3', "garbage\n\0\0"]
)
def test_a_torn_end_is_cut_and_writing_goes_on(tmp_path, tail):
    path = tmp_path / "m.jsonl"
    good = "".join(f'{{"step": {i}}}\n' for i in range(3))
    path.write_text(good + tail)
    with RunLog(path) as log:
        assert log.repaired_bytes == len(tail)
        log.append({"step": 3})
    assert path.read_text() == good + '{"step": 3}\n'


def test_a_file_of_rubbish_and_an_empty_file_become_empty(tmp_path):
    for content in ("", "\0" * 200000, "x"):
        path = tmp_path / "m.jsonl"
        path.write_text(content)
        RunLog(path).close()
        assert path.read_bytes() == b""


def test_long_lines_survive_the_repair(tmp_path):
    path = tmp_path / "m.jsonl"
    line = json.dumps({"step": 0, "text": "x" * 300000}) + "\n"
    path.write_text(line + line + line[:150000])
    RunLog(path).close()
    assert path.read_text() == line + line


def test_the_last_line_of_a_step_counts(tmp_path):
    with RunLog(tmp_path / "m.jsonl") as log:
        for step, loss in [(0, 1.0), (1, 0.9), (2, 0.8), (1, 0.7), (2, 0.6), (3, 0.5)]:
            log.append({"step": step, "loss": loss})
        log.append({"note": "no step"})
    assert [(r["step"], r["loss"]) for r in read_last_per_step(tmp_path / "m.jsonl")] == [
        (0, 1.0),
        (1, 0.7),
        (2, 0.6),
        (3, 0.5),
    ]
    assert read_last_per_step(tmp_path / "missing.jsonl") == []


def test_sigkill_in_the_middle_loses_no_complete_line(tmp_path):
    path = tmp_path / "m.jsonl"
    code = (
        "import sys\nfrom roadwork.monitoring.runlog import RunLog\nlog = RunLog(sys.argv[1])\ni = 0\n"
        "while True:\n    log.append({'step': i, 'pad': 'x' * 5000})\n    i += 1\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(path)], env={**os.environ, "PYTHONPATH": os.getcwd()})
    while not path.exists() or path.stat().st_size < 100000:
        time.sleep(0.01)
        assert writer.poll() is None
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    RunLog(path).close()
    steps = [r["step"] for r in map(json.loads, path.read_text().splitlines())]
    assert steps == list(range(len(steps))) and len(steps) > 10


def test_a_full_disk_names_the_file_and_leaves_no_torn_line():
    code = (
        "import resource, signal\nfrom pathlib import Path\nfrom roadwork.monitoring.runlog import RunLog\n"
        "import sys\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\nlog = RunLog(sys.argv[1])\n"
        "try:\n    for i in range(100):\n        log.append({'step': i, 'pad': 'x' * 300})\n"
        "except OSError as error:\n    sys.stdout.write(str(error))\n"
    )
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "m.jsonl")
        env = {**os.environ, "PYTHONPATH": os.getcwd()}
        done = subprocess.run([sys.executable, "-c", code, path], env=env, capture_output=True, text=True, check=True)
        assert "m.jsonl" in done.stdout and "cannot write" in done.stdout
        with open(path) as file:
            assert [json.loads(line)["step"] for line in file] == [0, 1, 2]
