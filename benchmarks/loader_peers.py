"""litdata and mosaicml-streaming on the photos of `benchmarks.loader`, each in an environment of its own.

`DIR/bin/python -m benchmarks.loader_peers NAME SHARDS WORK --workers 2 --batches 40` writes the sheets of a folder of
shards in NAME's format under WORK, where they are not there yet, and prints one JSON line: photos per second and
processor milliseconds per photo. Same bytes, decoder, workers and output tensor as all others; this module imports
nothing that a peer's environment lacks: `pip install litdata mosaicml-streaming simplejpeg isal opencv-python-headless`
(streaming wants numpy below 2.2 and transformers below 5).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PEERS = ("litdata", "streaming")
PREFETCH = 4
"""Batches ahead per process."""


def sheets(shards: Path) -> Iterator[bytes]:
    """The JPEG of every photo of the train split, in shard order."""
    for path in sorted(shards.glob("train-*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".views.jpg"):
                    file = tar.extractfile(member)
                    assert file is not None
                    yield file.read()


def repeated(shards: Path, photos: int) -> Iterator[bytes]:
    """The sheets again and again, at least `photos` of them: a peer starts new processes for each of its epochs."""
    written = 0
    while written < photos:
        for sheet in sheets(shards):
            written += 1
            yield sheet


def write(name: str, shards: Path, out: Path, photos: int) -> None:
    """The sheets in the peer's own format, as bytes: decoding is the reader's, as for all contenders."""
    if name == "litdata":
        from litdata.streaming.cache import Cache

        cache = Cache(str(out), chunk_bytes="32MB")
        for i, sheet in enumerate(repeated(shards, photos)):
            cache[i] = {"sheet": sheet}
        cache.done()
        cache.merge()
    else:
        from streaming import MDSWriter

        with MDSWriter(out=str(out), columns={"sheet": "bytes"}, size_limit="32MB") as writer:
            for sheet in repeated(shards, photos):
                writer.write({"sheet": sheet})


def read(name: str, folder: Path, size: int, workers: int, batch: int) -> Iterator[Any]:
    """uint8 [B, V, 3, S, S] without end, shuffled, by the peer's own data set and loader."""
    import torch
    from torch.utils.data import DataLoader

    from roadwork.data.decode import decode_views

    def collate(samples: list[dict[str, bytes]]) -> torch.Tensor:
        rows = [s["sheet"] for s in samples]
        return torch.stack([torch.from_numpy(decode_views(row, views_of(row, size), size)) for row in rows])

    asked: dict[str, Any] = {
        "batch_size": batch, "num_workers": workers, "collate_fn": collate, "prefetch_factor": PREFETCH, "drop_last": True,
    }  # fmt: skip
    while True:
        if name == "litdata":
            import litdata

            dataset = litdata.StreamingDataset(str(folder), shuffle=True, drop_last=True)
            loader = litdata.StreamingDataLoader(dataset, **asked)
        else:
            import streaming

            dataset = streaming.StreamingDataset(
                local=str(folder), shuffle=True, batch_size=batch, epoch_size=10**5, num_canonical_nodes=1
            )
            loader = DataLoader(dataset, **asked)
        for views in loader:
            yield views.permute(0, 1, 4, 2, 3)


def views_of(jpeg: bytes, size: int) -> int:
    """Views of a sheet, from its frame header."""
    at = 2
    while jpeg[at + 1] not in (0xC0, 0xC1, 0xC2):
        at += 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
    return int.from_bytes(jpeg[at + 5 : at + 7], "big") // size


def ask(name: str, venv: Path | None, shards: Path, work: Path, options: dict[str, int]) -> tuple[float, float] | str:
    """(photos per second, processor milliseconds per photo) of a peer in its environment, or why there are none."""
    if venv is None:
        return "no environment was given: --peers-venv DIR"
    python = venv / "bin" / "python"
    if not python.is_file():
        return f"{python} is not there"
    command = [str(python), "-m", "benchmarks.loader_peers", name, str(shards), str(work)]
    command += [word for key, value in options.items() for word in (f"--{key}", str(value))]
    root = str(Path(__file__).parents[1])
    done = subprocess.run(
        command, cwd=root, env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return found["rate"], found["cpu_ms"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=PEERS)
    parser.add_argument("shards", type=Path, help="folder of shards")
    parser.add_argument("work", type=Path, help="where the peer's copy of the photos lies or is written")
    for name, value in (("workers", 2), ("batches", 40), ("batch", 8), ("view_size", 512)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    import torch

    from benchmarks.loader_clock import WARM, measure

    torch.set_num_threads(1)
    folder = options.work / options.name
    if not (folder / "index.json").is_file():
        ahead = 2 * PREFETCH * options.workers
        write(options.name, options.shards, folder, (WARM + options.batches + ahead) * options.batch)
    source = read(options.name, folder, options.view_size, options.workers, options.batch)
    rate, cost = measure(lambda: source, options.batches, options.batch)
    print(json.dumps({"rate": rate, "cpu_ms": cost}), flush=True)
    os._exit(0)  # a peer's loader may wait for its workers without end


if __name__ == "__main__":
    main()
