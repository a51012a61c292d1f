"""Where photos come from: flat and nested parquet, globs and URLs, the hub's layout, CSV; and what is refused."""

from __future__ import annotations

import pickle
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from roadwork.data import sources
from roadwork.data.sources import CsvSource, HubSource, ParquetSource, open_source, split_of_name
from roadwork.errors import UserError
from tests.data.photos import dataset, encode, nested, row, scene, write


def test_a_folder_in_the_hubs_layout(tmp_path: Path) -> None:
    photos = list(open_source(str(dataset(tmp_path, 8, 3))))
    assert [p.id for p in photos if p.split == "train"] == [str(i) for i in range(8)]
    assert [p.id for p in photos if p.split == "test"] == ["1000", "1001", "1002"]
    assert photos[3].image == row(int(photos[3].id))["image"]["bytes"]


def test_nested_parquet_gives_the_same_records(tmp_path: Path) -> None:
    rows = [row(i) for i in range(1, 6)]
    flat = write(tmp_path / "flat" / "train-0.parquet", rows)
    deep = write(tmp_path / "deep" / "train-0.parquet", [nested(r) for r in rows])
    assert list(open_source(str(flat))) == list(open_source(str(deep)))


@pytest.mark.parametrize("form", ["{}/data/train-*.parquet", "file://{}/data/train-*.parquet", "{}/**/train-*"])
def test_globs_and_urls(tmp_path: Path, form: str) -> None:
    dataset(tmp_path, 8, 3)
    assert len(list(open_source(form.format(tmp_path)))) == 8


