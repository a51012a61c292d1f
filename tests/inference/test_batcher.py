"""What arrives together is computed together; nobody's trouble is anybody else's."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import pytest

from roadwork.inference.batcher import Batcher


def test_requests_gather_while_the_network_is_busy() -> None:
    sizes: list[int] = []
    first, go = threading.Event(), threading.Event()

    def compute(items: Sequence[int]) -> list[float]:
        first.set()
        go.wait(30)
        return [item / 2 for item in items]

    async def scene() -> list[float]:
        batcher = Batcher(compute, max_batch=4, max_wait_s=0.0, computed=sizes.append)
        await batcher.start()
        asked = [asyncio.create_task(batcher.ask(0))]
        await asyncio.to_thread(first.wait, 30)
        asked += [asyncio.create_task(batcher.ask(i)) for i in range(1, 7)]
        gone = asked.pop(3)
        await asyncio.sleep(0)
        gone.cancel()
        go.set()
        answers = await asyncio.gather(*asked)
        await batcher.close()
        return answers

    assert asyncio.run(scene()) == [0.0, 0.5, 1.0, 2.0, 2.5, 3.0]
    assert sizes == [1, 3, 2]  # four were taken, one caller of which had gone, then the rest


def test_a_failing_batch_is_told_to_its_callers_and_the_next_one_is_computed() -> None:
    def compute(items: Sequence[int]) -> list[float]:
        if 13 in items:
            raise RuntimeError("out of memory")
        return [float(item) for item in items]

    async def scene() -> None:
        batcher = Batcher(compute, max_batch=8, max_wait_s=0.0)
        await batcher.start()
        with pytest.raises(RuntimeError, match="out of memory"):
            await batcher.ask(13)
        assert await batcher.ask(7) == 7.0
        await batcher.close()

    asyncio.run(scene())
