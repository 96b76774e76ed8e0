"""The state of a model: a snapshot before a forward pass, which is restored afterwards.

A forward pass may modify the model: count calls, install hooks, fill a list, add a module, update
statistics, or write to a cache. :func:`unchanged` takes a snapshot of the model before the pass, and restores
all differences afterwards, in place.

The snapshot follows references from the model: attributes of modules, dicts, lists, sets, deques, tuples
and their subclasses, and objects whose class is from the same package as a module of the model. It keeps
references to their contents, not copies. It does not follow functions, classes, or objects of other
packages: a trainer, a logger or a data loader is not part of the model.

Values of tensors are copied only if necessary. Buffers are copied immediately, because kernels can update
them without a visible call (batch norm). Other tensors are copied right before a call modifies them: the
:class:`~captum_abslrp.engine.recording.Recording` of the pass passes such tensors to the function from
:func:`saver`.
"""

from __future__ import annotations

import argparse
import collections
import enum
import threading
import types
import warnings
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from captum_abslrp.engine.saved import storage_of
from captum_abslrp.engine.state_parts import (
    OWN_HOOKS,
    SLOTS,
    TABLES,
    VALUES,
    ByClass,
    Instance,
    Items,
    Members,
    Memory,
    Part,
    Table,
    TensorState,
    Value,
)

__all__ = ["own_hooks", "saver", "unchanged"]


