"""The HTTP service: one picture in, one calibrated probability out. FastAPI and uvicorn, the extra `serve`."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import Any

import python_multipart  # noqa: F401 - forms need it, and would say so in the first request only
import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse

from roadwork.data.images import Photo
from roadwork.data.record import Rejected
from roadwork.errors import UserError
from roadwork.inference.batcher import Batcher
from roadwork.inference.options import ServiceOptions, check_service
from roadwork.models import RoadworkDetector
from roadwork.models.saved import CutPhoto
from roadwork.monitoring.prometheus import CONTENT_TYPE, ServiceMetrics

RAW_TYPES = ("application/octet-stream", "")
HEADER_BYTES = 32 * 1024
"""Longest request head. The server answers 400 where a longer one arrives in pieces, `refuse_long_heads` 431 otherwise."""


class Service:
    """A detector behind a queue, with the limits that keep one bad request from hurting others."""

    def __init__(self, detector: RoadworkDetector, options: ServiceOptions) -> None:
        self.detector, self.options, self.metrics = detector, options, ServiceMetrics()
        self.batcher = Batcher(detector.answer, options.max_batch, options.max_wait_ms / 1000, self.metrics.computed)
        self._decoders = ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="decoder")

    @asynccontextmanager
    async def running(self, _: Any = None) -> AsyncIterator[None]:
        """Answers requests while open."""
        await self.batcher.start()
        try:
            yield
        finally:
            await self.batcher.close()
            self._decoders.shutdown(wait=False, cancel_futures=True)  # their callers have gone

    async def predict(self, request: Request) -> float:
        """Probability of the picture in a request, counted. HTTPException with the reason for what cannot be answered."""
        began, status = time.perf_counter(), 500
        try:
            if self.metrics.pending >= self.options.max_pending:
                raise HTTPException(503, "too many requests at once; try again", {"Retry-After": "1"})
            self.metrics.pending += 1
            try:
                answer = await self._predict(request)
            finally:
                self.metrics.pending -= 1
            status = 200
            return answer
        except HTTPException as refusal:
            status = refusal.status_code
            raise
        finally:
            self.metrics.answered(status, time.perf_counter() - began)

    async def _predict(self, request: Request) -> float:
        limit = self.options.timeout_s
        try:
            data = await asyncio.wait_for(read_picture(request, self.options.max_bytes), limit)
        except TimeoutError:
            raise HTTPException(408, f"the request did not arrive within {limit:g} s") from None
        if not data:
            raise HTTPException(400, "the body is empty; send one picture")
        try:
            return await asyncio.wait_for(self._answer(data), limit)
        except TimeoutError:
            raise HTTPException(503, f"no answer within {limit:g} s; try again", {"Retry-After": "1"}) from None

    async def _answer(self, data: bytes) -> float:
        loop = asyncio.get_running_loop()
        try:
            photo = await loop.run_in_executor(self._decoders, self._cut, data)
        except Rejected as rejected:
            status = 413 if rejected.reason.startswith("too_many_pixels") else 422
            raise HTTPException(status, rejected.reason) from None
        return await self.batcher.ask(photo)

    def _cut(self, data: bytes) -> CutPhoto:
        """In a thread: header first, which refuses what should not be decoded; even that may be long in a bad file."""
        return self.detector.cut(Photo(data, self.options.max_pixels).decode()[0])


async def read_picture(request: Request, max_bytes: int) -> bytes:
    """The bytes of the one picture in a raw body or a multipart form; HTTPException 400, 413, 415 or 422."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > max_bytes:
        raise _too_large(max_bytes)
    try:
        if kind == "multipart/form-data":
            return await _from_form(request, max_bytes)
        if kind in RAW_TYPES or kind.startswith("image/"):
            return b"".join([piece async for piece in _limited(request, max_bytes)])
    except ClientDisconnect:
        raise HTTPException(400, "the client went away") from None
    raise HTTPException(415, f"content type {kind!r}; send image/*, application/octet-stream or multipart/form-data")


