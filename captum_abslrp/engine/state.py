"""What a model holds, put back after a forward pass.

A forward pass may change the model that it runs: it counts calls, installs hooks the first time, fills a
list, adds a module, updates statistics, writes into a cache. :func:`unchanged` takes a snapshot of the model
before, and puts back what differs afterwards, whole and in place.

The snapshot follows references from the model: attributes of modules, dicts, lists, sets, deques, tuples
and subclasses of them, and objects whose class comes from a package that a module of the model comes from.
It keeps references, not copies, of what these hold. It does not follow functions, classes, and objects of
other packages: a trainer, a logger or a data loader is not a part of the model.

Values of tensors are copied only where they must be: those of buffers at once, because kernels may
update them unseen (batch norm), those of other tensors right before a call changes them. The
:class:`~captum_abslrp.engine.recording.Recording` of the pass sees these calls and asks
:func:`saver` 's function to save.
"""

from __future__ import annotations

import argparse
import array
import collections
import enum
import operator
import random
import threading
import types
import warnings
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from captum_abslrp.engine.saved import storage_of

__all__ = ["own_hooks", "saver", "unchanged"]

_MISSING: Any = object()


class _Part(Protocol):
    """A part of the state of a model: what one object holds."""

    holder: Any

    def put_back(self) -> None:
        """Put back what it held. Where nothing differs nothing is touched: other threads may look."""


class _Table:
    """The entries of a dict, in their order."""

    __slots__ = ("base", "holder", "keys", "values")

    def __init__(self, table: Any) -> None:
        self.holder = table
        # Methods of the base: those of a subclass may do more, or refuse.
        self.base = _BASES[type(table)]
        items = list(self.base.items(table))  # at once: other threads may add some
        if _OWN_HOOKS:
            items = [item for item in items if not _is_own_hook(item[0])]
        self.keys: tuple[Any, ...] = ()
        self.values: tuple[Any, ...] = ()
        if items:
            self.keys, self.values = zip(*items)

    @classmethod
    def empty(cls, table: dict[Any, Any]) -> _Table:
        """What a dict held that was empty and is not any more."""
        part = cls(table)
        part.keys = part.values = ()
        return part

    def put_back(self) -> None:
        table, base = self.holder, self.base
        if _same(base.keys(table), self.keys) and _same(base.values(table), self.values):
            return
        before = dict(zip(self.keys, self.values, strict=True))
        # Entry by entry: another thread may be looking.
        for key in [k for k in base.keys(table) if k not in before and not _is_own_hook(k)]:
            base.__delitem__(table, key)
        for key, value in before.items():
            if base.get(table, key, _MISSING) is not value:
                base.__setitem__(table, key, value)
        order = [key for key in base.keys(table) if not _is_own_hook(key)]
        if order != list(before):  # in the order that state dicts have, and hooks run
            own = {key: base.get(table, key) for key in base.keys(table) if _is_own_hook(key)}
            base.clear(table)
            for key, value in {**before, **own}.items():
                base.__setitem__(table, key, value)


class _Sequence:
    """The items of a list or a deque."""

    __slots__ = ("base", "holder", "items")

    def __init__(self, sequence: Any) -> None:
        self.holder = sequence
        self.base: Any = list if isinstance(sequence, list) else deque
        self.items = tuple(self.base.__iter__(sequence))

    def put_back(self) -> None:
        if _same(self.base.__iter__(self.holder), self.items):
            return
        if self.base is list:
            list.__setitem__(self.holder, slice(None), self.items)
        else:
            deque.clear(self.holder)
            deque.extend(self.holder, self.items)


class _Set:
    """The elements of a set."""

    __slots__ = ("base", "elements", "holder")

    def __init__(self, elements: Any) -> None:
        self.holder = elements
        self.base: Any = set if isinstance(elements, set) else weakref.WeakSet
        self.elements = frozenset(self.base.__iter__(elements))

    def put_back(self) -> None:
        now = frozenset(self.base.__iter__(self.holder))
        for element in now - self.elements:
            self.base.discard(self.holder, element)
        for element in self.elements - now:
            self.base.add(self.holder, element)


class _Instance:
    """The class of an object, and its attributes outside of ``__dict__``."""

    __slots__ = ("cls", "holder", "members", "slots")

    def __init__(self, instance: Any, slots: Iterable[Any]) -> None:
        self.holder, self.cls = instance, type(instance)
        self.slots = [(slot, _in_slot(slot, instance)) for slot in slots]
        # A parametrized module has a class of its own, with a property for each of its parametrizations.
        modules = vars(instance).get("_modules") if isinstance(instance, nn.Module) else None
        parametrized = "parametrizations" in (modules or ())
        self.members = dict(vars(self.cls)) if parametrized else None

    def put_back(self) -> None:
        if type(self.holder) is not self.cls:  # a module that was parametrized, or was lazy
            self.holder.__class__ = self.cls
        if self.members is not None:
            for name in [name for name in vars(self.cls) if name not in self.members]:
                delattr(self.cls, name)
            for name, member in self.members.items():
                if name not in vars(self.cls):
                    setattr(self.cls, name, member)
        for slot, value in self.slots:
            if _in_slot(slot, self.holder) is value:
                continue
            if value is _MISSING:
                slot.__delete__(self.holder)
            else:
                slot.__set__(self.holder, value)


