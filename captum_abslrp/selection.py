"""Selection of channels, heads or tokens of a layer, to compute the relevance that flows through them.

Axes: B samples, L tokens, D channels.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Selection", "channel_dimension", "parts_of"]

Selection = int | Sequence[int] | Tensor | Sequence[Sequence[int] | Tensor]
"""Channel indices, a tensor of indices, or a tensor of weights; or a list of several of these."""


def channel_dimension(layer: nn.Module, tensor: Tensor) -> int:
    """Return the channel dimension of a layer's tensor.

    It is the last dimension for tokens, (B, L, D), and dimension 1 for feature maps, (B, D, h, w).
    Exceptions, such as the channels-last feature maps of a Swin Transformer or the sequences of a
    one-dimensional convolution, are recognized by the sizes of linear layers, norms and convolutions inside
    the layer.

    Args:
        layer: the layer.
        tensor: its output or input, (B, ...).

    Example:
        >>> channel_dimension(nn.ReLU(), torch.rand(2, 8, 4, 4))
        1
        >>> channel_dimension(nn.ReLU(), torch.rand(2, 9, 8))
        2
        >>> channel_dimension(nn.LayerNorm(8), torch.rand(2, 4, 4, 8))
        3
        >>> channel_dimension(nn.Conv1d(3, 8, 3), torch.rand(2, 8, 9))
        1
    """
    last: set[int] = set()
    first: set[int] = set()
    for module in layer.modules():
        if isinstance(module, nn.Linear):
            last |= {module.in_features, module.out_features}
        elif isinstance(module, nn.LayerNorm):
            last.add(module.normalized_shape[-1])
        elif isinstance(module, nn.modules.conv._ConvNd):
            first |= {module.in_channels, module.out_channels}
        elif isinstance(module, nn.modules.batchnorm._NormBase):
            first.add(module.num_features)
    dims = tensor.dim()
    is_first, is_last = dims > 1 and tensor.shape[1] in first, tensor.shape[-1] in last
    if is_first != is_last:
        return 1 if is_first else dims - 1
    return dims - 1 if dims == 3 else 1


def parts_of(select: Any, tensor: Tensor, dim: int | None) -> tuple[list[Tensor], bool]:
    """Return the weights of each selected part, and whether several parts are selected.

    Args:
        select: see :data:`Selection`.
        tensor: the tensor to select from, (B, ...).
        dim: the dimension of the indices; None is the last dimension for tokens, (B, L, D), and dimension 1
            otherwise.

    Returns:
        Tensors that broadcast with ``tensor``, in its dtype, and a bool.

    Raises:
        TypeError: if the selection has the wrong type.
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
    if isinstance(part, Tensor) and not _has_indices(part):
        return _broadcast(part, tensor, dim)
    indices = [part] if _is_int(part) else part
    if isinstance(part, Tensor):
        indices = part.reshape(-1).tolist()
    if not isinstance(indices, (list, tuple, range)) or not all(map(_is_int, indices)):
        raise TypeError(
            f"Expected `select` to be a channel index, a list of indices, a tensor of weights, or a list of "
            f"such lists or tensors, but got {part!r}."
        )
    if len(indices) == 0:
        raise ValueError("Expected `select` to have at least one channel, but got an empty list.")
    at = _dimension(tensor, dim)
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
    return _along(weights, tensor, at)


def _has_indices(part: Tensor) -> bool:
    """Whether a tensor contains channel indices, for example from ``topk`` or ``argmax``."""
    return part.dim() <= 1 and not (part.is_floating_point() or part.dtype == torch.bool)


def _dimension(tensor: Tensor, dim: int | None) -> int:
    """The channel dimension as a nonnegative index."""
    dims = tensor.dim()
    at = (dims - 1 if dims == 3 else 1) if dim is None else dim
    if not -dims <= at < dims or at % dims == 0:
        raise IndexError(
            f"Expected `select_dim` to be a dimension of each sample of a tensor of shape "
            f"{tuple(tensor.shape)}, but got {at}."
        )
    return at % dims


def _along(weights: Tensor, tensor: Tensor, at: int) -> Tensor:
    """Reshape channel weights to broadcast with the tensor."""
    return weights.view([len(weights) if i == at else 1 for i in range(tensor.dim())])


def _broadcast(weights: Tensor, tensor: Tensor, dim: int | None) -> Tensor:
    sample = tensor.shape[1:]
    if not (weights.is_floating_point() or weights.dtype == torch.bool):
        raise TypeError(
            f"Expected weights in `select` to be floating-point or boolean, but got {weights.dtype} of shape "
            f"{tuple(weights.shape)}. Pass channel indices as a one-dimensional tensor."
        )
    if not weights.isfinite().all():
        raise ValueError(
            "Expected weights in `select` to be finite, but got NaN or infinite values."
        )
    if weights.dim() == 1 and len(weights) > 1:  # one weight per channel
        at = _dimension(tensor, dim)
        if len(weights) != tensor.shape[at]:
            raise ValueError(
                f"Expected one weight for each of {tensor.shape[at]} channels in dimension {at} of a tensor "
                f"of shape {tuple(tensor.shape)}, but got {len(weights)}. Pass `select_dim` if channels are "
                f"in another dimension."
            )
        return _along(weights.detach().to(tensor.device, tensor.dtype.to_real()), tensor, at)
    try:
        fits = torch.broadcast_shapes(weights.shape, sample) == sample
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"Expected weights in `select` to broadcast with a sample of shape {tuple(sample)}, without the "
            f"batch dimension, but got {weights.dtype} of shape {tuple(weights.shape)}."
        )
    return weights.detach().to(tensor.device, tensor.dtype.to_real())


def _is_int(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
