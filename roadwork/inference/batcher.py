"""Requests that arrive at the same time share one forward pass."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

Item = tuple[Any, "asyncio.Future[float]"]


class Batcher:
    """Collects items while the network is busy and answers them together.

    One thread computes. While it does, requests gather; when it is free it takes up to `max_batch` of them, and only
    an idle network waits `max_wait_s` for company. A request whose caller has gone is not computed.

    Args:
        compute: items -> one answer each; runs in a thread of its own, never twice at a time.
        max_batch: items per call at most.
        max_wait_s: how long the first item waits for others.
        computed: told the size of each batch.
    """

    def __init__(
        self,
        compute: Callable[[Sequence[Any]], Sequence[float]],
        max_batch: int,
        max_wait_s: float,
        computed: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._compute, self._max_batch, self._max_wait_s, self._computed = compute, max_batch, max_wait_s, computed
        self._queue: asyncio.Queue[Item] = asyncio.Queue()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="network")
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to answer; needs a running event loop."""
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Stop. Items that nobody has answered are cancelled; a server calls this after its last request."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        while not self._queue.empty():
            self._queue.get_nowait()[1].cancel()
        await asyncio.to_thread(self._thread.shutdown)

    async def ask(self, item: Any) -> float:
        """The answer to one item; raises what `compute` raised."""
        answer: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._queue.put_nowait((item, answer))
        return await answer

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = [(item, answer) for item, answer in await self._gather() if not answer.done()]
            if not batch:
                continue
            self._computed(len(batch))
            try:
                values = await loop.run_in_executor(self._thread, self._compute, [item for item, _ in batch])
            except Exception as error:  # whatever it is, each caller hears of it, and the next batch is computed
                for _, answer in batch:
                    if not answer.done():
                        answer.set_exception(error)
                continue
            for (_, answer), value in zip(batch, values, strict=True):
                if not answer.done():
                    answer.set_result(value)

    async def _gather(self) -> list[Item]:
        """At least one item: what has gathered already, else what arrives within the wait; up to the limit."""
        batch = [await self._queue.get()]
        if self._queue.empty():
            await asyncio.sleep(self._max_wait_s)
        while len(batch) < self._max_batch and not self._queue.empty():
            batch.append(self._queue.get_nowait())
        return batch