class _Value:
    """The value of an object that is changed in place and holds no references."""

    __slots__ = ("holder", "put", "value")

    def __init__(
        self, holder: Any, get: Callable[[Any], Any], put: Callable[[Any, Any], None]
    ) -> None:
        self.holder, self.put, self.value = holder, put, get(holder)

    def put_back(self) -> None:
        self.put(self.holder, self.value)


class _Memory:
    """The values in the memory that tensors share, before they are first changed."""

    __slots__ = ("copy", "holder", "tensors", "versions")

    def __init__(self, tensors: list[_TensorState]) -> None:
        self.tensors = tensors
        self.holder = tensors[0].values.untyped_storage()
        self.copy = _bytes_of(self.holder).clone()
        # What autograd has saved of the tensors for a pass of the user's own is valid again afterwards.
        self.versions = [
            _unsafe_preserve_version_counter(state.holder)
            for state in tensors
            if not state.holder.is_inference()
        ]

    def put_back(self) -> None:
        if self.holder.nbytes() != len(self.copy):
            self.holder.resize_(len(self.copy))
        _bytes_of(self.holder).copy_(self.copy)


class _TensorState:
    """Where a tensor has its values, its history and its flags; the values too, of a buffer."""

    __slots__ = (
        "cls",
        "copy",
        "grad",
        "grad_fn",
        "grad_fn_of_base",
        "history",
        "holder",
        "hooks",
        "is_changed",
        "layout",
        "requires_grad",
        "values",
        "version",
    )

    def __init__(self, tensor: Tensor, *, is_buffer: bool, in_training: bool) -> None:
        self.holder, self.cls = tensor, type(tensor)
        self.values = tensor.data  # keeps the memory that the tensor has now
        self.layout = _layout(tensor)
        self.grad_fn, self.requires_grad = tensor.grad_fn, tensor.requires_grad
        self.grad_fn_of_base = None if tensor._base is None else tensor._base.grad_fn
        self.grad = tensor.grad if tensor.is_leaf else None
        self.hooks = tensor._backward_hooks
        self.history: Tensor | None = None
        self.copy: Tensor | None = None
        self.is_changed = in_training
        if is_buffer and not (tensor.is_inference() or is_lazy(tensor) or _overlaps_itself(tensor)):
            self.copy = self.values.clone()
            self.version = tensor._version

    def keep_history(self) -> None:
        """Keep what leads to the history that the tensor has, before it is changed in place."""
        if self.grad_fn is not None and not self.holder._is_view():
            with torch.enable_grad():
                self.history = self.holder.clone()

    def put_back(self) -> None:
        tensor = self.holder
        if type(tensor) is not self.cls:
            tensor.__class__ = self.cls
        if tensor.grad_fn is not self.grad_fn:
            self._put_history_back()
        if _layout(tensor) != self.layout:
            tensor.data = self.values
        # Batch norm updates its statistics without telling the version.
        if self.copy is not None and (self.is_changed or tensor._version != self.version):
            self.values.copy_(self.copy)
        if tensor.requires_grad is not self.requires_grad and tensor.is_leaf:
            tensor.requires_grad_(self.requires_grad)
        if tensor.is_leaf and tensor.grad is not self.grad:
            tensor.grad = self.grad
        if tensor._backward_hooks is not self.hooks:
            tensor._backward_hooks = self.hooks

    def _put_history_back(self) -> None:
        tensor = self.holder
        with torch.enable_grad():
            if not tensor._is_view():
                tensor.detach_()
                if self.history is not None:
                    tensor.copy_(self.history)
                return
            # A view cannot be detached: it becomes another view of the same tensor.
            base, attributes = tensor._base, tensor.__dict__
            assert base is not None
            if base.grad_fn is not self.grad_fn_of_base:
                base.detach_()
            place = self.values.shape, self.values.stride(), self.values.storage_offset()
            view = base.as_strided(*place)
            torch.utils.swap_tensors(tensor, view)
            tensor.__dict__ = attributes


