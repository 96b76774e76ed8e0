"""Saved tensors of the backward pass: saved without a copy, and cloned before the model overwrites them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from captum_abslrp.engine.arguments import is_traced


class SavedTensor:
    """A tensor saved for the backward pass, or a function that recomputes it.

    The recording clones the tensor before a call overwrites it.
    """

    __slots__ = ("_remake", "_tensor")

    def __init__(
        self, tensor: Tensor | None = None, remake: Callable[[], Tensor] | None = None
    ) -> None:
        # Tensors created in inference mode have restricted use outside of it.
        self._tensor = tensor.clone() if tensor is not None and tensor.is_inference() else tensor
        self._remake = remake

    def __call__(self) -> Tensor:
        """Return the tensor; half precision is converted to float32."""
        return in_full_precision(self.as_given())

    def as_given(self) -> Tensor:
        """Return the tensor in its own dtype."""
        if self._tensor is None:
            assert self._remake is not None
            self._tensor, self._remake = self._remake(), None
        return self._tensor

    def contiguous(self) -> Tensor:
        """Make the saved tensor contiguous, and return it as ``__call__`` does."""
        self._tensor = self.as_given().contiguous()
        return self()

    def storage(self) -> torch.UntypedStorage | None:
        """Return the storage of the saved tensor, or None if it will be recomputed."""
        return None if self._tensor is None else self._tensor.untyped_storage()

    def release(self) -> None:
        """Clone the tensor before it is modified in place."""
        if self._tensor is not None:
            self._tensor = self._tensor.clone()


def in_full_precision(tensor: Tensor) -> Tensor:
    """Convert half precision, in which ``EPS`` is zero, to float32."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def storage_of(tensor: Tensor) -> int:
    """Return an identifier of the storage of a tensor, which all of its views share."""
    if tensor.layout != torch.strided:
        tensor = tensor._values() if tensor.layout == torch.sparse_coo else tensor.values()
    return int(tensor.untyped_storage()._cdata)


