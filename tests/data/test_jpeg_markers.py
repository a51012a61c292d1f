"""A small JPEG may ask for minutes of work: it is refused by its markers, and what cameras write is not."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from roadwork.data.images import Photo, decode_photo
from roadwork.data.jpeg_markers import MAX_SCANS, MAX_SEGMENTS
from roadwork.data.record import Rejected
from tests.data.photos import encode, repeated_scans, scene

PROGRESSIVE = encode(scene(1), progressive=True)
SCANS = PROGRESSIVE.count(b"\xff\xda")


def segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + (len(body) + 2).to_bytes(2, "big") + body


def test_a_scan_repeated_hundreds_of_times_is_refused() -> None:
    with pytest.raises(Rejected, match=f"too_many_scans: more than the {MAX_SCANS} that are allowed"):
        Photo(repeated_scans(PROGRESSIVE, 300))


def test_the_limit_of_scans_is_inclusive() -> None:
    assert decode_photo(repeated_scans(PROGRESSIVE, MAX_SCANS - SCANS))[0].shape == (64, 96, 3)
    with pytest.raises(Rejected, match="too_many_scans"):
        Photo(repeated_scans(PROGRESSIVE, MAX_SCANS - SCANS + 1))


@pytest.mark.parametrize("between", [b"\xff\x01", b"\xff\xff\xff", b"\x12\xff\x00\xff\xd3", segment(0xFE, b"\xff\xd9")])
def test_scans_cannot_hide_behind_what_decoders_pass_over(between: bytes) -> None:
    with pytest.raises(Rejected, match="too_many_scans"):
        Photo(repeated_scans(PROGRESSIVE, 300, between))


def test_a_sequential_file_of_many_scans_is_refused() -> None:
    """A frame of three components whose first scan holds one: decoders then keep all, and wait for more."""
    data = bytearray(encode(scene(1)))
    at = data.rindex(b"\xff\xda")
    first = segment(0xDA, b"\x01" + bytes(data[at + 5 : at + 7]) + b"\x00\x3f\x00")
    with pytest.raises(Rejected, match="too_many_scans"):
        Photo(bytes(data[:at]) + (first + b"\x00") * 300 + b"\xff\xd9")


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_what_looks_like_scans_inside_notes_or_behind_the_picture_counts_for_nothing(options: dict[str, bool]) -> None:
    """Thumbnails, and the film that telephones append."""
    data = encode(scene(1), **options)
    noted = data[:2] + segment(0xE5, b"\xff\xda\x00\x08" * 300) + data[2:] + b"\xff\xda\x00\x08" * 300
    assert (decode_photo(noted)[0] == decode_photo(data)[0]).all()


def test_a_head_of_countless_segments_is_refused() -> None:
    data = encode(scene(1))
    with pytest.raises(Rejected, match="too_many_segments"):
        Photo(data[:2] + segment(0xFE, b"") * (MAX_SEGMENTS + 1) + data[2:])


def test_four_components_in_libjpegs_own_progression_are_read() -> None:
    stream = io.BytesIO()
    Image.fromarray(scene(1)).convert("CMYK").save(stream, "JPEG", progressive=True)
    assert decode_photo(stream.getvalue())[1] == ("image_cmyk",)
