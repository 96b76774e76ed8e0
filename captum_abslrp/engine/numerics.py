r"""Relevance per magnitude, and its scaling.

Calls do not exchange the relevance of a tensor but its *relevance per magnitude*, :math:`s_t = R_t / |t|`.
Every rule starts with a division by its output and ends with a multiplication by its input. Between two
calls, the multiplication and the division cancel.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

EPS = 1e-9
"""The stabilizer, added to the magnitude of a divisor, always in float32 or float64."""


LEAST = 1e-30
"""The magnitude that replaces zero in divisions without a stabilizer."""


LARGE = 2**17
"""Number of elements of a batch above which sums of products are computed per sample on a CPU."""


def divide(relevance: Tensor, output: Tensor) -> Tensor:
    """Convert relevance to relevance per magnitude.

    Args:
        relevance: relevance ``R`` of a tensor, any shape that broadcasts with it.
        output: the tensor ``z``.

    Returns:
        ``s = R / (|z| + EPS)``.

    Example:
        >>> divide(torch.tensor([1.0, 3.0]), torch.tensor([2.0, -3.0]))
        tensor([0.5000, 1.0000])
    """
    return relevance / (output.abs() + EPS)


def per_magnitude(relevance: Tensor, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Convert relevance to relevance per magnitude without a stabilizer, so that zeros keep their relevance.

    Args:
        relevance: relevance ``R`` of a tensor, any shape.
        x: the tensor, same shape.
        dtype: the dtype whose range limits the result; None for that of ``x``.

    Returns:
        ``s = R / max(|x|, LEAST)``.

    Example:
        >>> per_magnitude(torch.tensor([1.0, 3.0]), torch.tensor([2.0, -3.0]))
        tensor([0.5000, 1.0000])
    """
    largest = torch.finfo(x.dtype if dtype is None else dtype).max
    return (relevance / x.abs().clamp(min=LEAST)).clamp(-largest, largest)


def stabilize(seeds: Sequence[Tensor], output: Tensor) -> None:
    """Convert ``R / |z|`` to ``R / (|z| + EPS)``, in place; only values where ``z`` is tiny change.

    Args:
        seeds: relevance per magnitude of the output, one tensor per seed; overwritten.
        output: ``z``.

    Example:
        >>> s = torch.ones(3)
        >>> stabilize([s], torch.tensor([1.0, 3e-9, 1e-9]))
        >>> s
        tensor([1.0000, 0.7500, 0.5000])
    """
    factor = output.abs().clamp_(min=LEAST, max=torch.finfo(output.dtype).max)
    factor /= factor + EPS
    for s in seeds:
        s *= factor


def relevance(x: Tensor, s: Tensor) -> Tensor:
    """Convert relevance per magnitude to relevance, ``|x| s``; 0 where ``s`` is 0, even if ``x`` is infinite.

    Args:
        x: the tensor, any shape.
        s: its relevance per magnitude, same shape.

    Example:
        >>> relevance(torch.tensor([2.0, -3.0]), torch.tensor([0.5, 1.0]))
        tensor([1., 3.])
    """
    return x.abs().clamp_(max=torch.finfo(x.dtype).max) * s


def sums(x: Tensor, s: Tensor, batch_size: int, *, positive: bool = False) -> Tensor:
    """Compute the sum of the magnitudes of the relevance of each sample.

    Args:
        x: the tensor, (B, ...); a leading dimension of k B has k parts of every sample.
        s: its relevance per magnitude, same shape.
        batch_size: B.
        positive: whether both are known to be finite and nonnegative.

    Returns:
        Tensor of shape (B,).

    Example:
        >>> sums(torch.tensor([[1.0, -2.0]]), torch.tensor([[1.0, -1.5]]), 1)
        tensor([4.])
    """
    if positive and x.is_contiguous() and s.is_contiguous():
        if x.device.type == "cpu" and x.numel() > LARGE:  # faster than all at once
            rows = zip(x.view(batch_size, -1), s.view(batch_size, -1), strict=True)
            return torch.stack([torch.dot(of_x, of_s) for of_x, of_s in rows])
        return (x * s).view(batch_size, -1).sum(1)
    if x.dim() < 2:
        magnitudes = relevance(x, s).abs_()
    else:
        # Infinite values are masked and have no relevance.
        magnitudes = (x * s).abs_().nansum(tuple(range(1, x.dim())))
    return magnitudes.view(batch_size, -1).sum(1)