class _Snapshot:
    """A snapshot of the state of a model, which can be restored."""

    def __init__(self, model: nn.Module) -> None:
        self.users = 0
        self._parts: list[Part] = []
        self._empty: list[dict[Any, Any]] = []
        self._tensors: list[TensorState] = []
        self._sharing: dict[int, list[TensorState]] = {}
        self._memories: dict[int, Memory] = {}
        self._lock = threading.Lock()
        self._packages: set[str] = set()
        self._buffers: dict[int, bool] = {}
        self._seen: dict[int, Any] = {}  # keeps objects alive, so that ids are unique
        self._found: list[Tensor] = []
        self._strange: list[Any] = []
        # The cache of `parametrize.cached()` is filled without autograd history here, which would break a
        # training step.
        self._pending: list[Iterable[Any]] = [(model, parametrize._cache)]
        with torch._C.DisableTorchFunction():
            while self._pending:
                self._look(self._pending.pop())
                if not self._pending:
                    self._look_at_objects()
            self._keep_tensors()
        del self._seen, self._found, self._strange, self._pending, self._buffers

    def _look(self, values: Iterable[Any]) -> None:
        for value in values:
            kind = type(value)
            if (kind is OrderedDict or kind is dict) and not value:  # most tables of hooks
                self._empty.append(value)
                continue
            visit = _VISITS[kind]
            if visit is not None and id(value) not in self._seen:
                self._seen[id(value)] = value
                visit(self, value)

    def _look_at_objects(self) -> None:
        """Visit objects of classes from the packages of the model, as far as they are known."""
        strange, self._strange = self._strange, []
        for value in strange:
            if _package(type(value)) in self._packages:
                self.visit_attributes(value)
            else:
                self._strange.append(value)

    def visit_module(self, module: nn.Module) -> None:
        self._packages.add(_package(type(module)))
        self._packages -= _FOREIGN
        for buffer in module._buffers.values():
            self._buffers[id(buffer)] = self._buffers.get(id(buffer), False) or module.training
        self.visit_attributes(module)

    def visit_object(self, value: Any) -> None:
        self._strange.append(value)

    def visit_attributes(self, value: Any) -> None:
        self._parts.append(instance := Instance(value, SLOTS[type(value)]))
        if instance.slots:
            self._pending.append([held for _, held in instance.slots])
        try:
            attributes = object.__getattribute__(value, "__dict__")
        except AttributeError:
            return
        if type(attributes) is dict:
            self._look((attributes,))

    def visit_table(self, table: Any) -> None:
        self._parts.append(part := Table(table))
        if part.values:
            self._pending.append(part.values)
        self._visit_subclass(table)

    def visit_sequence(self, sequence: Any) -> None:
        self._parts.append(part := Items(sequence))
        self._pending.append(part.items)
        self._visit_subclass(sequence)

    def visit_set(self, elements: Any) -> None:
        self._parts.append(part := Members(elements))
        self._pending.append(part.elements)
        self._visit_subclass(elements)

    def visit_items(self, items: Any) -> None:
        """Visit the items of an immutable container."""
        self._pending.append(items)

    def _visit_subclass(self, container: Any) -> None:
        """Visit the attributes of a container whose class is not a plain class of Python or PyTorch."""
        if type(container) not in _PLAIN:
            self.visit_attributes(container)

    def visit_value(self, holder: Any) -> None:
        get, put = next((get, put) for kind, get, put in VALUES if isinstance(holder, kind))
        try:
            self._parts.append(Value(holder, get, put))
        except (NotImplementedError, ValueError):  # read-only, or `random.SystemRandom`
            return

    def visit_tensor(self, tensor: Tensor) -> None:
        self._found.append(tensor)
        attributes = getattr(tensor, "__dict__", None)
        held = (tensor.grad if tensor.is_leaf else None, tensor._backward_hooks, attributes)
        self._look(held)

    def _keep_tensors(self) -> None:
        for tensor in self._found:
            is_buffer = id(tensor) in self._buffers
            in_training = is_buffer and self._buffers[id(tensor)]
            try:
                state = TensorState(tensor, is_buffer=is_buffer, in_training=in_training)
                if state.layout is not None:
                    self._sharing.setdefault(storage_of(state.values), []).append(state)
            except (RuntimeError, NotImplementedError, TypeError):
                continue  # a subclass without its own memory, or that cannot be copied
            self._tensors.append(state)

    def save(self, tensor: Tensor) -> None:
        """Save the values of a tensor that is about to be modified, if the model holds its memory."""
        if tensor.layout != torch.strided:
            return
        with torch._C.DisableTorchFunction():
            try:
                storage = storage_of(tensor)
            except (RuntimeError, NotImplementedError):  # a subclass without its own memory
                return
            if storage not in self._sharing or storage in self._memories:
                return
            with self._lock:
                if storage in self._memories:  # another thread has saved it
                    return
                for state in self._sharing[storage]:
                    state.keep_history()
                with torch.no_grad():
                    self._memories[storage] = Memory(self._sharing[storage])

    def put_back(self) -> None:
        """Restore everything; warn about failures at the end."""
        failed: dict[str, Exception] = {}
        with torch._C.DisableTorchFunction(), torch.inference_mode(False), torch.no_grad():
            memories = self._memories.values()
            for memory in memories:
                for state in memory.tensors:
                    state.is_changed = True
            filled = [Table.empty(table) for table in self._empty if table]
            # Views first, because restoring a tensor gives it and its views a new history.
            tensors = sorted(self._tensors, key=lambda state: not state.holder._is_view())
            for part in (*self._parts, *filled, *memories, *tensors):
                try:
                    part.put_back()
                except Exception as error:
                    kind = type(part.holder)
                    failed.setdefault(f"`{kind.__module__}.{kind.__qualname__}`", error)
            for memory in memories:
                for version in memory.versions:
                    version.__exit__()
        for name, reason in failed.items():
            warnings.warn(
                f"Expected to restore the state of the model after the forward pass, but got an error for "
                f"{name}: {reason!r}. Explain a copy of the model, `copy.deepcopy(model)`.",
                stacklevel=6,
            )


def _package(cls: type) -> str:
    return str(getattr(cls, "__module__", "")).partition(".")[0]