async def _from_form(request: Request, max_bytes: int) -> bytes:
    try:
        form = await MultiPartParser(request.headers, _limited(request, max_bytes), max_files=1, max_fields=16).parse()
    except MultiPartException as error:
        raise HTTPException(400, f"the form cannot be read: {error.message}") from None
    except UnicodeError as error:  # of the charset that the form names; some raise it whatever they are given
        raise HTTPException(400, f"the form cannot be read in its charset: {str(error)[:80]}") from None
    files = [value for value in form.values() if not isinstance(value, str)]
    try:
        if not files:
            raise HTTPException(422, "the form holds no file; send the picture as a file, such as image=@photo.jpg")
        return await files[0].read()
    finally:
        await form.close()


async def _limited(request: Request, max_bytes: int) -> AsyncGenerator[bytes, None]:
    arrived = 0
    async for piece in request.stream():
        arrived += len(piece)
        if arrived > max_bytes:
            raise _too_large(max_bytes)
        yield piece


def _too_large(max_bytes: int) -> HTTPException:
    return HTTPException(413, f"the body is larger than the {max_bytes} bytes that are allowed")


async def refuse_long_heads(request: Request, call: Callable[[Request], Awaitable[Response]]) -> Response:
    """A head that came at once is parsed before the server looks at its length."""
    if sum(len(name) + len(value) for name, value in request.headers.raw) > HEADER_BYTES:
        return JSONResponse({"detail": f"the request head is larger than {HEADER_BYTES} bytes"}, 431)
    return await call(request)


def create_app(service: Service) -> FastAPI:
    """The routes: POST /predict, GET /health, GET /metrics, and FastAPI's own /docs."""
    app = FastAPI(title="Roadwork detector", lifespan=service.running)
    app.middleware("http")(refuse_long_heads)
    body = {"content": {kind: {"schema": {"type": "string", "format": "binary"}} for kind in ("image/*",)}}

    @app.post("/predict", openapi_extra={"requestBody": body})
    async def predict(request: Request) -> dict[str, float]:
        """One picture, raw or as the file of a form -> its probability of roadwork."""
        return {"probability": await service.predict(request)}

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """Alive, and with which network."""
        detector = service.detector
        return {
            "status": "ok",
            "backbone": detector.config.backbone,
            "weights": detector.weights_origin,
            "calibrated": detector.calibration is not None,
        }

    @app.get("/metrics")
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(service.metrics.exposition(), headers={"Content-Type": CONTENT_TYPE})

    return app


def serve(options: ServiceOptions) -> None:
    """Load the model and answer until SIGTERM or SIGINT; requests that are here then still get their answers.

    UserError for options that no service could use, a device or an address that this machine has not.
    """
    check_service(options)
    device = _device(options.device)
    with _address(options.host, options.port) as bound:
        signal.signal(signal.SIGTERM, _leave)  # uvicorn raises the signal again when it is done: leave with status 0
        detector = RoadworkDetector.from_pretrained(options.model, device)
        settings = uvicorn.Config(
            create_app(Service(detector, options)),
            http="h11",  # bounds the head of a request
            h11_max_incomplete_event_size=HEADER_BYTES,
            timeout_graceful_shutdown=max(1, round(options.grace_s)),
            access_log=False,
            server_header=False,
        )
        server = uvicorn.Server(settings)
        with suppress(KeyboardInterrupt):  # it has stopped in order
            server.run(sockets=[bound])
    if not server.started:
        raise SystemExit(1)  # uvicorn has said why


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):  # unknown, or torch was built without it
        here = ", ".join(["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))])
        raise UserError(f"--device is {name}; give auto, or what this machine has: {here}") from None


def _address(host: str, port: int) -> socket.socket:
    """A socket that has the address and does not listen yet: until the model is loaded, callers are refused."""
    try:
        family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, number)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: {error.strerror}; give an address of this machine") from None
    return bound


def _leave(*_: Any) -> None:
    raise SystemExit(0)