def test_any_fsspec_file_system(tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/hub/test-0.parquet", write(tmp_path / "t.parquet", [row(i) for i in range(3)]).read_bytes())
    photos = list(open_source("memory://hub"))
    assert [p.split for p in photos] == ["test"] * 3 and photos[0].image


@pytest.mark.parametrize(
    "column", ["image", "id", "gps", "label", "video_info.vid_id", "scene_level_tags.weather", "city_name"]
)
def test_a_missing_required_column_is_named(tmp_path: Path, column: str) -> None:
    rows = [row(1), row(3)]
    for values in rows:
        values.pop(column)
    write(tmp_path / "train.parquet", rows)
    with pytest.raises(UserError, match=f"required column {column} is missing"):
        open_source(str(tmp_path))


@pytest.mark.parametrize(
    ("column", "values", "kind"),
    [
        ("label", ["yes", "no"], "string"),
        ("gps", [1.5, 2.5], "double"),
        ("image", ["a.jpg", "b.jpg"], "string"),
        ("scene_level_tags.weather", [1, 2], "int64"),
        ("id", [1.5, 2.5], "double"),
        ("city_name", [1, 2], "int64"),
    ],
)
def test_a_wrong_type_is_named(tmp_path: Path, column: str, values: list[object], kind: str) -> None:
    write(tmp_path / "train.parquet", [row(1) | {column: values[0]}, row(3) | {column: values[1]}])
    with pytest.raises(UserError, match=f"column {column} has the type {kind}; it must be"):
        open_source(str(tmp_path))


def test_other_types_of_the_same_meaning_are_read(tmp_path: Path) -> None:
    rows = [row(1, gps=[39.5, -86.5]), row(3, gps=[39.5, -86.5])]
    for values in rows:
        values["image"] = values["image"]["bytes"]
    types = {"id": pa.string(), "label": pa.int8(), "city_name": pa.dictionary(pa.int32(), pa.string())}
    write(tmp_path / "train.parquet", rows, types=types)
    photos = list(open_source(str(tmp_path)))
    assert [(p.id, p.label, p.latitude, p.city) for p in photos] == [
        ("1", 1, 39.5, "indianapolis"),
        ("3", 1, 39.5, "pittsburgh"),
    ]


def test_extra_columns_are_listed_and_masks_are_not_extra(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", [row(1) | {"camera": "x", "masks": b"png"}])
    source = open_source(str(tmp_path))
    assert source.source.extra_columns == ["camera"]
    assert next(iter(source)).extra["masks"] == b"png"


def test_what_is_no_source_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 but no more")
    for spec, word in [
        (str(tmp_path / "absent"), "no parquet there"),
        (str(tmp_path / "*.csv"), "no parquet there"),
        (str(tmp_path / "broken.parquet"), "not a readable parquet"),
        ("nosuchprotocol://x", "nosuchprotocol"),
        ("street:many", "whole number"),
        ("street:0", "whole number"),
        ("csv:" + str(tmp_path / "absent.csv"), "no such file"),
    ]:
        with pytest.raises(UserError, match=word) as caught:
            open_source(spec)
        assert "\n" not in str(caught.value)


def test_a_rejected_row_is_kept_by_name(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", [row(1), row(3, label=4)])
    source = open_source(str(tmp_path))
    assert [p.id for p in source] == ["1"]
    assert source.rejected == [("3", "label_outside_0_1: 4")]


def test_rows_can_be_loaded_in_another_process_and_in_any_order(tmp_path: Path) -> None:
    source = ParquetSource(str(dataset(tmp_path, 8, 3)))
    refs = [ref for ref, _ in source.rows()]
    again = pickle.loads(pickle.dumps(source))
    found = {ref: image for ref, image, _ in again.load(refs[::-1])}
    assert found == {ref: image for ref, image, _ in source.load(refs)} and len(found) == 11


def _one_group(path: Path, photos: list[bytes]) -> ParquetSource:
    """A parquet file of a single row group, in pages of 16 photos, as long as they are."""
    lines = [row(0) | {"id": i, "image": {"bytes": photo, "path": ""}} for i, photo in enumerate(photos)]
    table = pa.Table.from_pylist(lines)
    pq.write_table(table, path, write_batch_size=16, data_page_size=1, use_dictionary=False, compression="none")
    assert pq.ParquetFile(path).num_row_groups == 1
    return ParquetSource(str(path))


def test_a_file_of_one_row_group_is_never_held_as_a_whole(tmp_path: Path) -> None:
    """Photos on both sides of a batch's edge, and the last, out of 32 MiB in a fraction of them."""
    photos = [i.to_bytes(2, "big") * 20_480 for i in range(800)]
    source = _one_group(tmp_path / "train.parquet", photos)
    pool, usual = pa.proxy_memory_pool(pa.default_memory_pool()), pa.default_memory_pool()
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        found = {ref[2]: image == photos[ref[2]] for ref, image, _ in source.load([(0, 0, i) for i in (15, 16, 799)])}
        python = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(usual)
    assert found == {15: True, 16: True, 799: True}
    assert python + (pool.max_memory() or 0) < 16 * 2**20


def test_what_comes_after_the_last_wanted_row_is_not_read(tmp_path: Path) -> None:
    photos = [i.to_bytes(2, "big") * 20_480 for i in range(800)]
    source = _one_group(tmp_path / "train.parquet", photos)
    with (tmp_path / "train.parquet").open("r+b") as file:
        file.seek(16 * 2**20)
        file.write(bytes(4 * 2**20))
    assert [image for _, image, _ in source.load([(0, 0, 3), (0, 0, 40)])] == [photos[3], photos[40]]
    with pytest.raises(UserError, match="cannot be read any more"):
        list(source.load([(0, 0, 3), (0, 0, 799)]))


def test_rows_of_one_group_come_in_the_order_they_are_asked_for(tmp_path: Path) -> None:
    photos = [i.to_bytes(2, "big") for i in range(100)]
    source = _one_group(tmp_path / "train.parquet", photos)
    asked = [(0, 0, i) for i in (70, 71, 5, 99, 99, 40, 0)]
    assert [(ref, image) for ref, image, _ in source.load(asked)] == [(ref, photos[ref[2]]) for ref in asked]


def test_a_row_that_is_gone_is_one_line_and_not_left_out(tmp_path: Path) -> None:
    source = ParquetSource(str(write(tmp_path / "train.parquet", [row(i) for i in range(1, 4)])))
    with pytest.raises(UserError, match="cannot be read any more .*row group 0 has 3 rows, row 5 was there before"):
        list(source.load([(0, 0, 1), (0, 0, 5)]))


def test_the_hubs_files_are_resolved_by_datasets(tmp_path: Path) -> None:
    # A local folder stands for the hub: `datasets` resolves both the same way.
    source = HubSource(str(dataset(tmp_path, 8, 3)))
    splits = [values["split"] for _, values in source.rows()]
    assert sorted(splits) == ["test"] * 3 + ["train"] * 8 and source.name == "natix"
    assert all(image for _, image, _ in source.load([ref for ref, _ in source.rows()]))


def test_an_unreachable_hub_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def unreachable(name: str) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset_builder", unreachable)
    with pytest.raises(UserError, match="natix-network-org/roadwork cannot be reached.*give their folder"):
        open_source("natix")


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("data/train-00000-of-00026.parquet", "train"),
        ("test/0000.parquet", "test"),
        ("validation-0.parquet", "val"),
        ("photos.parquet", None),
        ("training_set.parquet", None),
        ("latest-photos.parquet", None),
    ],
)
def test_the_published_split_is_in_the_name(name: str, split: str | None) -> None:
    assert split_of_name(name) == split


def _csv(folder: Path, text: str, photos: int = 4) -> str:
    for i in range(photos):
        (folder / f"{i}.jpg").write_bytes(encode(scene(i)))
    (folder / "photos.csv").write_text(text)
    return f"csv:{folder / 'photos.csv'}"


def test_csv_with_only_paths_and_labels(tmp_path: Path) -> None:
    photos = list(open_source(_csv(tmp_path, "path,label\n0.jpg,1\n1.jpg,0\n2.jpg,\n")))
    assert [(p.id, p.label) for p in photos] == [("0.jpg", 1), ("1.jpg", 0), ("2.jpg", None)]
    assert photos[0].latitude is None and photos[0].group is None and photos[0].image


def test_csv_with_everything(tmp_path: Path) -> None:
    text = (
        "\ufeffPath,label,id,latitude,longitude,group,weather,daytime,scene,description,split,colour\n"
        "0.jpg,1,a,40.5,-80.1,v1,Rain,Dark,Highway,cones,test,red\n"
    )
    source = open_source(_csv(tmp_path, text))
    photo = next(iter(source))
    assert (photo.id, photo.latitude, photo.longitude, photo.group, photo.split) == ("a", 40.5, -80.1, "v1", "test")
    assert (photo.weather, photo.daytime, photo.scene, photo.description) == (3, 1, 2, "cones")
    assert source.source.extra_columns == ["colour"]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("file,label\n0.jpg,1\n", "column path is missing"),
        ("path,label\n", "no photo"),
        ("", "column path is missing"),
        ("path,label,split\n0.jpg,1,holdout\n", "holdout.*allowed"),
    ],
)
def test_csv_that_cannot_be_used(tmp_path: Path, text: str, word: str) -> None:
    with pytest.raises(UserError, match=word):
        list(open_source(_csv(tmp_path, text)))


def test_a_missing_photo_has_no_bytes(tmp_path: Path) -> None:
    source = CsvSource(_csv(tmp_path, "path,label\nabsent.jpg,1\n").removeprefix("csv:"))
    assert [image for _, image, _ in source.load([(0, 0, 0)])] == [b""]
    assert source.stamp((0, 0, 0)) == "missing"
    assert sources.HUB_NAME == "natix-network-org/roadwork"
