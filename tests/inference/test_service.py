"""The service as a process of its own, asked by a real client over loopback: good pictures, bad ones, many at once."""

from __future__ import annotations

import asyncio
import io
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from roadwork.errors import UserError
from roadwork.inference.options import ServiceOptions
from roadwork.models import RoadworkDetector
from roadwork.models.saved import CutPhoto
from tests.data.photos import repeated_scans
from tests.inference.spread import spread_answers, tiny_detector
from tests.launching import ROOT, environment, free_port

httpx = pytest.importorskip("httpx")
from roadwork.inference.service import serve  # noqa: E402 - needs the extra `serve`

MAX_BYTES = 200_000


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny detector with random weights whose answers differ from picture to picture."""
    detector = spread_answers(tiny_detector(), pictures())
    return detector.save_pretrained(tmp_path_factory.mktemp("served") / "model", {"temperature": 0.7, "bias": -0.2})


@contextmanager
def running(model: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The service on a free port of loopback, and its process; killed at the end where it still runs."""
    port = free_port()
    command = [sys.executable, "launch/serve.py", "--model", str(model), "--port", str(port), *options]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    client = httpx.Client(timeout=5)
    url, until = f"http://127.0.0.1:{port}", time.monotonic() + 200
    try:
        while True:
            try:
                client.get(f"{url}/health").raise_for_status()
                break
            except httpx.HTTPError:
                assert process.poll() is None, process.communicate()[0]
                assert time.monotonic() < until, "the service did not start"
                time.sleep(0.1)
        yield url, process
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def client(model: Path) -> Iterator[httpx.Client]:
    """Of a service with small limits, and time to gather."""
    options = ("--max_wait_ms=100", f"--max_bytes={MAX_BYTES}", "--max_pixels=4000000", "--timeout_s=120")
    with running(model, *options) as (url, _), httpx.Client(base_url=url, timeout=60) as client:
        yield client


def photo(seed: int, width: int, height: int, kind: str = "JPEG", **options: bool) -> bytes:
    """A blocky random picture."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    small.resize((width, height), Image.Resampling.BICUBIC).save(buffer, kind, **options)
    return buffer.getvalue()


def huge_png(side: int) -> bytes:
    """A few dozen bytes whose header promises side x side pixels."""
    head = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    parts = [head, b"IDAT" + zlib.compress(b""), b"IEND"]
    chunks = (struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def form(charset: str, name: str) -> dict[str, object]:
    """A form of one word whose text is said to be in some charset."""
    return {
        "content": f'--x\r\ncontent-disposition: form-data; name="{name}"\r\n\r\nb\r\n--x--\r\n'.encode(),
        "headers": {"content-type": f"multipart/form-data; boundary=x; charset={charset}"},
    }


JPEG = {"content-type": "image/jpeg"}
GOOD = photo(0, 224, 224)
BAD: dict[str, tuple[int, str, Callable[[], dict[str, object]]]] = {
    "empty": (400, "empty", lambda: {"content": b"", "headers": JPEG}),
    "cut JPEG": (422, "truncated_image|damaged_image", lambda: {"content": GOOD[: len(GOOD) // 2], "headers": JPEG}),
    "cut JPEG with an end": (422, "truncated_image|damaged_image", lambda: {"content": GOOD[:-2000] + b"\xff\xd9"}),
    "scan repeated": (422, "too_many_scans", lambda: {"content": repeated_scans(photo(2, 320, 180, progressive=True), 40)}),
    "head of a JPEG": (422, "not_an_image|truncated_image|damaged_image", lambda: {"content": GOOD[:20], "headers": JPEG}),
    "cut PNG": (422, "truncated_image|damaged_image", lambda: {"content": photo(1, 64, 64, "PNG")[:-60]}),
    "text": (422, "not_an_image", lambda: {"content": b"hello", "headers": JPEG}),
    "vector drawing": (422, "not_an_image", lambda: {"content": b"%!PS-Adobe-3.0 EPSF-3.0\n"}),
    "JSON": (415, "content type 'application/json'", lambda: {"json": {"image": "x"}}),
    "a form of words": (415, "content type", lambda: {"data": {"image": "x"}}),
    "too small": (422, "too_small", lambda: {"content": photo(0, 8, 8), "headers": JPEG}),
    "too many bytes": (413, "larger than", lambda: {"content": b"x" * (MAX_BYTES + 1), "headers": JPEG}),
    "too many bytes in pieces": (413, "larger than", lambda: {"content": iter([b"x" * 50_000] * 9), "headers": JPEG}),
    "too many bytes in a form": (413, "larger than", lambda: {"files": {"image": b"x" * (MAX_BYTES + 1)}}),
    "bomb": (413, "too_many_pixels", lambda: {"content": huge_png(60_000)}),
    "small bomb": (413, "too_many_pixels", lambda: {"content": huge_png(2_001)}),
    "form without a file": (422, "no file", lambda: {"files": {"note": (None, "words")}}),
    "form with two files": (400, "Too many files", lambda: {"files": {"a": GOOD, "b": GOOD}}),
    "form with an empty file": (400, "empty", lambda: {"files": {"image": b""}}),
    "form of text": (422, "not_an_image", lambda: {"files": {"image": b"hello"}}),
    "form without a boundary": (400, "boundary", lambda: {"content": GOOD, "headers": {"content-type": "multipart/form-data"}}),
    "broken form": (400, "form", lambda: {"content": GOOD, "headers": {"content-type": "multipart/form-data; boundary=x"}}),
    "odd charset": (422, "no file", lambda: form("hex", "a")),
    "charset that reads nothing": (400, "form cannot be read", lambda: form("undefined", "a")),
    "charset that stumbles": (400, "form cannot be read", lambda: form("punycode", "a..b")),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_the_clients_fault_and_says_why(client: httpx.Client, name: str) -> None:
    status, reason, request = BAD[name]
    answer = client.post("/predict", **request())
    assert answer.status_code == status, answer.text
    assert re.search(reason, answer.json()["detail"]), answer.text
    assert client.post("/predict", content=GOOD).status_code == 200


def test_a_huge_head_is_refused_and_the_service_goes_on(client: httpx.Client) -> None:
    answer = client.post("/predict", content=GOOD, headers={"x": "y" * 100_000})
    assert answer.status_code in (400, 431) and answer.text  # by how many pieces it arrived in
    assert client.get("/predict").status_code == 405
    assert client.post("/other", content=GOOD).status_code == 404
    with socket.create_connection(("127.0.0.1", client.base_url.port)) as rude:  # leaves in mid-sentence
        rude.sendall(b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\nabc")
    assert client.post("/predict", content=GOOD).status_code == 200


def pictures() -> list[bytes]:
    """Of several sizes and formats: the service's own, and some with many views."""
    shapes = [(224, 224), (640, 360), (300, 700), (16, 16), (1000, 90)]
    return [photo(i, *shapes[i % 5], "PNG" if i % 4 == 3 else "JPEG") for i in range(20)]


