"""What the benchmarks of training share: small shards, and the demo's options with a few replaced."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from roadwork.command_line import parse
from roadwork.config import Config
from roadwork.data.index import ShardIndex

ROOT = Path(__file__).resolve().parent.parent


def shards_for(folder: str, view_size: int, scratch: Path, photos: int = 48) -> str:
    """`folder`, or where it is empty shards of the embedded street benchmark, built in `scratch` once for all ranks."""
    if folder:
        ShardIndex.open(folder, "train")
        return folder
    place = scratch / "shards"
    command = [sys.executable, "-m", "shards.build", "--source", f"street:{photos}", "--out", str(place)]
    subprocess.run(
        [*command, "--view-size", str(view_size), "--val-fraction", "0.2"],
        cwd=ROOT,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return str(place)


def options(run: Path, shards: str, gpu: bool, *more: str) -> Config:
    """The demo's options on a CPU, those of `launch/configs/natix.yaml` on a GPU; nothing is drawn or printed.

    Raises:
        UserError: an option that does not exist or cannot work.
    """
    chosen = ROOT / "launch" / "configs" / ("natix.yaml" if gpu else "demo.yaml")
    quiet = ["--training.image_every_steps=0", "--monitoring.console=false"]
    return parse(
        "pretrain", [f"--config={chosen}", f"--run.dir={run}", f"--data.shards={shards}", *quiet, *more]
    ).config
