"""A user's mistake ends as one line and status 2; anything else keeps its traceback."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

import pytest

from roadwork.cli import Parser, exit_on_user_error
from roadwork.errors import UserError


def test_a_user_error_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    @exit_on_user_error
    def main() -> int:
        raise UserError("two\nlines  of words")

    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2 and capsys.readouterr().err == "error: two lines of words\n"


def test_other_errors_keep_their_traceback_and_success_is_0() -> None:
    @exit_on_user_error
    def broken() -> int:
        raise ValueError("a bug of ours")

    @exit_on_user_error
    def fine() -> None:
        return None

    with pytest.raises(ValueError, match="a bug of ours"):
        broken()
    assert fine() == 0


def test_the_parser_says_one_line_and_does_not_guess_abbreviations(capsys: pytest.CaptureFixture[str]) -> None:
    parser = Parser(prog="tool")
    parser.add_argument("--number", type=int, default=3, help="how many")
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["--num", "4"])
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.err.count("\n") == 1 and "--num" in captured.err
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    assert "(default: 3)" in capsys.readouterr().out


ENTRIES = sorted((Path(__file__).resolve().parents[1] / "launch").glob("*.py"))


@pytest.mark.parametrize("entry", ENTRIES, ids=[path.stem for path in ENTRIES])
def test_every_entry_has_help(entry: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    before = dict(os.environ)
    monkeypatch.setattr(sys, "argv", [str(entry), "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(entry), run_name="__main__")
    told = capsys.readouterr().out
    assert stop.value.code in (0, None) and "usage:" in told and len(told.splitlines()) > 5
    assert dict(os.environ) == before, "asking for help changed the process"
