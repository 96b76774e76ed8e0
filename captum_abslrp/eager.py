"""Eager execution of compiled modules and functions."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

__all__ = ["eager"]


class _Shared:
    """A process-wide context that is shared by concurrent passes.

    The first pass enters the context and the last one exits it, in any thread.
    """

    def __init__(self, make: Callable[[], AbstractContextManager[Any]]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._users = 0
        self._context: AbstractContextManager[Any] = nullcontext()

    def __enter__(self) -> None:
        with self._lock:
            if self._users == 0:
                self._context = self._make()
                self._context.__enter__()
            self._users += 1

    def __exit__(self, *exc: object) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._context.__exit__(None, None, None)


def _force_eager() -> AbstractContextManager[Any]:
    return torch.compiler.set_stance("force_eager")


@contextmanager
def _ignore_hook_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Using `torch.compile.module.` when there are global hooks"
        )
        yield


_EAGER = _Shared(_force_eager)
_NO_HOOK_WARNING = _Shared(_ignore_hook_warning)


@contextmanager
def eager(model: nn.Module) -> Iterator[None]:
    """Run compiled modules and functions in eager mode."""
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # otherwise nothing is compiled
            stack.enter_context(_EAGER)
        if any("_orig_mod" in module._modules for module in model.modules()):
            stack.enter_context(_NO_HOOK_WARNING)
        yield
