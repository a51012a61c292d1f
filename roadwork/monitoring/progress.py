"""One progress line per stage, on rank 0: a bar that rewrites itself on a terminal, a plain line now and then
elsewhere.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

from tqdm import tqdm

from roadwork.monitoring.console import captured_output, lines_may_be_lost, quiet_libraries

__all__ = ["Progress", "captured_output", "duration", "quiet_libraries"]


def duration(seconds: float) -> str:
    """Seconds as a person says them: 42 s, 3 min 05 s, 2 h 07 min."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _width(stream: TextIO) -> dict[str, Any]:
    """tqdm shows nothing on a terminal that says it is 0 columns wide, as some containers' do."""
    try:
        columns = os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        columns = 0
    return {"dynamic_ncols": True} if columns else {"ncols": 100, "nrows": 20}


class Progress:
    """Shows `stage step/total  rate  figures  time left`.

    stage: its name; total: steps (0: unknown); start: the step at which this process begins (a resumed run's rate and
    time left are those of this process); enabled: rank 0 and wanted; stream: standard error; every_s: seconds between
    plain lines.
    """

    def __init__(
        self,
        stage: str,
        total: int = 0,
        start: int = 0,
        *,
        enabled: bool = True,
        stream: TextIO | None = None,
        every_s: float = 15.0,
    ) -> None:
        self.stage, self.total, self.step, self.enabled = stage, total, start, enabled
        self.stream = stream if stream is not None else sys.stderr
        self.every_s = every_s
        self._start, self._began = start, time.monotonic()
        self._shown_at = -float("inf")
        self._figures: dict[str, float] = {}
        self._images = 0.0
        self._bar: tqdm | None = None
        if enabled and self.stream.isatty():
            # the figures travel as the 'unit', since tqdm puts a comma before its postfix
            form = "{desc} {n_fmt}/{total_fmt} |{bar:20}| {unit}" if total else "{desc} {n_fmt}  {unit}"
            self._bar = tqdm(
                total=total or None,
                initial=start,
                desc=stage,
                file=self.stream,
                unit="",
                bar_format=form,
                **_width(self.stream),
            )

    def update(self, step: int, images: float = 0.0, figures: Mapping[str, float] | None = None) -> None:
        """The step that is done, photos since the last call, and figures to show (they stay until replaced)."""
        self._images += images
        self._figures.update(figures or {})
        moved, self.step = step - self.step, step
        if not self.enabled:
            return
        if self._bar is not None:
            self._bar.unit = self._tail()
            self._bar.update(moved)
            return
        now = time.monotonic()
        if now - self._shown_at >= self.every_s or (self.total and step >= self.total):
            self._shown_at = now
            self.say(self.line())

    def advance(self, images: int, figures: Mapping[str, float] | None = None) -> None:
        """Of a stage whose steps are photos: so many more are done, at most its total."""
        done = self.step + images
        self.update(min(done, self.total) if self.total else done, images, figures)

    def _tail(self) -> str:
        spent = time.monotonic() - self._began
        parts = []
        if self._images and spent > 0:
            parts.append(f"{self._images / spent:.1f} images/s")
        parts += [f"{name} {value:.4g}" for name, value in self._figures.items()]
        done = self.step - self._start
        if self.total and done > 0:
            parts.append(f"{duration(spent / done * max(0, self.total - self.step))} left")
        return "  ".join(parts)

    def line(self) -> str:
        """The line as it stands."""
        count = f"{self.step}/{self.total}" if self.total else f"{self.step}"
        return f"{self.stage} {count}  {self._tail()}".rstrip()

    def say(self, text: str) -> None:
        """A line of its own that does not break the bar; a full disk under the stream loses it."""
        if not self.enabled:
            return
        with lines_may_be_lost():
            if self._bar is not None:
                self._bar.write(text, file=self.stream)
            else:
                self.stream.write(text + "\n")
                self.stream.flush()

    def close(self, outcome: str) -> None:
        """Ends the line and says what came of the stage, `done`, `stopped` or `failed`, and when."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        spent = duration(time.monotonic() - self._began)
        self.say(f"{self.stage} {outcome} {'in' if outcome == 'done' else 'after'} {spent}")
        self.enabled = False

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
