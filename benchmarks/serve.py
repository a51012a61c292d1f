"""The HTTP service under a bounded load over loopback: `python -m benchmarks.serve --model DIR [--json]`.

Starts `launch/serve.py` as a process of its own, sends `--requests` JPEGs of `--size` px from `--clients` connections that
each wait for their answer (closed loop), and compares every answer with `predict`. Client and service share the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from roadwork.models import RoadworkDetector

ROOT = Path(__file__).resolve().parent.parent
PICTURES, START_S = 32, 300.0


def main() -> None:
    """Measure and print; the last line is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="runs/demo/model", help="folder of a saved model")
    parser.add_argument("--clients", type=int, default=8, help="requests under way at a time")
    parser.add_argument("--requests", type=int, default=400, help="requests in all")
    parser.add_argument("--size", type=int, default=224, help="side of the pictures in pixels")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", action="store_true", help="only the JSON line")
    options = parser.parse_args()
    pictures = [_picture(seed, options.size) for seed in range(PICTURES)]
    with _service(options.model, options.device) as url:
        asyncio.run(_load(url, pictures, options.clients, 2 * options.clients))  # warm-up
        started = time.perf_counter()
        answers = asyncio.run(_load(url, pictures, options.clients, options.requests))
        spent = time.perf_counter() - started
        health = httpx.get(f"{url}/health", timeout=30).json()
    expected = RoadworkDetector.from_pretrained(options.model).predict_batch(pictures)
    given = [(which, p) for which, status, p, _ in answers if status == 200]
    milliseconds = 1000 * np.array([seconds for _, _, _, seconds in answers])
    figures = {
        "requests": options.requests,
        "clients": options.clients,
        "size": options.size,
        "requests_per_s": options.requests / spent,
        "p50_ms": float(np.quantile(milliseconds, 0.5)),
        "p99_ms": float(np.quantile(milliseconds, 0.99)),
        "lost": options.requests - len(given),
        "max_error": max((abs(p - expected[which]) for which, p in given), default=None),
        "backbone": health["backbone"],
        "weights": health["weights"],
    }
    if not options.json:
        print(
            f"{figures['requests_per_s']:.1f} requests/s, p50 {figures['p50_ms']:.1f} ms, p99 {figures['p99_ms']:.1f} ms"
        )
    print(json.dumps(figures))


def _picture(seed: int, size: int) -> bytes:
    small = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC).save(buffer, "JPEG")
    return buffer.getvalue()


@contextmanager
def _service(model: str, device: str) -> Iterator[str]:
    """The service's address; ended by SIGTERM."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "launch/serve.py", "--model", str(Path(model).resolve()), "--port", str(port)]
    process = subprocess.Popen([*command, "--device", device], cwd=ROOT, stderr=subprocess.DEVNULL)
    url, until = f"http://127.0.0.1:{port}", time.monotonic() + START_S
    try:
        while True:
            try:
                httpx.get(f"{url}/health", timeout=5).raise_for_status()
                break
            except httpx.HTTPError:
                if process.poll() is not None or time.monotonic() > until:
                    raise SystemExit(f"the service did not start: {' '.join(command)}") from None
                time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait()


async def _load(url: str, pictures: list[bytes], clients: int, number: int) -> list[tuple[int, int, float, float]]:
    """(picture, status, probability, seconds) of each request."""
    waiting = iter(range(number))
    found: list[tuple[int, int, float, float]] = []
    limits = httpx.Limits(max_connections=clients)

    async def one(client: httpx.AsyncClient) -> None:
        for i in waiting:
            which, began = i % len(pictures), time.perf_counter()
            status, content = await _ask(client, pictures[which])
            found.append((which, status, content.get("probability", -1.0), time.perf_counter() - began))

    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:
        await asyncio.gather(*(one(client) for _ in range(clients)))
    return found


async def _ask(client: httpx.AsyncClient, picture: bytes) -> tuple[int, dict[str, Any]]:
    try:
        answer = await client.post("/predict", content=picture, headers={"content-type": "image/jpeg"})
        return answer.status_code, answer.json()
    except httpx.HTTPError:
        return 0, {}


if __name__ == "__main__":
    main()
