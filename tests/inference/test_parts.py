"""Part files: nothing lost but the batch in work, nothing doubled, equal sets or no result."""

import os

import pytest

from roadwork.errors import UserError
from roadwork.inference.parts import PartWriter, merge, open_parts, read_parts, write_atomic


def write(folder, rank, *ids):
    with PartWriter(folder, "test", rank) as writer:
        writer.append([{"id": name, "z": 0.1} for name in ids])


def test_parts_of_any_number_of_processes_merge_in_the_order_of_the_index(tmp_path):
    write(tmp_path, 0, "c", "a")
    write(tmp_path, 2, "b")
    merged = merge(read_parts(tmp_path, "test"), ["a", "b", "c"], "split test")
    assert [record["id"] for record in merged] == ["a", "b", "c"]


@pytest.mark.parametrize("cut", [1, 5, 12])
def test_a_torn_last_line_is_not_done_and_is_written_again(tmp_path, cut):
    write(tmp_path, 0, "a", "b")
    path = next(tmp_path.glob("*.jsonl"))
    os.truncate(path, path.stat().st_size - cut)
    assert set(read_parts(tmp_path, "test")) == {"a"}
    write(tmp_path, 0, "b", "c")
    assert set(read_parts(tmp_path, "test")) == {"a", "b", "c"}


def test_missing_foreign_and_doubled_ids_are_refused(tmp_path):
    write(tmp_path, 0, "a", "b")
    with pytest.raises(UserError, match="1 photos of the index have no result.*first: c"):
        merge(read_parts(tmp_path, "test"), ["a", "b", "c"], "split test")
    with pytest.raises(UserError, match="1 results no photo"):
        merge(read_parts(tmp_path, "test"), ["a"], "split test")
    with pytest.raises(UserError, match="holds 1 ids twice"):
        merge(read_parts(tmp_path, "test"), ["a", "b", "b"], "split test")
    write(tmp_path, 1, "b")
    with pytest.raises(UserError, match="photo b stands twice"):
        read_parts(tmp_path, "test")


def test_damage_in_the_middle_is_named(tmp_path):
    write(tmp_path, 0, "a", "b")
    path = next(tmp_path.glob("*.jsonl"))
    path.write_bytes(b"{" + path.read_bytes())
    with pytest.raises(UserError, match="line 1 is damaged"):
        read_parts(tmp_path, "test")


def test_parts_of_another_model_are_not_continued(tmp_path):
    assert not open_parts(tmp_path, "model one")
    write(tmp_path, 0, "a")
    assert open_parts(tmp_path, "model one")
    assert set(read_parts(tmp_path, "test")) == {"a"}
    assert not open_parts(tmp_path, "model two")
    assert read_parts(tmp_path, "test") == {}


def test_atomic_writing_leaves_one_file(tmp_path):
    write_atomic(tmp_path / "x.csv", "old")
    write_atomic(tmp_path / "x.csv", "new\n")
    assert [path.name for path in tmp_path.iterdir()] == ["x.csv"]
    assert (tmp_path / "x.csv").read_text() == "new\n"