class SavedTensors:
    """The saved tensors of one forward pass, and the state of memory that calls overwrite.

    PyTorch does not count in-place changes of tensors in inference mode, so they are counted here. Marks on
    tensors contain the count and become invalid when it changes.
    """

    def __init__(self) -> None:
        self._saved: dict[int, list[tuple[_Layout | None, SavedTensor]]] = {}
        self._overwritten: dict[int, int] = {}
        self._aliases: dict[int, list[Tensor]] = {}

    def clear(self) -> None:
        """Remove all entries at the end of the forward pass."""
        self._saved.clear()
        self._aliases.clear()

    def save(self, tensor: Tensor) -> SavedTensor:
        """Save a tensor without a copy; each tensor is saved once."""
        count, saved = getattr(tensor, _SAVED, (None, None))
        if saved is not None and count == self._count(tensor):
            return cast(SavedTensor, saved)
        tensor = tensor.detach()
        cells = self._saved.setdefault(storage_of(tensor), [])
        # The layouts of sparse tensors cannot be compared.
        layout = _layout(tensor) if tensor.layout == torch.strided else None
        for known, cell in cells:
            if layout is not None and known == layout:
                return cell
        cells.append((layout, SavedTensor(tensor)))
        return cells[-1][1]

    def save_as(self, tensor: Tensor, saved: SavedTensor) -> None:
        """Save a tensor by a function that recomputes it, until it is overwritten."""
        setattr(tensor, _SAVED, (self._count(tensor), saved))

    def release(self, target: Tensor) -> None:
        """Prepare for a call that overwrites a tensor: clone the saved tensors that share its memory."""
        storage = storage_of(target)
        for _, cell in self._saved.pop(storage, []):
            cell.release()
        self._overwritten[storage] = self._overwritten.get(storage, 0) + 1
        for source in self._aliases.pop(storage, []):
            if source is not target:
                setattr(source, _STALE, True)

    def hand_memory(self, target: Tensor, result: Tensor, *, is_ours: bool) -> bool:
        """Replace the memory of a tensor, which a call overwrites, by that of the result, if possible.

        Saved tensors then stay valid, and nothing is copied.

        Args:
            target: the tensor.
            result: its new value.
            is_ours: whether a call of this forward pass created the tensor; a buffer of the model keeps its
                memory.

        Returns:
            Whether the memory was replaced. This requires plain tensors with the same memory layout, whose
            memory is shared only with tensors that are saved here.
        """
        is_ours |= hasattr(target, _HANDED)
        alike = _layout(target) == _layout(result) and target.dtype == result.dtype
        if is_traced() or not (is_ours and alike):
            return False
        if not (self._is_alone(target) and self._is_alone(result)):
            return False
        # Invalidate the marks of both tensors.
        count = max(self._count(target), self._count(result)) + 1
        self._saved.pop(storage_of(target), None)
        self._aliases.pop(storage_of(target), None)
        target.data = result.detach()
        self._overwritten[storage_of(target)] = count
        setattr(target, _HANDED, True)
        return True

    def _is_alone(self, tensor: Tensor) -> bool:
        """Whether only tensors that are saved here share the memory of a tensor."""
        if type(tensor) is not Tensor or tensor._is_view():
            return False
        storage = tensor.untyped_storage()
        if (
            _references(tensor) > _references(torch.empty(1)) + 1
        ):  # `storage`, and another reference
            return False
        saved = [cell.storage() for _, cell in self._saved.get(storage._cdata, [])]
        known = sum(s is not None and s._cdata == storage._cdata for s in saved)
        del saved
        # The tensor itself, and `storage`.
        return bool(torch._C._storage_Use_Count(storage._cdata) == known + 2)

    def note_aliases(self, output: Tensor, inputs: Sequence[Tensor]) -> bool:
        """Register the inputs of a call that share memory with its output; return whether there are any."""
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
        """Mark a tensor as nonnegative, until it is overwritten."""
        setattr(tensor, _NONNEGATIVE, self._count(tensor))

    def is_nonnegative(self, tensor: Tensor) -> bool:
        """Whether a tensor is marked as nonnegative: later calls ignore any negative entries."""
        if tensor.dtype in (torch.bool, torch.uint8):
            return True
        mark = getattr(tensor, _NONNEGATIVE, None)
        return mark is not None and mark == self._count(tensor)

    def note_layer(self, tensor: Tensor, layer: Any) -> None:
        """Mark a tensor as the output of a layer with weights, until it is overwritten."""
        setattr(tensor, _LAYER, (self._count(tensor), layer))

    def layer_behind(self, tensor: Tensor) -> Any:
        """The layer whose output a tensor is marked as, or None."""
        count, layer = getattr(tensor, _LAYER, (None, None))
        return layer if count == self._count(tensor) else None

    def hides_layer(self, tensor: Tensor) -> bool:
        """Whether a tensor is a copy of the output of a layer with weights, see :func:`hide_layer`."""
        return hasattr(tensor, _HIDDEN)

    def _count(self, tensor: Tensor) -> int:
        return self._overwritten.get(storage_of(tensor), 0)


def hide_layer(tensor: Tensor, copy: Tensor) -> None:
    """Mark a copy with separate relevance if the original is the output of a layer with weights."""
    if hasattr(tensor, _LAYER):
        setattr(copy, _HIDDEN, True)


def _references(tensor: Tensor) -> int:
    """The number of Python references to the storage of a tensor."""
    return sys.getrefcount(tensor.untyped_storage())


_SAVED = "_abslrp_saved"
"""Mark of a tensor that is saved by a function that recomputes it: the count, and the saved tensor."""
_HANDED = "_abslrp_handed"
"""Mark of a tensor that has the memory of the result of the call that overwrote it."""
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
    """The memory layout of a tensor."""
    return tensor.shape, tensor.dtype, tensor.stride(), int(tensor.storage_offset())
