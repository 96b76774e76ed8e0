r"""Relevance per magnitude, and how it is scaled.

What goes from call to call is not the relevance of a tensor but its *relevance per magnitude*,
:math:`s_t = R_t / |t|`: every rule starts with a division by its output and ends with a multiplication by its
input, and between two rules the one undoes the other.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

EPS = 1e-9
"""The one stabilizer, added to the magnitude of a divisor, always in float32 or float64."""


LEAST = 1e-30
"""Magnitude of an output that is zero where it is divided by without a stabilizer."""


LARGE = 2**17
"""Elements of a batch above which a sum of products by samples is faster than all at once, on a CPU."""


def divide(relevance: Tensor, output: Tensor) -> Tensor:
    """Relevance per magnitude, from relevance.

    Args:
        relevance: relevance ``R`` of a tensor, any shape that broadcasts with it.
        output: the tensor ``z`` that it belongs to.

    Returns:
        ``s = R / (|z| + EPS)``.

    Example:
        >>> divide(torch.tensor([1.0, 3.0]), torch.tensor([2.0, -3.0]))
        tensor([0.5000, 1.0000])
    """
    return relevance / (output.abs() + EPS)


def per_magnitude(relevance: Tensor, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Relevance per magnitude of what keeps its relevance where it is zero, too: no stabilizer is added.

    Args:
        relevance: relevance ``R`` of a tensor, any shape.
        x: the tensor, same shape.
        dtype: the result stays within its range; None for that of ``x``.

    Returns:
        ``s = R / max(|x|, LEAST)``.

    Example:
        >>> per_magnitude(torch.tensor([1.0, 3.0]), torch.tensor([2.0, -3.0]))
        tensor([0.5000, 1.0000])
    """
    largest = torch.finfo(x.dtype if dtype is None else dtype).max
    return (relevance / x.abs().clamp(min=LEAST)).clamp(-largest, largest)


def stabilize(seeds: Sequence[Tensor], output: Tensor) -> None:
    """From ``R / |z|`` to ``R / (|z| + EPS)``, in place: nothing changes, but where ``z`` vanishes.

    Args:
        seeds: relevance per magnitude of the output, each shaped like it; are overwritten.
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
    """Relevance, from relevance per magnitude: ``|x| s``; 0 where ``s`` is, however large ``x``.

    Args:
        x: the tensor, any shape.
        s: its relevance per magnitude, same shape.

    Example:
        >>> relevance(torch.tensor([2.0, -3.0]), torch.tensor([0.5, 1.0]))
        tensor([1., 3.])
    """
    return x.abs().clamp_(max=torch.finfo(x.dtype).max) * s


def sums(x: Tensor, s: Tensor, batch_size: int, *, positive: bool = False) -> Tensor:
    """The sum of the magnitudes of the relevance of each sample.

    Args:
        x: the tensor, (B, ...); a leading dimension of k B holds k parts of every sample.
        s: its relevance per magnitude, same shape.
        batch_size: B.
        positive: whether both are known to be finite and nowhere negative: what counts of them.

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
        # Infinity is masked: no relevance.
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
    """Scale what one call hands to its inputs, sample by sample, in place.

    A sample without any relevance stays zero. So does one whose relevance is below :func:`rounding` of the
    total, unless none of it is negative: where relevance of both signs cancels, rounding errors are left,
    and scaling would make a map of them.

    Args:
        inputs: each input of the call, (B, ...); a leading dimension of k B holds k parts of every
            sample.
        shares: its relevance per magnitude, same shape; is overwritten.
        batch_size: B.
        totals: what the sum of magnitudes of the relevance shall be: a number, or a tensor (B,).
        joint: scale all inputs together to ``totals``; by default each is scaled on its own.
        whole: with ``joint``, what all inputs together stand for, (B,); None for the sum of them.
        positive: for each input whether it and its relevance are known to be nowhere negative.
        signed: whether relevance may be of both signs, so that it may cancel: for all samples, or (B,).
        unscaled: whether what arrived had another scale than the total, so that nobody knows whether little
            relevance of both signs is a rounding error: it becomes NaN then.
        kept: the inputs whose shares stay as they are, because their scale does not matter.
        followers: other shares of the inputs, parts of these, which are scaled by the same factors.

    Returns:
        With ``joint``, what the magnitudes of the relevance of each input add up to now, (B,); otherwise
        nothing. Where ``whole`` is given, they are not summed, and it is the total.

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
        # A sum that is infinite leaves NaN, not zeros that look like a map.
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
            rows = part if part.dim() else part.unsqueeze(0)  # one number of one sample
            by_row = factor
            if len(rows) != batch_size:
                by_row = factor.repeat_interleave(len(rows) // batch_size)
            rows *= by_row.view(-1, *[1] * (rows.dim() - 1))
    return scaled


def negative_rows(s: Tensor, batch_size: int) -> Tensor:
    """Whether relevance of each sample is negative somewhere, (B,).

    Args:
        s: relevance, (B, ...); a leading dimension of k B holds k parts of every sample.
        batch_size: B.

    Example:
        >>> negative_rows(torch.tensor([[1.0, -2.0], [1.0, 2.0]]), 2)
        tensor([ True, False])
    """
    return (s < 0).reshape(batch_size, -1).any(1)


def rounding(dtype: torch.dtype) -> float:
    """A sum of numbers of a dtype that is smaller, by the sum of their magnitudes, is a rounding error.

    Errors of single operations, ``eps``, add up over the terms of a sum, so the bound is
    ``eps ** (7 / 8)``: 2e-14 in float64, 9e-7 in float32, 2e-3 in float16, 0.01 in bfloat16.

    Example:
        >>> f"{rounding(torch.float32):.0e}"
        '9e-07'
    """
    return float(torch.finfo(dtype).eps ** (7 / 8))


def rectify(s: Tensor, x: Tensor) -> Tensor:
    """``s`` where ``x`` is positive, and 0 elsewhere.

    Args:
        s, x: of one shape.

    Example:
        >>> rectify(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, -5.0, 0.0]))
        tensor([1., 0., 0.])
    """
    result: Tensor = torch.ops.aten.threshold_backward(s, x, 0)
    return result


def rectified(shares: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """:func:`rectify` of each, in the memory of the last one of a kind.

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
    """:func:`rectify` of a tensor that nothing else has, or what is left where ``x`` is negative."""
    if negative:
        torch.ops.aten.hardtanh_backward.grad_input(s, x, -torch.inf, 0, grad_input=s)
    else:
        torch.ops.aten.threshold_backward.grad_input(s, x, 0, grad_input=s)
    return s


def magnitude(x: Tensor) -> Tensor:
    """``|x|``; 0 for what is masked by an infinite value, which takes no part.

    Args:
        x: any shape.

    Example:
        >>> magnitude(torch.tensor([-2.0, -float("inf")]))
        tensor([2., 0.])
    """
    if x.layout != torch.strided:  # a sparse matrix masks nothing
        return x.abs()
    return x.abs().masked_fill_(x.isinf(), 0)
