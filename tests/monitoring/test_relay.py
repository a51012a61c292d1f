"""A command whose output is shown and kept: on a terminal it has one, elsewhere it says plain lines."""

import os
import pty
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

STAGE = """
import os, sys
from roadwork.monitoring.progress import Progress
progress = Progress("stage", total=50, every_s=3600)
for step in range(1, 51): progress.update(step, images=8, figures={"loss": 1 / step})
progress.close("done")
print("columns", os.get_terminal_size(2).columns if os.isatty(2) else "of no terminal", "input", os.isatty(0))
raise SystemExit(3)
"""
RELAY = """
import os, signal, sys
from pathlib import Path
from roadwork.monitoring.relay import run_shown
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background begins without it
before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
status = run_shown([sys.executable, "-c", sys.argv[2]], Path(sys.argv[1]), Path.cwd(), dict(os.environ))
assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
print("status", status)
"""


def relay(log: Path, stage: str) -> list[str]:
    return [sys.executable, "-c", RELAY, str(log), stage]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.getcwd(), "PYTHONUNBUFFERED": "1"}


def test_on_a_terminal_the_stage_has_one_and_the_log_gets_the_last_state_of_its_line(tmp_path):
    log = tmp_path / "stage.log"
    log.write_text("of a call before\n")
    main, side = pty.openpty()
    termios.tcsetwinsize(side, (30, 91))
    subprocess.run(relay(log, STAGE), env=environment(), stdin=subprocess.DEVNULL, stdout=side, check=True, timeout=120)
    os.close(side)
    shown = os.read(main, 1 << 20).decode()
    os.close(main)
    assert "\r" in shown and "stage 50/50 |" in shown and "images/s" in shown, "no bar"
    assert shown.count("\n") <= 6 and "columns 91 input False" in shown and "status 3" in shown
    assert "\r\r" not in shown, "line ends are made twice"
    before, bar, done, columns = log.read_text().splitlines()
    assert before == "of a call before" and bar.startswith("stage 50/50 |") and bar.count("50/50") == 1
    assert done == "stage done in 0 s" and columns == "columns 91 input False"


def test_elsewhere_the_stage_says_plain_lines_which_are_shown_and_kept_alike(tmp_path):
    log = tmp_path / "stage.log"
    done = subprocess.run(
        relay(log, STAGE), env=environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
    )
    assert done.stderr == "" and "\r" not in done.stdout
    first, last, closing, columns, status = done.stdout.splitlines()
    assert first.startswith("stage 1/50  ") and last.startswith("stage 50/50  ") and closing == "stage done in 0 s"
    assert columns == "columns of no terminal input False" and status == "status 3"
    assert log.read_text() == done.stdout.removesuffix("status 3\n")


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("a\\r\\nb\\n", "a\r\nb\n"),  # line ends of another system
        ("1/2\\r2/2\\nend", "2/2\nend"),
        ("1/2\\r      \\rtext\\n\\n", "text\n\n"),
        ("first", "first"),
    ],
)
def test_the_log_keeps_what_a_rewritten_line_said_last(tmp_path, said, kept):
    stage = f"import sys, time\nfor c in '{said}': sys.stdout.write(c), sys.stdout.flush(), time.sleep(0.01)"
    subprocess.run(relay(tmp_path / "log", stage), env=environment(), capture_output=True, check=True, timeout=120)
    assert (tmp_path / "log").read_bytes().decode() == kept


@pytest.mark.parametrize("full", ["standard output", "log"])
def test_a_full_disk_costs_lines_and_never_the_stage(tmp_path, full):
    log, shown = tmp_path / "log", tmp_path / "shown"
    (log if full == "log" else shown).symlink_to("/dev/full")
    stage = "for line in range(3000): print('line', line, flush=True)\nraise SystemExit(3)"
    code = f"{RELAY}\nPath({str(tmp_path / 'status')!r}).write_text(str(status))".replace('print("status", status)', "")
    command = [sys.executable, "-c", code, str(log), stage]
    with open(shown, "w") as output:
        subprocess.run(command, env=environment(), stdout=output, check=True, timeout=120)
    assert (tmp_path / "status").read_text() == "3"
    other = shown if full == "log" else log
    assert len(other.read_text().splitlines()) == 3000


SAVES = """
import signal, sys, time
def save(*_):
    time.sleep(1)
    print("saved", flush=True)
    raise SystemExit(0)
signal.signal(signal.SIGINT, save)
signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
time.sleep(100)
"""


def test_ctrl_c_reaches_the_stage_and_what_it_says_while_it_saves_is_still_shown(tmp_path):
    process = subprocess.Popen(
        relay(tmp_path / "log", SAVES), env=environment(), stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it: to the whole group
    rest, _ = process.communicate(timeout=60)
    assert rest == "saved\nstatus 0\n" and process.returncode == 0


def test_sigterm_is_passed_on_and_what_the_stage_says_while_it_saves_is_still_shown(tmp_path):
    process = subprocess.Popen(relay(tmp_path / "log", SAVES), env=environment(), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.terminate()
    rest, _ = process.communicate(timeout=60)
    assert rest == "saved\nstatus -15\n" and process.returncode == 0


def test_sigterm_that_was_ignored_stays_so_in_the_stage_as_well(tmp_path):
    """Slurm signals every process of a job: what must outlive that is started so."""
    stage = """
import os, signal, time
os.kill(os.getppid(), signal.SIGTERM)
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(0.5)
print("lives", flush=True)
"""
    command = ["sh", "-c", "trap '' TERM; exec \"$@\"", "sh", *relay(tmp_path / "log", stage)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.stdout == "lives\nstatus 0\n", done.stderr
