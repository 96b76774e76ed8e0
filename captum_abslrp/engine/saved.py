"""Tensors that the backward pass needs: saved without a copy, cloned before the model overwrites them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from captum_abslrp.engine.arguments import is_traced


class SavedTensor:
    """A tensor saved for the backward pass, or a function that makes it again.

    Before a call overwrites the tensor, the recording clones it.
    """

    __slots__ = ("_remake", "_tensor")

    def __init__(
        self, tensor: Tensor | None = None, remake: Callable[[], Tensor] | None = None
    ) -> None:
        # Outside of inference mode a tensor that was made in it cannot be used for everything.
        self._tensor = tensor.clone() if tensor is not None and tensor.is_inference() else tensor
        self._remake = remake

    def __call__(self) -> Tensor:
        """The tensor, in float32 where it is of half precision."""
        return in_full_precision(self.as_given())

    def as_given(self) -> Tensor:
        """The tensor in its own dtype."""
        if self._tensor is None:
            assert self._remake is not None
            self._tensor, self._remake = self._remake(), None
        return self._tensor

    def contiguous(self) -> Tensor:
        """The tensor as from ``__call__``, in contiguous memory, in which it is kept from now on."""
        self._tensor = self.as_given().contiguous()
        return self()

    def storage(self) -> torch.UntypedStorage | None:
        """The memory that is kept, if any is."""
        return None if self._tensor is None else self._tensor.untyped_storage()

    def release(self) -> None:
        """Get ready for a change of the tensor in place."""
        if self._tensor is not None:
            self._tensor = self._tensor.clone()


def in_full_precision(tensor: Tensor) -> Tensor:
    """The tensor, in float32 where it is of half precision: ``EPS`` is zero there."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def storage_of(tensor: Tensor) -> int:
    """A number for the memory of a tensor, which all of its views share."""
    if tensor.layout != torch.strided:
        tensor = tensor._values() if tensor.layout == torch.sparse_coo else tensor.values()
    return int(tensor.untyped_storage()._cdata)