class _Snapshot:
    """What a model holds, to be put back."""

    def __init__(self, model: nn.Module) -> None:
        self.users = 0
        self._parts: list[_Part] = []
        self._empty: list[dict[Any, Any]] = []
        self._tensors: list[_TensorState] = []
        self._sharing: dict[int, list[_TensorState]] = {}
        self._memories: dict[int, _Memory] = {}
        self._lock = threading.Lock()
        self._packages: set[str] = set()
        self._buffers: dict[int, bool] = {}
        self._seen: dict[int, Any] = {}  # what is seen is kept, so that ids stay its own
        self._found: list[Tensor] = []
        self._strange: list[Any] = []
        # What `parametrize.cached()` keeps is made without history here, and no use to a training step.
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
        """Look at the objects of classes from the packages of the model, as they are known by now."""
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
        self._parts.append(instance := _Instance(value, _SLOTS[type(value)]))
        if instance.slots:
            self._pending.append([held for _, held in instance.slots])
        try:
            attributes = object.__getattribute__(value, "__dict__")
        except AttributeError:
            return
        if type(attributes) is dict:
            self._look((attributes,))

    def visit_table(self, table: Any) -> None:
        self._parts.append(part := _Table(table))
        if part.values:
            self._pending.append(part.values)
        self._visit_subclass(table)

    def visit_sequence(self, sequence: Any) -> None:
        self._parts.append(part := _Sequence(sequence))
        self._pending.append(part.items)
        self._visit_subclass(sequence)

    def visit_set(self, elements: Any) -> None:
        self._parts.append(part := _Set(elements))
        self._pending.append(part.elements)
        self._visit_subclass(elements)

    def visit_items(self, items: Any) -> None:
        """Look into what cannot be changed itself."""
        self._pending.append(items)

    def _visit_subclass(self, container: Any) -> None:
        """Look at the attributes of a container of a class that PyTorch or Python does not make."""
        if type(container) not in _PLAIN:
            self.visit_attributes(container)

    def visit_value(self, holder: Any) -> None:
        get, put = next((get, put) for kind, get, put in _VALUES if isinstance(holder, kind))
        try:
            self._parts.append(_Value(holder, get, put))
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
                state = _TensorState(tensor, is_buffer=is_buffer, in_training=in_training)
                if state.layout is not None:
                    self._sharing.setdefault(storage_of(state.values), []).append(state)
            except (RuntimeError, NotImplementedError, TypeError):
                continue  # a subclass without memory of its own, or without a copy
            self._tensors.append(state)

    def save(self, tensor: Tensor) -> None:
        """Save the values that are about to be changed, if the model holds them."""
        if tensor.layout != torch.strided:
            return
        with torch._C.DisableTorchFunction():
            try:
                storage = storage_of(tensor)
            except (RuntimeError, NotImplementedError):  # a subclass without memory of its own
                return
            if storage not in self._sharing or storage in self._memories:
                return
            with self._lock:
                if storage in self._memories:  # another thread has been faster
                    return
                for state in self._sharing[storage]:
                    state.keep_history()
                with torch.no_grad():
                    self._memories[storage] = _Memory(self._sharing[storage])

    def put_back(self) -> None:
        """Put everything back; what cannot be is named in a warning, after all the rest."""
        failed: dict[str, Exception] = {}
        with torch._C.DisableTorchFunction(), torch.inference_mode(False), torch.no_grad():
            memories = self._memories.values()
            for memory in memories:
                for state in memory.tensors:
                    state.is_changed = True
            filled = [_Table.empty(table) for table in self._empty if table]
            # A view is made anew from what it is a view of.
            tensors = sorted(self._tensors, key=lambda state: state.holder._is_view())
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
                f"Expected to put back what the forward pass has changed in the model, but could not "
                f"for {name}: {reason!r}. Explain a copy of the model, `copy.deepcopy(model)`.",
                stacklevel=6,
            )


def _same(now: Iterable[Any], before: tuple[Any, ...]) -> bool:
    """Whether items are the very ones that they were."""
    items = list(now)
    return len(items) == len(before) and all(map(operator.is_, items, before))


def _in_slot(slot: Any, instance: Any) -> Any:
    try:
        return slot.__get__(instance, type(instance))
    except AttributeError:
        return _MISSING


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # type: ignore[call-overload]


_Layout = tuple[int, torch.dtype, torch.Size, tuple[int, ...]]


