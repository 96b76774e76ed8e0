"""Parts of the state of a model: the contents of a dict, list, tensor or generator, restored in place."""

from __future__ import annotations

import array
import operator
import random
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.nn.parameter import is_lazy

__all__ = ["Instance", "Items", "Memory", "Members", "Part", "Table", "TensorState", "Value"]

_MISSING: Any = object()

TABLES = (OrderedDict, weakref.WeakKeyDictionary, weakref.WeakValueDictionary, dict)


class Part(Protocol):
    """A part of the state of a model: the contents of one object."""

    holder: Any

    def put_back(self) -> None:
        """Restore the contents. Unchanged contents are not written, because other threads may read them."""


OWN_HOOKS: set[int] = set()
"""Ids of the hooks that this package has currently registered on modules; they are not part of the state."""


def is_own_hook(key: Any) -> bool:
    return type(key) is int and key in OWN_HOOKS


class ByClass(dict[type, Any]):
    """The values of a function of classes, each computed once."""

    def __init__(self, function: Callable[[type], Any]) -> None:
        super().__init__()
        self._function = function

    def __missing__(self, cls: type) -> Any:
        value = self[cls] = self._function(cls)
        return value


def _slots_of(cls: type) -> list[Any]:
    """The descriptors of the attributes of a class that are stored outside of ``__dict__``."""
    return [
        member
        for base in cls.__mro__
        if "__slots__" in vars(base)
        for member in vars(base).values()
        if type(member) is types.MemberDescriptorType
    ]


_BASES = ByClass(lambda cls: next(base for base in TABLES if issubclass(cls, base)))
SLOTS = ByClass(_slots_of)


class Table:
    """The entries of a dict, in their order."""

    __slots__ = ("base", "holder", "keys", "values")

    def __init__(self, table: Any) -> None:
        self.holder = table
        # Use the methods of the base class, because a subclass may override them.
        self.base = _BASES[type(table)]
        items = list(self.base.items(table))  # a single call, because other threads may add items
        if OWN_HOOKS:
            items = [item for item in items if not is_own_hook(item[0])]
        self.keys: tuple[Any, ...] = ()
        self.values: tuple[Any, ...] = ()
        if items:
            self.keys, self.values = zip(*items)

    @classmethod
    def empty(cls, table: dict[Any, Any]) -> Table:
        """The state of a dict that was empty before the forward pass."""
        part = cls(table)
        part.keys = part.values = ()
        return part

    def put_back(self) -> None:
        table, base = self.holder, self.base
        if _same(base.keys(table), self.keys) and _same(base.values(table), self.values):
            return
        before = dict(zip(self.keys, self.values, strict=True))
        # Entry by entry, because another thread may read the dict.
        for key in [k for k in base.keys(table) if k not in before and not is_own_hook(k)]:
            base.__delitem__(table, key)
        for key, value in before.items():
            if base.get(table, key, _MISSING) is not value:
                base.__setitem__(table, key, value)
        order = [key for key in base.keys(table) if not is_own_hook(key)]
        if order != list(before):  # restore the order of state dicts and hooks
            own = {key: base.get(table, key) for key in base.keys(table) if is_own_hook(key)}
            base.clear(table)
            for key, value in {**before, **own}.items():
                base.__setitem__(table, key, value)


class Items:
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


class Members:
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


class Instance:
    """The class of an object, and its attributes outside of ``__dict__``."""

    __slots__ = ("cls", "holder", "members", "slots")

    def __init__(self, instance: Any, slots: Iterable[Any]) -> None:
        self.holder, self.cls = instance, type(instance)
        self.slots = [(slot, _in_slot(slot, instance)) for slot in slots]
        # A parametrized module has its own class, with a property for each parametrization.
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


def _same(now: Iterable[Any], before: tuple[Any, ...]) -> bool:
    """Whether items are identical to those before."""
    items = list(now)
    return len(items) == len(before) and all(map(operator.is_, items, before))


def _in_slot(slot: Any, instance: Any) -> Any:
    try:
        return slot.__get__(instance, type(instance))
    except AttributeError:
        return _MISSING


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


VALUES: tuple[tuple[type, Any, Any], ...] = (
    (np.ndarray, _copy_of_array, _put_array),
    (bytearray, bytes, _put_items),
    (array.array, lambda a: a[:], _put_items),
    (torch.Generator, torch.Generator.get_state, torch.Generator.set_state),
    (random.Random, random.Random.getstate, random.Random.setstate),
    (np.random.Generator, lambda g: g.bit_generator.state, _put_bits),
    (np.random.RandomState, np.random.RandomState.get_state, np.random.RandomState.set_state),
)


class Value:
    """The value of an object that is modified in place and holds no references."""

    __slots__ = ("holder", "put", "value")

    def __init__(
        self, holder: Any, get: Callable[[Any], Any], put: Callable[[Any, Any], None]
    ) -> None:
        self.holder, self.put, self.value = holder, put, get(holder)

    def put_back(self) -> None:
        self.put(self.holder, self.value)


class Memory:
    """The values in the memory that tensors share, before the first change."""

    __slots__ = ("copy", "holder", "tensors", "versions")

    def __init__(self, tensors: list[TensorState]) -> None:
        self.tensors = tensors
        self.holder = tensors[0].values.untyped_storage()
        self.copy = _bytes_of(self.holder).clone()
        # Preserve the version counters, so that tensors that autograd has saved for the user stay valid.
        self.versions = [
            _unsafe_preserve_version_counter(state.holder)
            for state in tensors
            if not state.holder.is_inference()
        ]

    def put_back(self) -> None:
        if self.holder.nbytes() != len(self.copy):
            self.holder.resize_(len(self.copy))
        _bytes_of(self.holder).copy_(self.copy)


class TensorState:
    """The memory, history and flags of a tensor, and the values of a buffer."""

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
        """Keep the autograd history of the tensor, before it is modified in place."""
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
        # Batch norm updates its statistics without incrementing the version.
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
            # A view cannot be detached, so it is replaced by another view of the same tensor.
            base, attributes = tensor._base, tensor.__dict__
            assert base is not None
            if base.grad_fn is not self.grad_fn_of_base:
                base.detach_()
            place = self.values.shape, self.values.stride(), self.values.storage_offset()
            view = base.as_strided(*place)
            torch.utils.swap_tensors(tensor, view)
            tensor.__dict__ = attributes


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # type: ignore[call-overload]


_Layout = tuple[int, torch.dtype, torch.Size, tuple[int, ...]]


def _layout(tensor: Tensor) -> _Layout | None:
    """The address and memory layout of a tensor, or None if it has no memory."""
    if tensor.layout != torch.strided or is_lazy(tensor):
        return None
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether elements share memory, so that the tensor cannot be modified in place."""
    if tensor.layout != torch.strided:
        return False
    return any(step == 0 and n > 1 for step, n in zip(tensor.stride(), tensor.shape, strict=True))
