"""What every entry point shares: a parser and a frame that turn a user's mistake into one line and exit status 2."""

from __future__ import annotations

import argparse
import functools
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

from roadwork.errors import UserError

PATIENCE_S = 20.0
"""How long a rank waits for the first one's word on a mistake that all of them see."""


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line without the usage text, and whose help states defaults."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        fail(f"{message} (see {self.prog} --help)")


def fail(message: str) -> NoReturn:
    """Write `error: message` as one line to stderr and raise SystemExit(2); of a launched job's ranks, only the first.

    The launcher ends all ranks as soon as one has left, so the others give the first one time to say its line; what no
    other rank says is said after that.
    """
    line = "error: " + " ".join(message.split()) + "\n"
    if os.environ.get("RANK", "0") != "0":
        signal.signal(signal.SIGTERM, lambda *_: os._exit(2))
        time.sleep(PATIENCE_S)
    sys.stderr.write(line)
    sys.stderr.flush()
    raise SystemExit(2)


def exit_on_user_error(main: Callable[..., int | None]) -> Callable[..., int]:
    """Decorator for `main(argv)`: UserError ends as one line and status 2, ctrl-C as 130, success as 0.

    All but success leave by SystemExit; so does a run whose reader has closed our output, with status 0.
    """

    @functools.wraps(main)
    def framed(*args: Any, **kwargs: Any) -> int:
        try:
            return main(*args, **kwargs) or 0
        except UserError as error:
            fail(str(error))
        except KeyboardInterrupt:
            sys.stderr.write("interrupted\n")
            raise SystemExit(130) from None
        except BrokenPipeError:  # `... | head` closed our output
            sys.stderr.close()
            raise SystemExit(0) from None

    return framed
