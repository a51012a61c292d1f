"""How fast, and with how much memory: pure functions of counts and seconds, and the memory of a process.

Operations are counted as in the project's measurements: 2 x parameters x tokens + attention for a forward pass of a
plain transformer, three times that for training; pruned views count only while they are present. Heads, augmentation
and recomputation count nothing.
"""

from __future__ import annotations

import resource
import sys

import torch


def view_operations(parameters: int, tokens: int, depth: int, width: int) -> float:
    """Operations of one view's forward pass through a plain transformer: 2 P T + 4 T^2 D L.

    parameters: of the backbone; tokens: patches and prefix tokens of one view; depth: blocks; width: of a token.
    """
    return 2.0 * parameters * tokens + 4.0 * tokens**2 * width * depth


def utilisation(operations: float, seconds: float, ceiling: float) -> float:
    """Share of the ceiling (operations per second of all devices together) that was used: 'MFU'; 0 without time."""
    return operations / seconds / ceiling if seconds > 0 and ceiling > 0 else 0.0


def memory_gib(device: torch.device | str = "cpu") -> float:
    """Largest memory used so far, GiB: of the CUDA allocator on that device, else the process's resident memory."""
    device = torch.device(device)
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device)) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
