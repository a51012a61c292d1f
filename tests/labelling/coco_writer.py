"""Writes what the project only reads: COCO's run lengths."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def encode_counts(mask: np.ndarray) -> list[int]:
    """Plain run lengths of a bool [h, w]."""
    flat = np.asarray(mask, bool).T.reshape(-1)
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    return [0, *runs] if flat[0] else runs


def compress_counts(counts: Sequence[int]) -> str:
    """COCO's compressed string of run lengths."""
    out = bytearray()
    for i, count in enumerate(counts):
        value = count - counts[i - 2] if i > 2 else count
        more = True
        while more:
            group = value & 31
            value >>= 5
            more = value != (-1 if group & 16 else 0)
            out.append((group | (32 if more else 0)) + 48)
    return out.decode("ascii")
