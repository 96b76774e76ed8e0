"""Work that is shared by the processes of ``torch.distributed``, where it is initialized.

What is exchanged are small Python objects (scores, paths, messages), never tensors of the model. Without
``torch.distributed`` everything here is what one process does alone.
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
"""How long a process waits for the others, which may have much more left to do. One that has died is
noticed at once: its connection is closed."""

_group: Any = None
"""The group of processes that exchanges objects; None for the default group."""

_exchanged: deque[list[torch.Tensor]] = deque(maxlen=8)
"""The last tensors that were exchanged. A thread of gloo may be about to drop them when all have arrived;
were it the last to hold them, it would wait for Python's lock, and the end of the group, which has the lock,
for the thread (seen with PyTorch 2.6). ``all_gather_object`` does not keep its own."""


@contextmanager
def started() -> Iterator[None]:
    """The processes that ``torchrun`` has started, connected with each other; else this one alone.

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
    distributed.init_process_group()  # gloo for the host and, where there is a GPU, NCCL
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
    """The number of this process, from 0."""
    return distributed.get_rank() if _initialized() else 0


def count() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if _initialized() else 1


def share(items: Sequence[T]) -> Sequence[T]:
    """The items that this process works on: each item is one process's."""
    return items[rank() :: count()]


def gather(value: T) -> list[T]:
    """The value of each process, in order of their numbers, for all of them."""
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
    """The value that the first process makes, in all processes; its exception is raised in all of them."""
    if count() == 1:
        return make()
    made: Any = None
    failure: Exception | None = None
    if rank() == 0:
        try:
            made = make()
        except Exception as error:  # raised below, in each process
            failure = error
    made, failure = gather((made, failure))[0]
    if failure is not None:
        raise failure
    return made  # type: ignore[no-any-return]  # of the first process


def own_device(device: torch.device) -> torch.device:
    """The device of this process: where CUDA is asked for, each process of a machine has its own GPU.

    Example:
        >>> own_device(torch.device("cpu"))
        device(type='cpu')
    """
    local = os.environ.get("LOCAL_RANK")
    if device.type == "cuda" and device.index is None and local is not None:
        return torch.device("cuda", int(local))
    return device
