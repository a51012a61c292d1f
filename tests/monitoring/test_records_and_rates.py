"""Lines of metrics.jsonl and the arithmetic of speed: whatever is logged is read back; no rate divides by nothing."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from roadwork.errors import UserError
from roadwork.monitoring import throughput
from roadwork.monitoring.pictures import MASK_COLOURS, grid, overlay, to_uint8
from roadwork.monitoring.runlog import RunLog, plain, read_last_per_step, read_lines, repair
from roadwork.monitoring.trackers import open_trackers

finite = st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**60), 2**60), finite, st.text()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(), inner, max_size=3)),
    max_leaves=8,
)


@settings(max_examples=80)
@given(st.lists(st.dictionaries(st.text(max_size=5), values, max_size=4), max_size=6))
def test_whatever_is_written_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, records: list[dict[str, Any]]
) -> None:
    path = tmp_path_factory.mktemp("log") / "metrics.jsonl"
    with RunLog(path) as log:
        for record in records:
            log.append(record)
    assert list(read_lines(path)) == records
    assert path.read_bytes().count(b"\n") == len(records), "a line break inside a value must not break the line"


@settings(max_examples=60)
@given(st.integers(0, 400), st.binary(max_size=30))
def test_a_file_cut_anywhere_keeps_exactly_its_whole_lines(
    tmp_path_factory: pytest.TempPathFactory, cut: int, rubbish: bytes
) -> None:
    path = tmp_path_factory.mktemp("log") / "metrics.jsonl"
    lines = [json.dumps({"step": i, "loss": i / 7}).encode() + b"\n" for i in range(10)]
    kept = b"".join(lines)[:cut]
    path.write_bytes(kept + rubbish.replace(b"\n", b"").replace(b"{", b""))
    whole = kept[: kept.rfind(b"\n") + 1]
    repair(path)
    assert path.read_bytes() == whole
    assert repair(path) == 0, "a second look finds nothing wrong"


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (np.float32(0.5), 0.5), (np.int64(7), 7), (np.bool_(True), True), (np.array([1, 2]), [1, 2]),
        (torch.tensor(2.5), 2.5), (torch.tensor([[1, 2]]), [[1, 2]]), (torch.tensor(0.5, dtype=torch.bfloat16), 0.5),
        (math.nan, None), (math.inf, None), (np.float64("nan"), None), (torch.tensor([1.0, math.nan]), [1.0, None]),
        ((1, 2), [1, 2]), ({1: Path("a/b")}, {"1": "a/b"}), (True, True), ("ä", "ä"),
    ],
)  # fmt: skip
def test_values_become_what_json_knows(value: Any, written: Any) -> None:
    found = plain(value)
    assert found == written and type(found) is type(written)
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("value", [object(), {1, 2}, b"bytes", 1j])
def test_what_has_no_json_is_refused_before_a_byte_is_written(tmp_path: Path, value: Any) -> None:
    with RunLog(tmp_path / "m.jsonl") as log:
        log.append({"step": 1})
        with pytest.raises(ValueError, match="cannot write"):
            log.append({"step": 2, "value": [value]})
        log.append({"step": 3})
    assert [record["step"] for record in read_lines(tmp_path / "m.jsonl")] == [1, 3]


def test_the_last_line_of_a_step_counts_in_the_order_of_steps(tmp_path: Path) -> None:
    lines = [{"step": 2, "a": 1}, {"step": 1, "a": 2}, {"note": "no step"}, {"step": 2, "a": 3}, {"step": "2", "a": 4}]
    with RunLog(tmp_path / "m.jsonl") as log:
        for line in lines:
            log.append(line)
    assert read_last_per_step(tmp_path / "m.jsonl") == [{"step": 1, "a": 2}, {"step": 2, "a": 3}]
    assert read_last_per_step(tmp_path / "absent.jsonl") == []
    with RunLog(tmp_path / "e.jsonl") as log:
        log.append({"epoch": 4, "x": 1})
    assert read_last_per_step(tmp_path / "e.jsonl", key="epoch") == [{"epoch": 4, "x": 1}]


def test_a_closed_log_may_be_closed_again(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "deep" / "er" / "m.jsonl")
    log.close()
    log.close()
    assert (tmp_path / "deep" / "er" / "m.jsonl").read_bytes() == b""


# ------------------------------------------------------------------------------------------------- arithmetic


def test_operations_by_hand() -> None:
    assert throughput.view_operations(parameters=10, tokens=3, depth=2, width=5) == 2 * 10 * 3 + 4 * 9 * 5 * 2


def test_no_time_is_no_rate() -> None:
    assert throughput.utilisation(1e12, 0, 1e12) == throughput.utilisation(1e12, 1, 0) == 0.0
    assert throughput.utilisation(5e11, 1, 1e12) == 0.5


# --------------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
def test_tensors_of_any_kind_become_bytes(kind: torch.dtype) -> None:
    values_of = torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1).expand(3, 2, 2)
    given_images = (values_of * 255).round().to(kind) if kind == torch.uint8 else values_of.to(kind)
    assert to_uint8(given_images)[:, 0, 0].tolist() in ([0, 128, 255], [0, 127, 255])


def test_values_beyond_a_picture_are_clipped_and_nan_is_black() -> None:
    found = to_uint8(np.array([-1.0, 2.0, math.nan]).reshape(3, 1, 1))
    assert found.ravel().tolist() == [0, 255, 0]
    with pytest.raises(ValueError, match=r"\[\.\.\., 3, H, W\], got \(4, 2, 2\)"):
        to_uint8(np.zeros((4, 2, 2)))


def test_a_full_mask_at_full_opacity_is_its_colour() -> None:
    images, layers = np.zeros((1, 3, 4, 4), np.uint8), np.zeros((1, 6, 2, 2))
    layers[0, 3, 0, 0] = 1
    painted = overlay(images, layers, opacity=1.0)
    assert painted[0, :, 1, 1].tolist() == list(MASK_COLOURS[3]) and not painted[0, :, 2:, 2:].any()
    assert np.array_equal(overlay(images, layers * 0), images)
    with pytest.raises(ValueError, match=r"\[1, 6, h, w\]"):
        overlay(images, layers[:, :5])


@pytest.mark.parametrize(
    ("n", "columns", "shape"), [(1, 4, (3, 6, 7)), (5, 2, (3, 18, 14)), (4, 4, (3, 6, 28)), (0, 4, (3, 6, 7))]
)
def test_a_grid_has_room_for_every_picture(n: int, columns: int, shape: tuple[int, ...]) -> None:
    sheet = grid(np.zeros((n, 3, 4, 5), np.uint8), columns)
    assert sheet.shape == shape and (sheet == 0).sum() == n * 3 * 4 * 5


def test_an_unknown_tracker_names_those_that_there_are(tmp_path: Path) -> None:
    assert open_trackers(["tensorboard"], tmp_path, {}) == []
    with pytest.raises(UserError, match="unknown tracker 'mlflow' in monitoring.trackers; allowed: tensorboard, wandb"):
        open_trackers(["mlflow"], tmp_path, {})
