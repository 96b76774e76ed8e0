"""Channels, heads or tokens of a layer that relevance is followed through.

Axes: B samples, L tokens, D channels.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Selection", "parts_of"]

Selection = int | Sequence[int] | Tensor | Sequence[Sequence[int] | Tensor]
"""Indices of channels, or a tensor of weights; several of these in a list."""


def parts_of(select: Any, tensor: Tensor, dim: int | None) -> tuple[list[Tensor], bool]:
    """The weights of each part that is selected, and whether several parts were asked for.

    Args:
        select: see :data:`Selection`.
        tensor: what it is a part of, (B, ...).
        dim: the dimension that indices are of; None is the last one of tokens, (B, L, D), and dimension 1
            otherwise.

    Returns:
        Tensors that broadcast with ``tensor``, in its dtype.

    Raises:
        TypeError: if the selection is of another type.
        ValueError: if weights do not broadcast with a sample, or nothing is selected.
        IndexError: if an index or the dimension is out of range.

    Example:
        >>> parts, several = parts_of([[0], [1, 2]], torch.rand(2, 3, 4, 4), None)
        >>> [part.flatten().tolist() for part in parts], several
        ([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]], True)
    """
    several = isinstance(select, (list, tuple)) and any(
        isinstance(part, (list, tuple, range, Tensor)) for part in select
    )
    chosen = select if several else [select]
    return [_weights(part, tensor, dim) for part in chosen], several


def _weights(part: Any, tensor: Tensor, dim: int | None) -> Tensor:
    if isinstance(part, Tensor):
        return _broadcast(part, tensor)
    indices = [part] if _is_int(part) else part
    if not isinstance(indices, (list, tuple, range)) or not all(map(_is_int, indices)):
        raise TypeError(
            f"Expected `select` to be the index of a channel, a list of them, a tensor of weights, or a list "
            f"of such lists or tensors, but got {part!r}."
        )
    if len(indices) == 0:
        raise ValueError("Expected `select` to choose at least one channel, but got none.")
    dims = tensor.dim()
    at = (dims - 1 if dims == 3 else 1) if dim is None else dim
    if not -dims <= at < dims or at % dims == 0:
        raise IndexError(
            f"Expected `select_dim` to be a dimension of each sample of a tensor of shape "
            f"{tuple(tensor.shape)}, but got {at}."
        )
    size = tensor.shape[at]
    outside = [index for index in indices if not -size <= index < size]
    if outside:
        raise IndexError(
            f"Expected `select` to be indices of the {size} channels in dimension {at} of a tensor of shape "
            f"{tuple(tensor.shape)}, but got {outside[0]}. Pass `select_dim` if channels are in another "
            f"dimension."
        )
    weights = torch.zeros(size, dtype=tensor.dtype, device=tensor.device)
    weights[[*map(int, indices)]] = 1
    return weights.view([size if i == at % dims else 1 for i in range(dims)])


def _broadcast(weights: Tensor, tensor: Tensor) -> Tensor:
    sample = tensor.shape[1:]
    try:
        fits = torch.broadcast_shapes(weights.shape, sample) == sample
    except RuntimeError:
        fits = False
    if not fits or weights.is_complex():
        raise ValueError(
            f"Expected weights in `select` to broadcast with a sample of shape {tuple(sample)}, without the "
            f"batch dimension, but got {weights.dtype} of shape {tuple(weights.shape)}."
        )
    return weights.detach().to(tensor.device, tensor.dtype.to_real())


def _is_int(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
