"""Options of the two tools that stand outside a run: the export to other runtimes, and the service."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from roadwork.errors import UserError


@dataclass
class ExportOptions:
    """The saved network as one graph for other runtimes."""

    model: str = "runs/demo/model"
    """Folder of a saved model."""
    out: str = ""
    """Where to write; empty: into the folder of the model, so that one upload holds all."""
    format: Literal["onnx", "torch", "both"] = "onnx"
    """onnx/model.onnx, exported/model.pt2 (torch.export), or both."""
    views: int = 0
    """Views per photo that the graph takes, 1 to 12; photos with fewer are padded. 1 suits pictures of at most 256 px;
    0: as many as the model cuts a photo into."""


@dataclass
class ServiceOptions:
    """The HTTP service: one picture in, one probability out."""

    model: str = "runs/demo/model"
    """Folder of a saved model."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all."""
    port: int = 8000
    """Port to listen on."""
    device: str = "auto"
    """Where to compute: auto (a GPU where there is one), cpu, cuda, cuda:1, ..."""
    max_batch: int = 16
    """Requests that share one forward pass at most."""
    max_wait_ms: float = 2.0
    """How long the first request of a batch waits for others while the network is idle."""
    max_pending: int = 64
    """Requests in the house at once, which bounds memory; further ones are answered 503."""
    max_bytes: int = 10_000_000
    """Largest request body; more is answered 413."""
    max_pixels: int = 25_000_000
    """Largest picture (width x height in its header); more is answered 413 before a pixel is decoded."""
    timeout_s: float = 20.0
    """How long a request may take to arrive (408) and then to be answered (503)."""
    grace_s: float = 30.0
    """After SIGTERM: how long requests that are already here may take."""


def check_service(options: ServiceOptions) -> None:
    """UserError for values that no service could use."""
    for name in ("max_batch", "max_pending", "max_bytes", "max_pixels", "timeout_s", "grace_s"):
        if not 0 < getattr(options, name) < math.inf:
            raise UserError(f"--{name} is {getattr(options, name)}; give a number above 0")
    if not 0 <= options.max_wait_ms < math.inf:
        raise UserError(f"--max_wait_ms is {options.max_wait_ms}; give 0 or more")
    if not 0 < options.port < 65536:
        raise UserError(f"--port is {options.port}; give 1 to 65535")
