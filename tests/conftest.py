"""Fixtures for all tests: a launcher, and small shards that every room can train on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.launching import Finished, Job, build_shards, start

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is there: files run side by side, one core each

Launch = Callable[..., Finished]

settings.register_profile("tests", deadline=None)  # nothing may depend on how fast the machine is
settings.load_profile("tests")


LONG = (
    "slurm/test_slurm",
    "faults/test_signals",
    "distributed/test_pretrain",
    "faults/",
    "distributed/",
    "test_processes",
)
"""Files that take minutes, the longest first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files begin first: one that begins last keeps one core waiting for minutes."""
    items.sort(key=lambda item: next((i for i, part in enumerate(LONG) if part in item.nodeid), len(LONG)))


@pytest.fixture
def launch() -> Iterator[Launch]:
    """Run a script under `accelerate launch` to its end; whatever still runs when the test ends is killed."""
    jobs: list[Job] = []

    def run(script: str, *arguments: str, processes: int = 2, timeout: float = 900, **extra: str) -> Finished:
        job = start(script, *arguments, processes=processes, **extra)
        jobs.append(job)
        return job.wait(timeout)

    yield run
    for job in jobs:
        job.kill()


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of the embedded street benchmark: 40 photos, 64 px views, no target region."""
    folder = tmp_path_factory.mktemp("data") / "shards"
    build_shards(folder)
    return folder
