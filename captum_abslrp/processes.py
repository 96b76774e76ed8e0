"""Distribution of work among processes with ``torch.distributed``, if it is initialized.

Processes exchange small Python objects (scores, paths, messages), never tensors of the model. Without
``torch.distributed``, the functions behave as in a single process.
"""

from __future__ import annotations

import os
import pickle
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed

__all__ = ["count", "from_first", "gather", "own_device", "rank", "share", "started"]

T = TypeVar("T")

PATIENCE = timedelta(days=30)
"""Timeout for other processes, which may have much more work left. A process that dies is noticed
immediately, because its connection is closed."""

_group: Any = None
"""The process group that exchanges objects; None for the default group."""

_exchanged: deque[list[torch.Tensor]] = deque(maxlen=8)
"""The last exchanged tensors, kept alive to avoid a deadlock (seen with PyTorch 2.6). If a thread of gloo
held the last reference, it would wait for the GIL to free them, while the destruction of the group holds the
GIL and waits for the thread. ``all_gather_object`` does not keep its tensors."""


@contextmanager
def started() -> Iterator[None]:
    """Connect the processes that ``torchrun`` has started; do nothing for a single process.

    Example:
        >>> with started():
        ...     share([1, 2, 3])
        [1, 2, 3]
    """
    described = all(name in os.environ for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR"))
    if not described or os.environ["WORLD_SIZE"] == "1" or _initialized():
        yield
        return
    global _group
    distributed.init_process_group()  # gloo for the CPU and, if there is a GPU, NCCL
    _group = distributed.new_group(timeout=PATIENCE, backend="gloo")
    try:
        yield
    finally:
        _group = None
        distributed.destroy_process_group()
        _exchanged.clear()


def _initialized() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def rank() -> int:
    """Return the rank of this process."""
    return distributed.get_rank() if _initialized() else 0


def count() -> int:
    """Return the number of processes."""
    return distributed.get_world_size() if _initialized() else 1


def share(items: Sequence[T]) -> Sequence[T]:
    """Return the items that this process works on; each item belongs to one process."""
    return items[rank() :: count()]


def gather(value: T) -> list[T]:
    """Return the values of all processes, in order of rank, in every process."""
    if count() == 1:
        return [value]
    device = torch.device("cuda" if distributed.get_backend(_group) == "nccl" else "cpu")
    content = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8).to(device)
    size = torch.tensor([len(content)], device=device)
    sizes = [torch.zeros_like(size) for _ in range(count())]
    distributed.all_gather(sizes, size, group=_group)
    sent = content.new_zeros(max(map(int, sizes)))
    sent[: len(content)] = content
    contents = [torch.empty_like(sent) for _ in sizes]
    distributed.all_gather(contents, sent, group=_group)
    _exchanged.append([*sizes, size, *contents, sent])
    return [
        pickle.loads(content[: int(size)].cpu().numpy().tobytes())
        for content, size in zip(contents, sizes, strict=True)
    ]


def from_first(make: Callable[[], T]) -> T:
    """Return the value that the first process computes, in all processes; an error is raised in all."""
    if count() == 1:
        return make()
    made: Any = None
    failure: Exception | None = None
    if rank() == 0:
        try:
            made = make()
        except Exception as error:  # raised below in every process
            failure = error
    made, failure = gather((made, failure))[0]
    if failure is not None:
        raise failure
    return made  # type: ignore[no-any-return]  # from the first process


def own_device(device: torch.device) -> torch.device:
    """Return the device of this process: for ``"cuda"``, each process of a machine gets its own GPU.

    Example:
        >>> own_device(torch.device("cpu"))
        device(type='cpu')
    """
    local = os.environ.get("LOCAL_RANK")
    if device.type == "cuda" and device.index is None and local is not None:
        return torch.device("cuda", int(local))
    return device
