"""Reading byte ranges: exact sizes, few open files, short and missing files, forks, other processes."""

from __future__ import annotations

import os
import pickle
import threading
from pathlib import Path

import numpy as np
import pytest

from roadwork.data.ranges import RangeReader


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    made = []
    for number in range(6):
        path = tmp_path / f"train-{number:06d}.tar"
        path.write_bytes(np.random.default_rng(number).integers(0, 256, 4096, dtype=np.uint8).tobytes())
        made.append(path)
    return made


def open_files(folder: Path) -> set[str]:
    """Names of the folder's files that this process holds open."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            found.add(os.readlink(f"/proc/self/fd/{name}"))
        except OSError:
            continue
    return {name for name in found if Path(name).parent == folder}


def test_ranges_are_exact_in_any_order(files: list[Path]) -> None:
    reader = RangeReader(files)
    whole = [path.read_bytes() for path in files]
    rng = np.random.default_rng(0)
    for _ in range(200):
        number, start = int(rng.integers(6)), int(rng.integers(4096))
        size = int(rng.integers(4096 - start + 1))
        assert reader.read(number, start, size) == whole[number][start : start + size]


@pytest.mark.parametrize(("offset", "size", "end"), [(4000, 97, 4096), (4096, 1, 4096), (9000, 5, 9000)])
def test_a_file_that_ends_too_early_is_named_with_the_byte(files: list[Path], offset: int, size: int, end: int) -> None:
    with pytest.raises(OSError, match=rf"train-000002.tar ends at byte {end}, before byte {offset + size}"):
        RangeReader(files).read(2, offset, size)


def test_a_file_that_is_gone_is_an_error_of_that_file_alone(files: list[Path]) -> None:
    reader = RangeReader(files)
    files[3].unlink()
    with pytest.raises(FileNotFoundError, match="train-000003.tar"):
        reader.read(3, 0, 10)
    assert len(reader.read(4, 0, 10)) == 10


def test_at_most_so_many_files_stay_open_and_the_ones_in_use_do(files: list[Path]) -> None:
    reader = RangeReader(files, max_open=2)
    for number in range(6):
        reader.read(number, 0, 1)
        reader.read(0, 0, 1)  # in use all the time
    assert open_files(files[0].parent) == {str(files[0]), str(files[5])}
    reader.close()
    assert not open_files(files[0].parent)


def test_a_closed_reader_opens_again_and_leaves_nothing_when_it_is_forgotten(files: list[Path]) -> None:
    reader = RangeReader(files)
    reader.read(0, 0, 1)
    reader.close()
    assert len(reader.read(1, 5, 7)) == 7
    del reader
    assert not open_files(files[0].parent)


def test_a_reader_travels_to_another_process_without_its_descriptors(files: list[Path]) -> None:
    reader = RangeReader(files, max_open=3)
    expected = reader.read(2, 100, 50)
    copy = pickle.loads(pickle.dumps(reader))
    assert copy.read(2, 100, 50) == expected
    reader.close()
    assert copy.read(2, 100, 50) == expected


def test_a_forked_child_reads_through_descriptors_of_its_own(files: list[Path]) -> None:
    reader = RangeReader(files)
    expected = reader.read(1, 10, 20)
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:  # no pytest in here
        status = 1
        try:
            status = 0 if reader.read(1, 10, 20) == expected and reader._pid == os.getpid() else 2
            os.write(send, b"done")
        finally:
            os._exit(status)
    os.close(send)
    assert os.read(receive, 10) == b"done"
    os.close(receive)
    assert os.waitpid(child, 0)[1] == 0
    assert reader.read(1, 10, 20) == expected, "the child closed its parent's descriptor"


def test_a_replaced_file_is_read_as_it_was_when_opened(files: list[Path]) -> None:
    """Shards are replaced by rename: a reader that has one open goes on reading the old bytes, never a mixture."""
    reader = RangeReader(files)
    before = reader.read(0, 0, 4096)
    fresh = files[0].with_suffix(".new")
    fresh.write_bytes(b"\0" * 4096)
    fresh.replace(files[0])
    assert reader.read(0, 0, 4096) == before
    reader.close()
    assert reader.read(0, 0, 4096) == b"\0" * 4096


def test_threads_share_a_reader(files: list[Path]) -> None:
    reader = RangeReader(files)
    whole = [path.read_bytes() for path in files]
    wrong: list[int] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(300):
            number, start = int(rng.integers(6)), int(rng.integers(4000))
            if reader.read(number, start, 90) != whole[number][start : start + 90]:
                wrong.append(number)

    for number in range(6):
        reader.read(number, 0, 1)
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
