"""The markers of a JPEG, walked before anything decodes it: a small file may ask for minutes of work.

Each scan goes over the whole picture, so a progressive file that repeats one scan of a few bytes costs seconds per kB
("Two Issues with the JPEG Standard", libjpeg-turbo; libtiff bounds scans for the same reason).
"""

from __future__ import annotations

import re

from roadwork.data.record import Rejected

MAX_SCANS = 32
"""Encoders write 1 to 18 (four components in libjpeg's progression)."""
MAX_SEGMENTS = 10_000
"""Before the first scan; a segment holds up to 64 kB, so this is far more than any camera's notes need."""
_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])")
"""The next marker as libjpeg looks for it: behind fill bytes, past stuffed bytes and restarts."""
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_ONE_SCAN_FRAMES = (0xC0, 0xC1, 0xC9)
"""Sequential frames: where the first scan holds all components, decoders stop behind it."""
_ALONE = (0x01, 0xD8)
_END, _SCAN = 0xD9, 0xDA


def check_markers(data: bytes) -> None:
    """Raise Rejected, `too_many_scans` or `too_many_segments`, for a JPEG that no camera writes; damage is not judged.

    Some microseconds for a file with one scan; others are searched once, and walked only where that finds too many.
    """
    position, segments, scans = 2, 0, 0
    one_scan, components = False, b""
    while found := _MARKER.search(data, position):
        marker, position = found[1][0], found.end()
        if marker == _END:
            return
        if marker in _ALONE:
            continue
        if marker in _FRAMES:
            one_scan, components = marker in _ONE_SCAN_FRAMES, data[position + 7 : position + 8]
        elif marker == _SCAN:
            scans += 1
            if scans == 1 and one_scan and data[position + 2 : position + 3] == components:
                return
            if scans == 1 and data.count(b"\xff\xda", position) < MAX_SCANS:
                return
            if scans > MAX_SCANS:
                raise Rejected(f"too_many_scans: more than the {MAX_SCANS} that are allowed")
        segments += 1
        if not scans and segments > MAX_SEGMENTS:
            raise Rejected(f"too_many_segments: more than the {MAX_SEGMENTS} that are allowed")
        position += max(int.from_bytes(data[position : position + 2], "big"), 2)
