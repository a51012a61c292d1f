"""The same promises for a folder on a disk and for a URL: whole files by name, and nothing where there is nothing."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from roadwork.data.cache import is_remote
from roadwork.data.index import read_manifest
from roadwork.data.shards import atomic_file
from roadwork.data.store import LocalStore, RemoteStore, Store, open_store
from roadwork.errors import UserError

_NUMBER = itertools.count()


@pytest.fixture(params=["disk", "memory", "file URL"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    if request.param == "disk":
        (tmp_path / "made" / ".build").mkdir(parents=True)
        yield open_store(tmp_path / "made")
    elif request.param == "memory":
        url = f"memory://store-{next(_NUMBER)}"
        yield open_store(url)
        files = fsspec.filesystem("memory")
        if files.exists(url):
            files.rm(url, recursive=True)
    else:
        yield open_store(f"file://{tmp_path}/by/url/")


def test_what_was_written_is_read_and_can_be_replaced(store: Store) -> None:
    for data in (b"first", b"", b"longer than the first", bytes(range(256)) * 40):
        store.write("manifest.json", data)
        assert store.read("manifest.json") == data and store.size("manifest.json") == len(data)


def test_what_is_not_there_is_told_apart_from_what_is_empty(store: Store) -> None:
    assert store.size("absent") is None
    with pytest.raises(FileNotFoundError):
        store.read("absent")
    store.write("empty", b"")
    assert store.size("empty") == 0 and store.read("empty") == b""


def test_names_are_sorted_and_those_of_one_folder_only(store: Store) -> None:
    assert store.names() == [] and store.names(".build") == []
    for name in ("b.tar", ".build/two", "a.tar", ".build/one"):
        store.write(name, name.encode())
    assert store.names() == ["a.tar", "b.tar"]
    assert store.names(".build") == ["one", "two"]
    assert store.names("nowhere") == []
    assert store.read(".build/one") == b".build/one"


def test_removing_is_done_when_it_returns_and_may_be_done_twice(store: Store) -> None:
    store.write("a", b"1")
    store.remove("a")
    store.remove("a")
    assert store.size("a") is None and store.names() == []


def test_a_staged_file_appears_at_the_end_of_the_block(store: Store) -> None:
    store.write("train-000000.tar", b"old")
    with store.staged("train-000000.tar") as path, atomic_file(path) as file:
        file.write(b"new bytes")
    assert store.read("train-000000.tar") == b"new bytes"
    assert store.names() == ["train-000000.tar"], "something temporary was left"


def test_a_staged_file_whose_block_fails_never_appears(store: Store) -> None:
    with (
        pytest.raises(RuntimeError, match="half way"),
        store.staged("train-000001.tar") as path,
        atomic_file(path) as file,
    ):
        file.write(b"half")
        raise RuntimeError("half way")
    assert store.size("train-000001.tar") is None and store.names() == []


@pytest.mark.parametrize(
    ("place", "remote"),
    [
        ("/data/shards", False),
        ("shards", False),
        ("s3://bucket/shards", True),
        ("memory://x", True),
        ("file:///x", True),
        ("C:/data", False),
        (Path("a/b"), False),
    ],
)
def test_a_url_is_told_from_a_folder(place: str | Path, remote: bool) -> None:
    assert is_remote(place) is remote


def test_the_kind_of_store_follows_the_place(tmp_path: Path) -> None:
    assert isinstance(open_store(tmp_path), LocalStore) and isinstance(open_store("memory://a"), RemoteStore)
    with pytest.raises(UserError, match="whose fsspec package is installed"):
        open_store("nosuch://bucket/shards")


def test_a_local_write_that_fails_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(tmp_path)
    store.write("a", b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        store.write("a", b"new")
    assert store.read("a") == b"old" and store.names() == ["a"]


class Locked(MemoryFileSystem):
    """A backend whose errors are its own."""

    protocol = "locked"

    def cat_file(self, path, **_):
        raise RuntimeError("no credentials found")


def test_whatever_a_backend_raises_is_one_line() -> None:
    fsspec.register_implementation("locked", Locked, clobber=True)
    with pytest.raises(UserError, match=r"manifest.json cannot be read \(RuntimeError: no credentials found\)"):
        read_manifest("locked://shards")
