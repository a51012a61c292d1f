"""The queue of folds with real processes: each fold once, and a dead process's fold is taken over."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from roadwork.models.fold_files import COMPLETE, fold_path, is_done
from roadwork.training.fold_queue import claim, take_folds

CONTEXT = multiprocessing.get_context("spawn")


def finish(folder: Path, fold: int, who: int) -> None:
    path = fold_path(folder, fold)
    path.mkdir(exist_ok=True)
    with (path / "done_by").open("a") as file:
        file.write(f"{who}\n")
    (path / COMPLETE).write_text("")


def worker(folder: Path, number: int, rank: int, spend_s: float, die_on: int) -> None:
    for fold in take_folds(folder, number, first=rank, poll_s=0.05):
        (folder / f"started-{rank}-{fold}").write_text("")
        if fold == die_on:
            time.sleep(60)
        time.sleep(spend_s)
        finish(folder, fold, rank)


def start(folder: Path, number: int, rank: int, spend_s: float = 0.05, die_on: int = -1):
    process = CONTEXT.Process(target=worker, args=(folder, number, rank, spend_s, die_on))
    process.start()
    return process


def join(*processes) -> None:
    for process in processes:
        process.join(timeout=60)
        if process.is_alive():
            process.kill()
            pytest.fail("a process still waits for folds")


@pytest.mark.parametrize(("number", "processes"), [(5, 2), (2, 4)])
def test_every_fold_is_done_once_whatever_the_number_of_processes(tmp_path, number, processes):
    join(*(start(tmp_path, number, rank) for rank in range(processes)))
    for fold in range(number):
        assert len((fold_path(tmp_path, fold) / "done_by").read_text().split()) == 1


def test_the_fold_of_a_killed_process_is_taken_over_by_the_living(tmp_path):
    victim = start(tmp_path, 3, rank=0, die_on=0)
    deadline = time.monotonic() + 30
    while not (tmp_path / "started-0-0").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    survivor = start(tmp_path, 3, rank=1)
    while not (is_done(tmp_path, 1) and is_done(tmp_path, 2)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert survivor.is_alive(), "it must wait: fold 0 is claimed by a living process"
    os.kill(victim.pid, signal.SIGKILL)
    join(victim, survivor)
    assert (fold_path(tmp_path, 0) / "done_by").read_text() == "1\n"


def test_a_claim_excludes_and_is_freed(tmp_path):
    with claim(tmp_path, 0) as mine, claim(tmp_path, 0) as second, claim(tmp_path, 1) as other:
        assert (mine, second, other) == (True, False, True)
    with claim(tmp_path, 0) as again:
        assert again


def test_finished_folds_are_kept(tmp_path):
    finish(tmp_path, 0, 7)
    taken = []
    for fold in take_folds(tmp_path, 2):
        taken.append(fold)
        finish(tmp_path, fold, 0)
    assert taken == [1]