def scale(
    inputs: Sequence[Tensor],
    shares: Sequence[Tensor],
    batch_size: int,
    *,
    totals: Tensor | float,
    joint: bool = False,
    whole: Tensor | None = None,
    positive: Sequence[bool] | None = None,
    signed: bool | Tensor = True,
    unscaled: bool = False,
    kept: Collection[int] = (),
    followers: Sequence[Sequence[Tensor]] = (),
) -> list[Tensor]:
    """Scale the relevance of the inputs of a call, sample by sample, in place.

    A sample without relevance stays zero. A sample whose relevance is below :func:`rounding` of the total
    becomes zero, unless all of it is nonnegative: if relevance of both signs cancels, only rounding errors
    remain, and scaling would amplify them.

    Args:
        inputs: each input of the call, (B, ...); a leading dimension of k B has k parts of every
            sample.
        shares: its relevance per magnitude, same shape; overwritten.
        batch_size: B.
        totals: the target for the sum of the magnitudes of the relevance: a number, or a tensor (B,).
        joint: whether to scale all inputs together to ``totals``; by default each is scaled on its own.
        whole: with ``joint``, the current sum over all inputs, (B,); None to compute it.
        positive: for each input, whether it and its relevance are known to be nonnegative.
        signed: whether relevance can have both signs, and thus cancel: for all samples, or (B,).
        unscaled: whether the relevance of the output had an arbitrary scale. Tiny relevance of both signs
            then becomes NaN, because it may be a rounding error.
        kept: the inputs whose shares are not scaled, because their scale does not matter.
        followers: shares of parts of the inputs, which are scaled by the same factors.

    Returns:
        With ``joint``, the new sum of the magnitudes of the relevance of each input, (B,); otherwise an
        empty list. With ``whole``, the sums are not computed and are those of all inputs together.

    Example:
        >>> x, a, b = torch.tensor([[1.0, -2.0]]), torch.ones(1, 2), torch.ones(1, 2)
        >>> scale([x], [a], 1, totals=1.0)
        []
        >>> a
        tensor([[0.3333, 0.3333]])
        >>> a.fill_(1)
        tensor([[1., 1.]])
        >>> scale([x, x], [a, b], 1, totals=1.0, joint=True)
        [tensor([0.5000]), tensor([0.5000])]
        >>> a
        tensor([[0.1667, 0.1667]])
    """
    known = [False] * len(inputs) if positive is None else positive
    if whole is None:
        sizes = zip(inputs, shares, known, strict=True)
        found = [sums(x, s, batch_size, positive=p) for x, s, p in sizes]
        of_each = [torch.stack(found).sum(0)] * len(found) if joint else found
    else:
        found = of_each = [whole] * len(inputs)
    scaled = []
    for i, (s, total) in enumerate(zip(shares, of_each, strict=True)):
        # An infinite sum results in NaN instead of zeros, which would look like a valid map.
        factor = totals / total.clamp(min=LEAST) + (total - total)
        if isinstance(signed, Tensor):
            little = total < (totals * signed * rounding(s.dtype)).clamp(min=LEAST)
        else:
            little = total < (totals * rounding(s.dtype) if signed else LEAST)
        factor = factor.masked_fill(little, 0)
        if unscaled and signed is True:
            factor = factor.masked_fill(little & (total > 0), torch.nan)
        if joint:
            scaled.append(found[i] * factor)
        if i in kept:
            continue
        for part in (s, *(shares_of[i] for shares_of in followers)):
            rows = part if part.dim() else part.unsqueeze(0)  # a scalar for a single sample
            by_row = factor
            if len(rows) != batch_size:
                by_row = factor.repeat_interleave(len(rows) // batch_size)
            rows *= by_row.view(-1, *[1] * (rows.dim() - 1))
    return scaled


def negative_rows(s: Tensor, batch_size: int) -> Tensor:
    """Return which samples have negative relevance, (B,).

    Args:
        s: relevance, (B, ...); a leading dimension of k B has k parts of every sample.
        batch_size: B.

    Example:
        >>> negative_rows(torch.tensor([[1.0, -2.0], [1.0, 2.0]]), 2)
        tensor([ True, False])
    """
    return (s < 0).reshape(batch_size, -1).any(1)


def rounding(dtype: torch.dtype) -> float:
    """Return the relative size below which a sum counts as a rounding error.

    The size is relative to the sum of the magnitudes of the terms. Errors of single operations, ``eps``,
    accumulate over the terms of a sum, so the bound is
    ``eps ** (7 / 8)``: 2e-14 in float64, 9e-7 in float32, 2e-3 in float16, 0.01 in bfloat16.

    Example:
        >>> f"{rounding(torch.float32):.0e}"
        '9e-07'
    """
    return float(torch.finfo(dtype).eps ** (7 / 8))


def rectify(s: Tensor, x: Tensor) -> Tensor:
    """Return ``s`` where ``x`` is positive, and 0 elsewhere.

    Args:
        s, x: tensors of the same shape.

    Example:
        >>> rectify(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, -5.0, 0.0]))
        tensor([1., 0., 0.])
    """
    result: Tensor = torch.ops.aten.threshold_backward(s, x, 0)
    return result


def rectified(shares: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Apply :func:`rectify` to each share, in place where no later share is the same tensor.

    Example:
        >>> s = torch.tensor([1.0, 2.0])
        >>> rectified([s, s], [torch.tensor([1.0, -1.0]), torch.tensor([-1.0, 1.0])])
        [tensor([1., 0.]), tensor([0., 2.])]
    """
    return [
        rectify(s, x) if any(s is later for later in shares[i + 1 :]) else rectify_in_place(s, x)
        for i, (s, x) in enumerate(zip(shares, inputs, strict=True))
    ]


def rectify_in_place(s: Tensor, x: Tensor, *, negative: bool = False) -> Tensor:
    """Apply :func:`rectify` in place; with ``negative``, keep ``s`` where ``x`` is negative instead."""
    if negative:
        torch.ops.aten.hardtanh_backward.grad_input(s, x, -torch.inf, 0, grad_input=s)
    else:
        torch.ops.aten.threshold_backward.grad_input(s, x, 0, grad_input=s)
    return s


def magnitude(x: Tensor) -> Tensor:
    """Return ``|x|``, and 0 for infinite values, which are masked.

    Args:
        x: any shape.

    Example:
        >>> magnitude(torch.tensor([-2.0, -float("inf")]))
        tensor([2., 0.])
    """
    if x.layout != torch.strided:  # sparse matrices have no masked values
        return x.abs()
    return x.abs().masked_fill_(x.isinf(), 0)
