"""How many samples fit into memory together."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from captum_abslrp.engine.propagation import saved_bytes

__all__ = ["fitting", "free_bytes", "is_out_of_memory"]

NEEDED = 3
"""Peak memory of an attribution, as a multiple of what is kept for the backward pass: two has been seen for
small batches of large images, and less for others."""

SHARE = 0.5
"""How much of the free memory is used."""


def free_bytes(device: torch.device) -> int | None:
    """Free memory of a device; None where it is not known.

    Example:
        >>> free_bytes(torch.device("meta")) is None
        True
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + cached)
    if device.type != "cpu":
        return None
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":") for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def fitting(output: Tensor, batch_size: int) -> int:
    """How many samples fit into the free memory, by what one of them keeps.

    Args:
        output: the output for one sample, (1, ...), with its history.
        batch_size: how many there are.

    Returns:
        At least 1, at most ``batch_size``; all of them where the free memory is not known.
    """
    free = free_bytes(output.device)
    if free is None:
        return batch_size
    return max(1, min(batch_size, int(SHARE * free / (NEEDED * max(1, saved_bytes(output))))))


def is_out_of_memory(error: Any) -> bool:
    """Whether an error says that there was no memory left."""
    kind = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)
    return isinstance(error, (kind, MemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
