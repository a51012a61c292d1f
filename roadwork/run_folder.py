"""The run folder: made where it is not there, and seen to take what a run writes."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from roadwork.config import Config
from roadwork.errors import UserError


def prepare_folder(config: Config) -> Path:
    """Make the run folder and its `logs/`. Raises UserError where it cannot be written."""
    folder = Path(config.run.dir)
    probe = folder / f".probe-{socket.gethostname()}-{os.getpid()}"
    try:
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        probe.write_bytes(bytes(4096))  # a read-only or full disk shows only when something is written
        probe.unlink()
    except OSError as error:
        raise UserError(f"run.dir {folder} cannot be written: {error.strerror}; give another --run.dir") from None
    return folder