_PLAIN = frozenset(
    (
        dict,
        OrderedDict,
        collections.defaultdict,
        collections.Counter,
        list,
        deque,
        set,
        *TABLES,
        weakref.WeakSet,
    )
)
_ATTRIBUTED = (
    collections.UserDict,
    collections.UserList,
    collections.ChainMap,
    types.SimpleNamespace,
    argparse.Namespace,
)
"""Python classes that store their contents in attributes."""
_FOREIGN = frozenset(("torch", "builtins"))
"""Packages that every model uses, whose objects are not part of the model."""


def _visit_of(cls: type) -> Callable[[_Snapshot, Any], None] | None:
    """The method that visits objects of a class, or None for objects without state."""
    for kinds, visit in (
        (nn.Module, _Snapshot.visit_module),
        (Tensor, _Snapshot.visit_tensor),
        (TABLES, _Snapshot.visit_table),
        ((list, deque), _Snapshot.visit_sequence),
        ((set, weakref.WeakSet), _Snapshot.visit_set),
        ((tuple, frozenset), _Snapshot.visit_items),
        ((type, enum.Enum, np.memmap), None),
        (tuple(kind for kind, *_ in VALUES), _Snapshot.visit_value),
        (_ATTRIBUTED, _Snapshot.visit_attributes),
    ):
        if issubclass(cls, kinds):  # type: ignore[arg-type]  # the rows are of many types
            return visit  # type: ignore[return-value]  # as above
    return None if _package(cls) in _FOREIGN else _Snapshot.visit_object


_VISITS = ByClass(_visit_of)

_SNAPSHOTS: weakref.WeakKeyDictionary[nn.Module, _Snapshot] = weakref.WeakKeyDictionary()
_SNAPSHOTS_LOCK = threading.RLock()  # reentrant, because restoring may run code of the model


@contextmanager
def own_hooks(register: Callable[[], Iterable[Any]]) -> Iterator[None]:
    """Register hooks of this package, which snapshots in other threads ignore.

    Args:
        register: registers the hooks and returns their handles; they are removed at the end.
    """
    with _SNAPSHOTS_LOCK:
        handles = list(register())
        OWN_HOOKS.update(handle.id for handle in handles)
    try:
        yield
    finally:
        with _SNAPSHOTS_LOCK:
            for handle in handles:
                handle.remove()
            OWN_HOOKS.difference_update(handle.id for handle in handles)


def saver(model: nn.Module) -> Callable[[Tensor], None] | None:
    """Return the function that saves a tensor before a call modifies it, inside ``unchanged``; or None."""
    with _SNAPSHOTS_LOCK:
        snapshot = _SNAPSHOTS.get(model)
    return None if snapshot is None else snapshot.save


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Restore the state of a model after a forward pass.

    The state consists of the attributes of its modules, the contents of its containers and objects, the
    values, flags and gradients of its tensors, and its submodules; see the docstring of this module. Tensors
    also get their previous autograd history.

    Concurrent threads that run the same model share the snapshot of the first thread; the last thread
    restores it.

    Args:
        model: the model; its calls run under a recording that calls :func:`saver`.

    Warns:
        UserWarning: if something cannot be restored; everything else is restored.

    Example:
        >>> class Counting(nn.Linear):
        ...     seen = ()
        ...     def forward(self, x):
        ...         self.seen += (x,)
        ...         return super().forward(x)
        >>> model = Counting(3, 2)
        >>> with unchanged(model):
        ...     _ = model(torch.rand(1, 3))
        >>> model.seen
        ()
    """
    with _SNAPSHOTS_LOCK:
        snapshot = _SNAPSHOTS.get(model)
        if snapshot is None:
            snapshot = _SNAPSHOTS[model] = _Snapshot(model)
        snapshot.users += 1
    try:
        yield
    finally:
        with _SNAPSHOTS_LOCK:
            snapshot.users -= 1
            if snapshot.users == 0:
                del _SNAPSHOTS[model]
                snapshot.put_back()
