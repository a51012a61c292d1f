"""Runs a command whose output is both shown and kept, and gives it a terminal where this process has one."""

from __future__ import annotations

import errno
import os
import pty
import signal
import subprocess
import sys
import termios
import tty
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from roadwork.monitoring.console import lines_may_be_lost


def run_shown(command: Sequence[str], log: Path, folder: Path, environment: Mapping[str, str]) -> int:
    """Run a command in `folder` to its end; its output and errors go to standard output and to the end of `log`.

    Where standard output is a terminal, the command has a pseudo-terminal of the same size: a progress bar stays one line
    that rewrites itself. Of such a line the log gets what it said last. Elsewhere the command has a pipe.
    Ctrl-C reaches the command by itself; what it says while it saves is still shown. Call it in the main thread.
    SIGTERM is passed on to it, unless it was ignored before: then the command ignores it as well, as Slurm's scripts want.
    What a full disk, under standard output or the log, does not take is lost there; the command goes on.

    Returns: its exit status, negative: the signal that ended it, or SIGTERM that was passed on, whatever it then said.
    Raises OSError where it cannot start.
    """
    terminal = sys.stdout.isatty()
    process: subprocess.Popen[bytes] | None = None
    terminated = False

    def pass_on(*_: object) -> None:
        nonlocal terminated
        terminated = True
        if process is not None:
            process.terminate()

    before = {signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: None)}
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN:
        before[signal.SIGTERM] = signal.signal(signal.SIGTERM, pass_on)
    try:
        with open(log, "ab", buffering=0) as kept:
            ours, its = pty.openpty() if terminal else os.pipe()
            try:
                if terminal:
                    tty.setraw(its)  # the real terminal turns line ends into its own
                    _fit(its)
                process = subprocess.Popen(command, cwd=folder, env=environment, stdout=its, stderr=its)
                if terminated:  # while it was being started
                    process.terminate()
            finally:
                os.close(its)  # else the output would never end
            line = b""
            for piece in _pieces(ours):
                with lines_may_be_lost():
                    sys.stdout.buffer.write(piece)
                    sys.stdout.flush()
                *whole, line = (line + piece).split(b"\n")
                with lines_may_be_lost():
                    kept.write(b"".join(_last_state(text) + b"\n" for text in whole))
                line = _last_state(line)
                if terminal:
                    _fit(ours)
            with lines_may_be_lost():
                kept.write(line)
        status = process.wait()
        return -signal.SIGTERM if terminated else status
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _fit(descriptor: int) -> None:
    """Give a pseudo-terminal the size that the real one has now."""
    termios.tcsetwinsize(descriptor, termios.tcgetwinsize(sys.stdout))


def _last_state(line: bytes) -> bytes:
    """What a line shows that carriage returns began anew; those at its end may belong to the line's end."""
    return line[line.rstrip(b"\r").rfind(b"\r") + 1 :]


def _pieces(descriptor: int) -> Iterator[bytes]:
    """What is written to the other end until everybody has closed it."""
    with open(descriptor, "rb", buffering=0) as stream:
        try:
            while piece := stream.read(4096):
                yield piece
        except OSError as error:
            if error.errno != errno.EIO:  # how Linux says that a pseudo-terminal has ended
                raise
