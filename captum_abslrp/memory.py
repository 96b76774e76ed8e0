"""Estimation of the number of samples that fit into memory together."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from captum_abslrp.engine.propagation import saved_bytes

__all__ = ["fitting", "free_bytes", "is_out_of_memory"]

NEEDED = 3
"""Peak memory of an attribution as a multiple of its saved tensors. The largest measured value is two, for
small batches of large images."""

SHARE = 0.5
"""Fraction of the free memory to use."""


def free_bytes(device: torch.device) -> int | None:
    """Return the free memory of a device in bytes, or None if it is unknown.

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
    """Estimate how many samples fit into the free memory, from the saved tensors of one sample.

    Args:
        output: the output for one sample, (1, ...), with its autograd history.
        batch_size: the number of samples.

    Returns:
        At least 1 and at most ``batch_size``, which is also the result if the free memory is unknown.
    """
    free = free_bytes(output.device)
    if free is None:
        return batch_size
    return max(1, min(batch_size, int(SHARE * free / (NEEDED * max(1, saved_bytes(output))))))


def is_out_of_memory(error: Any) -> bool:
    """Whether an error is an out-of-memory error."""
    kind = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)
    return isinstance(error, (kind, MemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