def test_many_at_once_get_the_answers_of_predict(client: httpx.Client, model: Path) -> None:
    sent, clients, rounds = pictures(), 8, 5

    async def load() -> list[list[tuple[int, float]]]:
        async with httpx.AsyncClient(base_url=client.base_url, timeout=120) as many:

            async def one(number: int) -> list[tuple[int, float]]:
                found = []
                for i in range(rounds):
                    which = (number * 7 + i * 3) % len(sent)
                    form = {"files": {"image": ("x.jpg", sent[which])}} if i % 2 else {"content": sent[which]}
                    answer = await many.post("/predict", **form)
                    assert answer.status_code == 200, answer.text
                    found.append((which, answer.json()["probability"]))
                return found

            return await asyncio.gather(*(one(number) for number in range(clients)))

    before, batches = counted(client), ran(client)
    found = [pair for part in asyncio.run(load()) for pair in part]
    detector = RoadworkDetector.from_pretrained(model)
    expected = {which: detector.predict(sent[which]) for which in {which for which, _ in found}}
    assert len(found) == clients * rounds and np.ptp(list(expected.values())) > 1e-2
    assert max(abs(p - expected[which]) for which, p in found) < 1e-5
    assert counted(client) - before == len(found)
    assert ran(client) - batches < len(found)  # some shared a forward pass


def ran(client: httpx.Client) -> int:
    """Forward passes by the service's own count."""
    return int(re.findall(r"^roadwork_batch_photos_count (\d+)$", client.get("/metrics").text, flags=re.M)[0])


def counted(client: httpx.Client) -> int:
    """Answers of status 200 by the service's own count."""
    page = client.get("/metrics")
    assert page.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = re.search(r'^roadwork_requests_total\{status="200"\} (\d+)$', page.text, flags=re.M)
    return int(found[1]) if found else 0