class SavedTensors:
    """The tensors that one forward pass has saved, and what is known of memory that calls overwrite.

    PyTorch counts how often a tensor was overwritten, but not in inference mode, so the count is kept here.
    Marks on tensors hold that count, and lapse when it changes.
    """

    def __init__(self) -> None:
        self._saved: dict[int, list[tuple[_Layout | None, SavedTensor]]] = {}
        self._overwritten: dict[int, int] = {}
        self._aliases: dict[int, list[Tensor]] = {}

    def clear(self) -> None:
        """Forget everything, at the end of the forward pass."""
        self._saved.clear()
        self._aliases.clear()

    def save(self, tensor: Tensor) -> SavedTensor:
        """Save a tensor without a copy; each tensor is saved once."""
        count, saved = getattr(tensor, _SAVED, (None, None))
        if saved is not None and count == self._count(tensor):
            return cast(SavedTensor, saved)
        tensor = tensor.detach()
        cells = self._saved.setdefault(storage_of(tensor), [])
        # A sparse tensor has no layout that could be compared.
        layout = _layout(tensor) if tensor.layout == torch.strided else None
        for known, cell in cells:
            if layout is not None and known == layout:
                return cell
        cells.append((layout, SavedTensor(tensor)))
        return cells[-1][1]

    def save_as(self, tensor: Tensor, saved: SavedTensor) -> None:
        """Save a tensor by a function that makes it again, as long as it is not overwritten."""
        setattr(tensor, _SAVED, (self._count(tensor), saved))

    def release(self, target: Tensor) -> None:
        """Prepare for a call that overwrites a tensor: clone what is saved of it."""
        storage = storage_of(target)
        for _, cell in self._saved.pop(storage, []):
            cell.release()
        self._overwritten[storage] = self._overwritten.get(storage, 0) + 1
        for source in self._aliases.pop(storage, []):
            if source is not target:
                setattr(source, _STALE, True)

    def hand_memory(self, target: Tensor, result: Tensor, *, is_ours: bool) -> bool:
        """Give a tensor, which a call overwrites, the memory of the result of the call, if nobody can tell.

        What is saved of the tensor stays as it is then, and nothing is copied.

        Args:
            target: the tensor.
            result: what it shall hold.
            is_ours: whether a call of this forward pass has made it; a buffer of the model keeps its memory.

        Returns:
            Whether it was done: both are plain tensors that lie in memory alike, and nothing but what is
            saved here shares the memory of either.
        """
        is_ours |= hasattr(target, _HANDED)
        alike = _layout(target) == _layout(result) and target.dtype == result.dtype
        if is_traced() or not (is_ours and alike):
            return False
        if not (self._is_alone(target) and self._is_alone(result)):
            return False
        # No mark of either holds any more.
        count = max(self._count(target), self._count(result)) + 1
        self._saved.pop(storage_of(target), None)
        self._aliases.pop(storage_of(target), None)
        target.data = result.detach()
        self._overwritten[storage_of(target)] = count
        setattr(target, _HANDED, True)
        return True

    def _is_alone(self, tensor: Tensor) -> bool:
        """Whether no other tensor shares the memory of a tensor, but what is saved of it."""
        if type(tensor) is not Tensor or tensor._is_view():
            return False
        storage = tensor.untyped_storage()
        if _references(tensor) > _references(torch.empty(1)) + 1:  # `storage`, and somebody else's
            return False
        saved = [cell.storage() for _, cell in self._saved.get(storage._cdata, [])]
        known = sum(s is not None and s._cdata == storage._cdata for s in saved)
        del saved
        # The tensor itself, and `storage`.
        return bool(torch._C._storage_Use_Count(storage._cdata) == known + 2)

    def note_aliases(self, output: Tensor, inputs: Sequence[Tensor]) -> bool:
        """Note which inputs of a call share memory with its output; returns whether any does."""
        aliases = [x for x in inputs if storage_of(x) == storage_of(output)]
        if aliases:
            self._aliases.setdefault(storage_of(output), []).extend(aliases)
        return bool(aliases)

    @staticmethod
    def is_stale(tensor: Tensor) -> bool:
        """Whether the memory of a tensor was overwritten through an alias, so that its history is wrong."""
        return hasattr(tensor, _STALE)

    def is_overwritten(self, tensor: Tensor) -> bool:
        """Whether a call has overwritten the memory of a tensor."""
        return bool(self._overwritten) and self._count(tensor) > 0

    def mark_nonnegative(self, tensor: Tensor) -> None:
        """Note that no entry of a tensor is negative, until it is overwritten."""
        setattr(tensor, _NONNEGATIVE, self._count(tensor))

    def is_nonnegative(self, tensor: Tensor) -> bool:
        """Whether it is known that no negative entry of a tensor takes part in the calls on it."""
        if tensor.dtype in (torch.bool, torch.uint8):
            return True
        mark = getattr(tensor, _NONNEGATIVE, None)
        return mark is not None and mark == self._count(tensor)

    def note_layer(self, tensor: Tensor, layer: Any) -> None:
        """Note which layer with weights has made a tensor, until it is overwritten."""
        setattr(tensor, _LAYER, (self._count(tensor), layer))

    def layer_behind(self, tensor: Tensor) -> Any:
        """The layer that has made a tensor, as it was noted, or None."""
        count, layer = getattr(tensor, _LAYER, (None, None))
        return layer if count == self._count(tensor) else None

    def hides_layer(self, tensor: Tensor) -> bool:
        """Whether a tensor is a copy of what a layer with weights has made, see :func:`hide_layer`."""
        return hasattr(tensor, _HIDDEN)

    def _count(self, tensor: Tensor) -> int:
        return self._overwritten.get(storage_of(tensor), 0)


def hide_layer(tensor: Tensor, copy: Tensor) -> None:
    """Note of a copy with relevance of its own that a layer has made the original, if one has."""
    if hasattr(tensor, _LAYER):
        setattr(copy, _HIDDEN, True)


def _references(tensor: Tensor) -> int:
    """How often Python refers to the memory of a tensor."""
    return sys.getrefcount(tensor.untyped_storage())


_SAVED = "_abslrp_saved"
"""Mark of a tensor that is saved by a function that makes it again: the count, and the saved tensor."""
_HANDED = "_abslrp_handed"
"""Mark of a tensor that has the memory of the result of a call that has overwritten it."""
_STALE = "_abslrp_stale"
"""Mark of a tensor whose memory was overwritten through an alias."""
_NONNEGATIVE = "_abslrp_nonnegative"
"""Mark of a tensor without negative entries: the count."""
_HIDDEN = "_abslrp_hidden_layer"
"""Mark of a copy of the output of a layer with weights, which a later call cannot fold into."""
_LAYER = "_abslrp_layer"
"""Mark of the output of a layer with weights: the count, and the layer."""

_Layout = tuple[torch.Size, torch.dtype, tuple[int, ...], int]


def _layout(tensor: Tensor) -> _Layout:
    """How a tensor lies in its memory."""
    return tensor.shape, tensor.dtype, tensor.stride(), int(tensor.storage_offset())
