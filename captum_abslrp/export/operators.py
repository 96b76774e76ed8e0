"""Operators that ONNX lacks, as operators that it has."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["COMPOSITES", "DECOMPOSITIONS"]

LONGEST_SUM = 64
"""Maximum number of elements of a sum."""

_ATEN = torch.ops.aten


def _copysign(a: Tensor, b: Tensor) -> Tensor:
    """The magnitude of `a` with the sign of `b`, also where `b` is a zero with a sign."""
    return torch.where((b < 0) | (b.reciprocal() < 0), -a.abs(), a.abs())


def _convolution_backward(
    gradient: Tensor,
    inputs: Tensor,
    weight: Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> Any:
    """The gradient of a convolution with respect to its input: the transposed convolution."""
    if output_mask[1] or output_mask[2]:
        return NotImplemented
    if transposed:
        back = _ATEN.convolution(
            gradient, weight, None, stride, padding, dilation, False, output_padding, groups
        )
        return back, None, None
    covered = [
        (size - 1) * step - 2 * pad + spread * (kernel - 1) + 1
        for size, step, pad, spread, kernel in zip(
            gradient.shape[2:], stride, padding, dilation, weight.shape[2:], strict=True
        )
    ]
    rest = [size - c for size, c in zip(inputs.shape[2:], covered, strict=True)]
    back = _ATEN.convolution(gradient, weight, None, stride, padding, dilation, True, rest, groups)
    return back, None, None


def _avg_pool2d_backward(
    gradient: Tensor,
    inputs: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Any:
    """The gradient of average pooling: each output spreads over its window."""
    kernel = [*kernel_size] * (3 - len(kernel_size))
    step = [*(stride or kernel)] * (3 - len(stride or kernel))
    pad = [*padding] * (3 - len(padding))
    window = gradient.new_ones(1, 1, *kernel)
    if divisor_override is not None or count_include_pad:
        scaled = gradient / (divisor_override or kernel[0] * kernel[1])
    else:
        inside = gradient.new_ones(1, 1, *inputs.shape[-2:])
        scaled = gradient / _ATEN.convolution(
            inside, window, None, step, pad, [1, 1], False, [0, 0], 1
        )
    covered = [
        (size - 1) * s - 2 * p + k
        for size, s, p, k in zip(gradient.shape[-2:], step, pad, kernel, strict=True)
    ]
    rest = [size - c for size, c in zip(inputs.shape[-2:], covered, strict=True)]
    if ceil_mode and min(rest) < 0:
        return NotImplemented
    each = scaled.reshape(-1, 1, *gradient.shape[-2:])
    back = _ATEN.convolution(each, window, None, step, pad, [1, 1], True, rest, 1)
    return back.reshape(inputs.shape)


def _silu_backward(gradient: Tensor, x: Tensor) -> Tensor:
    gate = x.sigmoid()
    return gradient * gate * (1 + x * (1 - gate))


def _mish_backward(gradient: Tensor, x: Tensor) -> Tensor:
    gate = torch.nn.functional.softplus(x).tanh()
    return gradient * (gate + x * x.sigmoid() * (1 - gate * gate))


def _softshrink_backward(gradient: Tensor, x: Tensor, limit: float) -> Tensor:
    return torch.where(x.abs() > limit, gradient, 0.0)


def _separable_backward(
    gradient: Tensor, sizes: Sequence[int], along: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """The gradient of a linear function that treats each axis alone.

    `along` applies the function along an axis to unit vectors, (in, 1, in, 1).
    """
    rows, columns = (
        along(axis, torch.eye(size, dtype=gradient.dtype)[:, None, :, None]).flatten(1)
        for axis, size in enumerate(sizes[-2:])
    )
    return rows @ gradient @ columns.T


def _resizing_backward(resize: Callable[..., Tensor], fixed: int) -> Callable[..., Tensor]:
    """The gradient of a resizing, which has `fixed` arguments between the sizes and the scales."""

    def backward(
        gradient: Tensor, output_size: Sequence[int], input_size: Sequence[int], *options: Any
    ) -> Tensor:
        scales = [*options[fixed:], None, None]

        def along(axis: int, unit: Tensor) -> Tensor:
            return resize(unit, [output_size[axis], 1], *options[:fixed], scales[axis], None)

        return _separable_backward(gradient, input_size, along)

    return backward


def _adaptive_avg_pool2d_backward(gradient: Tensor, x: Tensor) -> Tensor:
    def along(axis: int, unit: Tensor) -> Tensor:
        pooled: Tensor = _ATEN._adaptive_avg_pool2d(unit, [gradient.shape[axis - 2], 1])
        return pooled

    return _separable_backward(gradient, x.shape, along)


def _replication_pad2d_backward(gradient: Tensor, x: Tensor, padding: Sequence[int]) -> Tensor:
    left, right, top, bottom = padding

    def along(axis: int, unit: Tensor) -> Tensor:
        padded: Tensor = _ATEN.replication_pad2d(
            unit, [0, 0, *((left, right) if axis else (top, bottom))]
        )
        return padded

    return _separable_backward(gradient, x.shape, along)


def _order(
    x: Tensor, size: Sequence[int], stride: Sequence[int], offset: int | None
) -> list[int] | None:
    """The dimensions of a strided view by their steps in memory, largest first.

    None if the view does not have each element of `x` once.
    """
    order = sorted(range(len(size)), key=lambda d: stride[d], reverse=True)
    expected = 1
    for d in reversed(order):
        if size[d] != 1 and stride[d] != expected:
            return None
        expected *= size[d]
    return order if not offset and expected == x.numel() and x.is_contiguous() else None


def _as_strided(
    x: Tensor, size: Sequence[int], stride: Sequence[int], storage_offset: int | None = None
) -> Any:
    order = _order(x, size, stride, storage_offset)
    if order is None:
        return NotImplemented
    back = sorted(range(len(order)), key=order.__getitem__)
    return x.reshape([size[d] for d in order]).permute(back)


def _as_strided_scatter(
    x: Tensor,
    src: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    storage_offset: int | None = None,
) -> Any:
    order = _order(x, size, stride, storage_offset)
    return NotImplemented if order is None else src.permute(order).reshape(x.shape)


def _view(x: Tensor, size: Sequence[int]) -> Any:
    """A view, also where a decomposition returns another order of memory than its operator."""
    return NotImplemented if x.is_contiguous() else x.contiguous().view(size)


def _zeros(size: Sequence[int], *_: Any, dtype: torch.dtype | None = None, **__: Any) -> Tensor:
    return torch.zeros(size, dtype=dtype)


def _full_like(
    x: Tensor, value: Any, *_: Any, dtype: torch.dtype | None = None, **__: Any
) -> Tensor:
    return torch.full(x.shape, value, dtype=dtype or x.dtype)


def _zeros_like(x: Tensor, *_: Any, dtype: torch.dtype | None = None, **__: Any) -> Tensor:
    return torch.zeros(x.shape, dtype=dtype or x.dtype)


def _new_zeros(
    x: Tensor, size: Sequence[int], *_: Any, dtype: torch.dtype | None = None, **__: Any
) -> Tensor:
    return torch.zeros(size, dtype=dtype or x.dtype)


def _sum(
    x: Tensor,
    dims: Sequence[int] | None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Any:
    """A long sum as sums of short ones: onnxruntime adds all elements in turn, which rounds more."""
    axes = sorted(d % x.dim() for d in dims or range(x.dim()))
    if dtype is not None or math.prod(x.shape[d] for d in axes) <= LONGEST_SUM:
        return NotImplemented
    last = axes[-1]
    size = x.shape[last]
    part = next((n for n in range(LONGEST_SUM, 1, -1) if size % n == 0), 1)
    if size > LONGEST_SUM and part > 1:
        parts = x.reshape(*x.shape[:last], size // part, part, *x.shape[last + 1 :])
        return parts.sum(last + 1).sum(axes, keepdim)
    return x.sum(last, keepdim).sum(axes[:-1], keepdim) if len(axes) > 1 else NotImplemented


def _mean(
    x: Tensor,
    dims: Sequence[int] | None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Any:
    axes = [*(dims or range(x.dim()))]
    return x.sum(axes, keepdim, dtype=dtype) / math.prod(x.shape[d] for d in axes)


def _batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    momentum: float,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch norm in evaluation mode, which PyTorch 2.6 does not convert to ONNX."""
    shape = [1, -1] + [1] * (x.dim() - 2)
    factor = (variance + epsilon).rsqrt()
    factor = factor if weight is None else factor * weight
    result = (x - mean.view(shape)) * factor.view(shape)
    none = x.new_zeros(0)
    return result if bias is None else result + bias.view(shape), none, none


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    _ATEN.copysign.Tensor: _copysign,
    _ATEN._native_batch_norm_legit_no_training.default: _batch_norm,
    _ATEN.sum.dim_IntList: _sum,
    _ATEN.mean.dim: _mean,
    _ATEN.convolution_backward.default: _convolution_backward,
    _ATEN.avg_pool2d_backward.default: _avg_pool2d_backward,
    _ATEN.softshrink_backward.default: _softshrink_backward,
    _ATEN.upsample_bilinear2d_backward.default: _resizing_backward(_ATEN.upsample_bilinear2d, 1),
    _ATEN.upsample_bicubic2d_backward.default: _resizing_backward(_ATEN.upsample_bicubic2d, 1),
    _ATEN.upsample_nearest2d_backward.default: _resizing_backward(_ATEN.upsample_nearest2d, 0),
    _ATEN._adaptive_avg_pool2d_backward.default: _adaptive_avg_pool2d_backward,
    _ATEN.replication_pad2d_backward.default: _replication_pad2d_backward,
    _ATEN.full_like.default: _full_like,
    _ATEN.view.default: _view,
    _ATEN.as_strided.default: _as_strided,
    _ATEN.as_strided_scatter.default: _as_strided_scatter,
    # Memory without values: the graph writes all of it before it reads it.
    _ATEN.empty.memory_format: _zeros,
    _ATEN.empty_permuted.default: _zeros,
    _ATEN.empty_strided.default: _zeros,
    _ATEN.empty_like.default: _zeros_like,
    _ATEN.new_empty.default: _new_zeros,
    _ATEN.new_empty_strided.default: _new_zeros,
}
"""Operators that ONNX lacks, as operators that it has."""

COMPOSITES: dict[Any, Callable[[Any, Any], Any]] = {
    _ATEN.silu_backward.default: _silu_backward,
    _ATEN.mish_backward.default: _mish_backward,
}
"""Operators that ONNX lacks and that `run_decompositions` keeps, because PyTorch has a composite kernel."""