def test_metrics_agree_with_themselves(client: httpx.Client) -> None:
    client.post("/predict", content=GOOD)
    client.post("/predict", content=b"hello")
    text = client.get("/metrics").text
    values = dict(re.findall(r"^(\w+(?:\{[^}]*\})?) (\S+)$", text, flags=re.M))
    requests = sum(int(v) for k, v in values.items() if k.startswith("roadwork_requests_total"))
    assert int(values["roadwork_request_seconds_count"]) == requests
    assert values['roadwork_request_seconds_bucket{le="+Inf"}'] == values["roadwork_request_seconds_count"]
    answered = int(values['roadwork_requests_total{status="200"}'])
    assert float(values["roadwork_batch_photos_sum"]) == answered
    assert not [k for k in values if 'status="5' in k]
    assert values["roadwork_pending_requests"] == "0"


def test_sigterm_answers_what_is_here_and_leaves_with_status_0(model: Path) -> None:
    with running(model, "--max_wait_ms=2000", "--timeout_s=120") as (url, process):  # answers wait for company

        async def scene() -> list[int]:
            async with httpx.AsyncClient(base_url=url, timeout=120) as client:
                for _ in range(20):  # a machine may be too slow to have all four in the house at once
                    asked = [asyncio.create_task(client.post("/predict", content=GOOD)) for _ in range(4)]
                    while not any(answer.done() for answer in asked):
                        if "roadwork_pending_requests 4" in (await client.get("/metrics")).text:
                            process.send_signal(signal.SIGTERM)
                            return [(await answer).status_code for answer in asked]
                    await asyncio.gather(*asked)
                return []

        assert asyncio.run(scene()) == [200] * 4
        assert process.wait(60) == 0


def test_slow_senders_and_crowds_are_turned_away(model: Path) -> None:
    from roadwork.inference.options import ServiceOptions
    from roadwork.inference.service import Service, create_app

    service = Service(RoadworkDetector.from_pretrained(model), ServiceOptions(timeout_s=0.5, max_pending=1))

    async def never() -> AsyncIterator[bytes]:
        yield GOOD[:100]
        await asyncio.sleep(3600)

    async def scene() -> tuple[httpx.Response, httpx.Response]:
        transport = httpx.ASGITransport(create_app(service))
        async with service.running(), httpx.AsyncClient(transport=transport, base_url="http://service") as client:
            slow = asyncio.create_task(client.post("/predict", content=never()))
            while not service.metrics.pending:
                await asyncio.sleep(0)
            crowd = await client.post("/predict", content=GOOD)
            return await slow, crowd

    slow, crowd = asyncio.run(scene())
    assert slow.status_code == 408 and "0.5 s" in slow.json()["detail"]
    assert crowd.status_code == 503 and crowd.headers["retry-after"]
    assert service.metrics.pending == 0


def test_what_takes_too_long_is_answered_so_and_does_not_hold_up_the_end(model: Path) -> None:
    from roadwork.inference.options import ServiceOptions
    from roadwork.inference.service import Service, create_app

    class Slow(RoadworkDetector):
        """Cuts no photo before it is told to."""

        def cut(self, image: object) -> CutPhoto:
            go.wait(10)
            done.append(super().cut(image))
            return done[-1]

    go, done = threading.Event(), list[CutPhoto]()
    service = Service(Slow.from_pretrained(model), ServiceOptions(timeout_s=0.2))

    async def scene() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(service))
        async with service.running(), httpx.AsyncClient(transport=transport, base_url="http://service") as client:
            return await client.post("/predict", content=GOOD)

    answer = asyncio.run(scene())
    assert not done  # the service has closed, the thread has not
    go.set()
    assert answer.status_code == 503 and "0.2 s" in answer.json()["detail"] and answer.headers["retry-after"]
    assert service.metrics.pending == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device": "abacus"}, "--device is abacus; give auto, or what this machine has: cpu"),
        ({"device": "cuda:99"}, "--device is cuda:99; give auto, or what this machine has: cpu"),
        (
            {"host": "no-such-host.invalid"},
            "--host no-such-host.invalid --port [0-9]+: .*; give an address of this machine",
        ),
        ({"host": "203.0.113.1"}, "--host 203.0.113.1 --port [0-9]+: Cannot assign requested address; give"),
    ],
)
def test_a_device_or_an_address_that_is_not_here_is_one_line(options: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words) as told:
        serve(ServiceOptions(model="not read before these", port=free_port(), **options))
    assert "\n" not in str(told.value)


def test_an_address_that_another_program_has_is_one_line_before_the_model_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"--host 127.0.0.1 --port {port}: Address already in use"):
            serve(ServiceOptions(model="not read before these", port=port))