def _layout(tensor: Tensor) -> _Layout | None:
    """Where a tensor has its values; None if it has none of its own."""
    if tensor.layout != torch.strided or is_lazy(tensor):
        return None
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether elements share memory, so that the tensor cannot be changed in place itself."""
    if tensor.layout != torch.strided:
        return False
    return any(step == 0 and n > 1 for step, n in zip(tensor.stride(), tensor.shape, strict=True))


def _package(cls: type) -> str:
    return str(getattr(cls, "__module__", "")).partition(".")[0]


class _Memo(dict[type, Any]):
    """What a function says of a class, asked once."""

    def __init__(self, function: Callable[[type], Any]) -> None:
        super().__init__()
        self._function = function

    def __missing__(self, cls: type) -> Any:
        value = self[cls] = self._function(cls)
        return value


def _slots_of(cls: type) -> list[Any]:
    """The descriptors of the attributes that a class keeps outside of ``__dict__``."""
    return [
        member
        for base in cls.__mro__
        if "__slots__" in vars(base)
        for member in vars(base).values()
        if type(member) is types.MemberDescriptorType
    ]


def _copy_of_array(holder: np.ndarray) -> np.ndarray:
    if not holder.flags.writeable:
        raise ValueError
    return holder.copy()


def _put_array(holder: Any, value: Any) -> None:
    holder[...] = value


def _put_items(holder: Any, value: Any) -> None:
    holder[:] = value


def _put_bits(holder: np.random.Generator, value: Any) -> None:
    holder.bit_generator.state = value


_TABLES = (OrderedDict, weakref.WeakKeyDictionary, weakref.WeakValueDictionary, dict)
_PLAIN = frozenset(
    (
        dict,
        OrderedDict,
        collections.defaultdict,
        collections.Counter,
        list,
        deque,
        set,
        *_TABLES,
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
"""Classes of Python that keep what they hold in attributes."""
_VALUES: tuple[tuple[type, Any, Any], ...] = (
    (np.ndarray, _copy_of_array, _put_array),
    (bytearray, bytes, _put_items),
    (array.array, lambda a: a[:], _put_items),
    (torch.Generator, torch.Generator.get_state, torch.Generator.set_state),
    (random.Random, random.Random.getstate, random.Random.setstate),
    (np.random.Generator, lambda g: g.bit_generator.state, _put_bits),
    (np.random.RandomState, np.random.RandomState.get_state, np.random.RandomState.set_state),
)
_FOREIGN = frozenset(("torch", "builtins"))
"""Packages whose objects are none of the model's: those that every model is made of."""


def _visit_of(cls: type) -> Callable[[_Snapshot, Any], None] | None:
    """How the snapshot looks at objects of a class; None where there is nothing to look at."""
    for kinds, visit in (
        (nn.Module, _Snapshot.visit_module),
        (Tensor, _Snapshot.visit_tensor),
        (_TABLES, _Snapshot.visit_table),
        ((list, deque), _Snapshot.visit_sequence),
        ((set, weakref.WeakSet), _Snapshot.visit_set),
        ((tuple, frozenset), _Snapshot.visit_items),
        ((type, enum.Enum, np.memmap), None),
        (tuple(kind for kind, *_ in _VALUES), _Snapshot.visit_value),
        (_ATTRIBUTED, _Snapshot.visit_attributes),
    ):
        if issubclass(cls, kinds):  # type: ignore[arg-type]
            return visit  # type: ignore[return-value]
    return None if _package(cls) in _FOREIGN else _Snapshot.visit_object


_VISITS = _Memo(_visit_of)
_BASES = _Memo(lambda cls: next(base for base in _TABLES if issubclass(cls, base)))
_SLOTS = _Memo(_slots_of)

_SNAPSHOTS: weakref.WeakKeyDictionary[nn.Module, _Snapshot] = weakref.WeakKeyDictionary()
_SNAPSHOTS_LOCK = threading.RLock()  # what is put back may run code of the model's
_OWN_HOOKS: set[int] = set()


def _is_own_hook(key: Any) -> bool:
    return type(key) is int and key in _OWN_HOOKS


@contextmanager
def own_hooks(register: Callable[[], Iterable[Any]]) -> Iterator[None]:
    """Hooks of ours on modules, which a snapshot that another thread takes or puts back leaves alone.

    Args:
        register: registers the hooks and returns their handles; they are removed at the end.
    """
    with _SNAPSHOTS_LOCK:
        handles = list(register())
        _OWN_HOOKS.update(handle.id for handle in handles)
    try:
        yield
    finally:
        with _SNAPSHOTS_LOCK:
            for handle in handles:
                handle.remove()
            _OWN_HOOKS.difference_update(handle.id for handle in handles)


def saver(model: nn.Module) -> Callable[[Tensor], None] | None:
    """What saves the values of a tensor of the model before they are changed, inside of ``unchanged``."""
    with _SNAPSHOTS_LOCK:
        snapshot = _SNAPSHOTS.get(model)
    return None if snapshot is None else snapshot.save


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Put back what a model changes of itself as it runs.

    That is every attribute of its modules, what containers and objects of its own hold, values, flags and
    gradients of its tensors, and its modules themselves; see the module's docstring. No tensor keeps
    a history that it did not have.

    Threads that run one model at a time share what was there before the first of them; the last one puts
    it back.

    Args:
        model: the model; its calls run under an recording that calls :func:`saver`.

    Warns:
        UserWarning: if something cannot be put back; everything else is.

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
