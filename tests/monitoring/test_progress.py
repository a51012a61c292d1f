"""What a person sees on the console."""

import io
import os
import pty
import subprocess
import sys

import pytest

from roadwork.monitoring.progress import Progress, duration


def test_duration():
    assert [duration(s) for s in (0.4, 42, 185, 7620)] == ["0 s", "42 s", "3 min 05 s", "2 h 07 min"]


def test_plain_lines_hold_rate_figures_and_time_left():
    out = io.StringIO()
    progress = Progress("pretrain", total=4, stream=out, every_s=0.0)
    for step in range(1, 5):
        progress.update(step, images=32, figures={"loss": 0.5 / step, "MCC": 0.25})
    progress.close("done")
    lines = out.getvalue().splitlines()
    assert len(lines) == 5 and "\r" not in out.getvalue()
    assert lines[0].startswith("pretrain 1/4  ") and "images/s  loss 0.5  MCC 0.25" in lines[0] and "left" in lines[0]
    assert lines[-1] == "pretrain done in 0 s"


@pytest.mark.parametrize("outcome", ["stopped", "failed"])
def test_what_did_not_reach_its_end_is_not_done(outcome):
    out = io.StringIO()
    Progress("pretrain", total=4, stream=out).close(outcome)
    assert out.getvalue() == f"pretrain {outcome} after 0 s\n"


def test_plain_lines_are_rare_but_the_last_step_is_shown():
    out = io.StringIO()
    progress = Progress("fold 1", total=1000, stream=out, every_s=3600)
    for step in range(1, 1001):
        progress.update(step)
    assert [line.split()[2] for line in out.getvalue().splitlines()] == ["1/1000", "1000/1000"]


def test_photos_that_are_steps_never_pass_the_total():
    out = io.StringIO()
    progress = Progress("evaluate", total=5, stream=out, every_s=0.0)
    for _ in range(3):
        progress.advance(2, {"failed": 1})
    assert [line.split()[1] for line in out.getvalue().splitlines()] == ["2/5", "4/5", "5/5"]
    assert "images/s  failed 1" in out.getvalue()


def test_other_ranks_say_nothing():
    out = io.StringIO()
    with Progress("pretrain", total=2, enabled=False, stream=out, every_s=0.0) as progress:
        progress.update(1)
        progress.say("hello")
        progress.close("done")
    assert out.getvalue() == ""


def test_time_left_of_a_resumed_run_counts_only_its_own_steps():
    progress = Progress("pretrain", total=100, start=90, stream=io.StringIO())
    progress._began -= 50.0
    progress.update(95, images=160)
    assert "50 s left" in progress.line() and "3.2 images/s" in progress.line()


def test_a_terminal_gets_one_line_that_rewrites_itself():
    code = (
        "from roadwork.monitoring.progress import Progress\np = Progress('pretrain', total=50)\n"
        "for i in range(1, 51): p.update(i, images=8, figures={'loss': 1 / i})\np.close('done')"
    )
    main, side = pty.openpty()
    env = {**os.environ, "PYTHONPATH": os.getcwd(), "PYTHONIOENCODING": "utf-8"}
    subprocess.run([sys.executable, "-c", code], env=env, stderr=side, check=True)
    os.close(side)
    text = os.read(main, 1 << 20).decode()
    assert "\r" in text and "50/50" in text and "images/s" in text
    assert text.count("\n") <= 3 and "pretrain done in" in text


NOISY = """
import os, subprocess, sys
from roadwork.monitoring.console import captured_output, quiet_libraries
quiet_libraries(sys.argv[1])
import logging, warnings
deepspeed = logging.getLogger("DeepSpeed")          # what deepspeed/utils/logging.py does on import
deepspeed.propagate = False
deepspeed.addHandler(logging.StreamHandler(sys.stdout))
quiet_libraries(sys.argv[1]) if "again" in sys.argv else None
deepspeed.warning("a banner")
deepspeed.error("an error of the engine")
logging.getLogger("transformers.x").warning("some advice")
warnings.warn("a deprecation", DeprecationWarning)
warnings.warn("a warning")
with captured_output(sys.argv[1]):
    subprocess.run(["sh", "-c", "echo ninja talks; echo ninja errs >&2"])
    print("python talks")
print("our own line")
if "raise" in sys.argv:
    with captured_output(sys.argv[1]):
        subprocess.run(["sh", "-c", "echo compiler error >&2"])
        raise ValueError("broken")
"""


@pytest.mark.parametrize("mode", [[], ["again"]])
def test_banners_and_warnings_go_to_the_log_and_errors_to_both(tmp_path, mode):
    log = tmp_path / "logs" / "rank0.log"
    env = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, "-c", NOISY, str(log), *mode], env=env, capture_output=True, text=True, check=True
    )
    console, logged = done.stdout + done.stderr, log.read_text()
    for text in ("a banner", "some advice", "a warning", "ninja talks", "ninja errs", "python talks"):
        assert text not in console and text in logged, text
    assert console.count("an error of the engine") == 1 and "an error of the engine" in logged
    assert done.stdout.endswith("our own line\n")


def test_what_a_failing_block_said_is_shown(tmp_path):
    env = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, "-c", NOISY, str(tmp_path / "l"), "raise"], env=env, capture_output=True, text=True
    )
    assert done.returncode == 1 and "compiler error" in done.stderr and "ValueError: broken" in done.stderr
    assert "ninja talks" not in done.stderr


FULL = """
import sys
from roadwork.monitoring.progress import Progress
progress = Progress("pretrain", total=3000, every_s=0.0)
for step in range(1, 3001): progress.update(step)
progress.close("done")
print("went on")
"""


def test_a_full_disk_under_the_console_costs_lines_and_never_the_run():
    env = {**os.environ, "PYTHONPATH": os.getcwd(), "PYTHONUNBUFFERED": "1"}
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", FULL], env=env, stdout=subprocess.PIPE, stderr=full, text=True)
    assert done.returncode == 0 and done.stdout == "went on\n"


def test_a_reader_that_closed_our_output_still_ends_the_command():
    reading, writing = os.pipe()
    os.close(reading)
    closed = open(writing, "wb", buffering=0)
    progress = Progress("pretrain", total=1, stream=io.TextIOWrapper(closed, write_through=True), every_s=0.0)
    with closed, pytest.raises(BrokenPipeError):
        progress.update(1)
