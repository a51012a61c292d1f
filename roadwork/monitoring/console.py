"""Keeps what other libraries say out of the console and in a log file."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

_FORMAT = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
_LIBRARIES = (
    "DeepSpeed", "accelerate", "transformers", "torch", "timm", "peft", "kornia", "datasets", "huggingface_hub",
    "matplotlib", "PIL", "fsspec", "webdataset", "tensorboard", "numexpr", "absl",
)  # fmt: skip
_MARK = "_roadwork_log_file"


@contextlib.contextmanager
def lines_may_be_lost() -> Iterator[None]:
    """A full disk under the console's file costs the lines that are written within, never what they tell of.

    A reader that closed our output is another matter: BrokenPipeError passes on, to `roadwork.cli`.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError:
        return


class _LogFile(logging.FileHandler):
    """A full or read-only disk costs records, never the run; errors are on the console anyway."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)
        except OSError:  # opening it
            return

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the base class's name
        if not isinstance(sys.exception(), OSError):  # writing
            super().handleError(record)


class _ToFile(logging.Filter):
    """Sends what a logger would not pass on to the root to the file, and only its errors to its own handlers.

    A filter on the LOGGER also works where the library adds its console handler later, on import, as DeepSpeed does.
    """

    def __init__(self, handler: logging.Handler) -> None:
        super().__init__()
        self.handler = handler

    def filter(self, record: logging.LogRecord) -> bool:
        if _reaches_root(logging.getLogger(record.name)):
            return True
        self.handler.handle(record)
        return record.levelno >= logging.ERROR


def _reaches_root(logger: logging.Logger) -> bool:
    while logger.propagate and logger.parent is not None:
        logger = logger.parent
    return logger is logging.getLogger()


def quiet_libraries(log_file: str | os.PathLike[str]) -> None:
    """Sends log records and warnings of the libraries to `log_file`; only errors still reach the console.

    Call it before the heavy imports, and once more after them: libraries that configured loggers of their own meanwhile
    are then caught too. Idempotent. Errors go to both places. Uncaught exceptions are untouched. Messages written from
    C++ (`[W...]` of torch.distributed) obey TORCH_CPP_LOG_LEVEL, which is set here unless it was, and counts only
    before torch is imported.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    root = logging.getLogger()
    handler = next((h for h in root.handlers if getattr(h, _MARK, None) == os.fspath(log_file)), None)
    if handler is None:
        Path(log_file).parent.mkdir(parents=True, exist_ok=True)
        handler = _LogFile(log_file, encoding="utf-8", delay=True)
        handler.setFormatter(_FORMAT)
        setattr(handler, _MARK, os.fspath(log_file))
        root.addHandler(handler)
        console = logging.StreamHandler(sys.stderr)
        console.setLevel(logging.ERROR)
        setattr(console, _MARK, os.fspath(log_file))
        root.addHandler(console)
    logging.captureWarnings(True)
    for name in _LIBRARIES:
        logger = logging.getLogger(name)
        for own in [h for h in logger.handlers if type(h) is logging.StreamHandler]:
            logger.removeHandler(own)
            logger.propagate = True
        if not any(isinstance(f, _ToFile) for f in logger.filters):
            logger.addFilter(_ToFile(handler))


@contextlib.contextmanager
def captured_output(log_file: str | os.PathLike[str]) -> Iterator[None]:
    """Everything that this process and its children write to standard output and error goes to `log_file` meanwhile.

    For the few seconds in which an engine starts and compilers talk (ninja writes to the file descriptor itself). When
    the block raises, what it had written is shown on the console after all.
    """
    Path(log_file).parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    log = os.open(log_file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    start = os.fstat(log).st_size
    try:
        os.dup2(log, 1)
        os.dup2(log, 2)
        yield
    except BaseException:
        sys.stdout.flush()
        sys.stderr.flush()
        text = os.pread(log, os.fstat(log).st_size - start, start)
        os.write(kept[1], text)
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(kept[0], 1)
        os.dup2(kept[1], 2)
        for fd in (*kept, log):
            os.close(fd)
