r"""The mathematics of absLRP as pure tensor functions.

The definition (Vukadin et al., *Advancing Attribution-Based Neural Network Explainability through
Relative Absolute Magnitude Layer-Wise Relevance Propagation and Multi-Component Evaluation*, ACM TIST
15(3), 2024) divides the relevance of a call's output by its magnitude at the start of every rule,
:math:`s = R / |z|`, and multiplies by the input at its end,

.. math:: R_{in} = x \, \partial/\partial x \, \langle s, f(x; w, b) + f(|x|; |w|, |b|) \rangle .

Between two rules the one undoes the other. So what is handed from call to call is not the relevance but
the *relevance per magnitude* of a tensor, :math:`s_t = R_t / |t|`: no rule divides, and none but the
last multiplies by its input. :func:`divide` makes it at the output of the network, :func:`relevance`
turns it back.

Every function works on one call ``z = f(x; w, b)`` and takes

- ``x``: the input of the call; ``weight``: what it is multiplied by,
- ``s``: relevance per magnitude of ``z``, shaped like it,

and returns that of ``x``, shaped like it, up to a constant that is the same for all inputs of the
call; it is scaled afterwards (:func:`scale`). Where ``x`` is zero so is the result. Relevance has no
unit: only its share of the sample's total has a meaning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "EPS",
    "SignedParts",
    "attention",
    "bilinear",
    "complex_bilinear",
    "complex_diagonal",
    "convolution",
    "diagonal",
    "divide",
    "elementwise",
    "gate",
    "group_norm",
    "layer_norm",
    "linear",
    "linear_map",
    "magnitude",
    "matmul",
    "max_pool",
    "per_magnitude",
    "positive_contributions",
    "rectified",
    "rectify",
    "relevance",
    "rms_norm",
    "rounding",
    "scale",
    "shares",
    "slope_sign",
    "softmax",
    "stabilise",
    "sums",
    "twin",
    "without_rounding",
]

EPS = 1e-9
"""The one stabiliser, added to the magnitude of a divisor, always in float32 or float64."""

LEAST = 1e-30
"""Magnitude of an output that is zero where it is divided by without a stabiliser."""

LARGE = 2**22
"""Elements of a weight from which on its parts are made piece by piece: it is never copied whole."""


CHUNK = 2**17
"""Elements that are worked on at a time where nothing but their sum is wanted."""

FEW = 8
"""Channels of an input for which two convolutions cost as much as one with twice as many."""


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


def stabilise(seeds: Sequence[Tensor], output: Tensor) -> None:
    """From ``R / |z|`` to ``R / (|z| + EPS)``, in place: nothing changes, but where ``z`` vanishes.

    Args:
        seeds: relevance per magnitude of the output, each shaped like it; are overwritten.
        output: ``z``.

    Example:
        >>> s = torch.ones(3)
        >>> stabilise([s], torch.tensor([1.0, 3e-9, 1e-9]))
        >>> s
        tensor([1.0000, 0.7500, 0.5000])
    """
    for few, *of_few in zip(*_in_pieces(output, *seeds), strict=True):
        factor = few.abs().clamp_(min=LEAST, max=torch.finfo(few.dtype).max)
        factor /= factor + EPS
        for s in of_few:
            s *= factor


def _in_pieces(*tensors: Tensor) -> list[Sequence[Tensor]]:
    """Tensors of one shape by a few rows at a time, so that what is made of them stays in the cache."""
    first = tensors[0]
    if first.device.type != "cpu" or first.numel() <= CHUNK or first.dim() == 0:
        return [[t] for t in tensors]
    rows = max(1, CHUNK * len(first) // first.numel())
    return [t.split(rows) for t in tensors]


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
        if x.device.type == "cpu" and x.numel() > CHUNK:  # faster than all at once
            rows = zip(x.view(batch_size, -1), s.view(batch_size, -1), strict=True)
            return torch.stack([torch.dot(of_x, of_s) for of_x, of_s in rows])
        return (x * s).view(batch_size, -1).sum(1)
    if x.dim() < 2:
        magnitudes = relevance(x, s).abs_()
    else:
        dims = tuple(range(1, x.dim()))
        # Infinity is masked: no relevance.
        found = [
            (few * of_few).abs_().nansum(dims)
            for few, of_few in zip(*_in_pieces(x, s), strict=True)
        ]
        magnitudes = torch.cat(found) if len(found) > 1 else found[0]
    return magnitudes.view(batch_size, -1).sum(1)


def scale(
    inputs: Sequence[Tensor],
    shares: Sequence[Tensor],
    batch_size: int,
    *,
    totals: Tensor | float,
    joint: bool = False,
    positive: Sequence[bool] | None = None,
    signed: bool = True,
) -> None:
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
        positive: for each input whether it and its relevance are known to be nowhere negative.
        signed: whether relevance may be of both signs, so that it may cancel.

    Example:
        >>> x, a, b = torch.tensor([[1.0, -2.0]]), torch.ones(1, 2), torch.ones(1, 2)
        >>> scale([x], [a], 1, totals=1.0)
        >>> a
        tensor([[0.3333, 0.3333]])
        >>> a.fill_(1)
        tensor([[1., 1.]])
        >>> scale([x, x], [a, b], 1, totals=1.0, joint=True)
        >>> a
        tensor([[0.1667, 0.1667]])
    """
    known = [False] * len(inputs) if positive is None else positive
    found = [
        sums(x, s, batch_size, positive=p) for x, s, p in zip(inputs, shares, known, strict=True)
    ]
    if joint:
        found = [torch.stack(found).sum(0)] * len(found)
    for s, total in zip(shares, found, strict=True):
        # A sum that is infinite leaves NaN, not zeros that look like a map.
        factor = totals / total.clamp(min=_SMALLEST) + (total - total)
        least = totals * rounding(s.dtype) if signed else _SMALLEST
        factor = factor.masked_fill(total < least, 0)
        rows = s if s.dim() else s.unsqueeze(0)  # one number of one sample
        if len(rows) != batch_size:
            factor = factor.repeat_interleave(len(rows) // batch_size)
        rows *= factor.view(-1, *[1] * (rows.dim() - 1))


_SMALLEST = 1e-30
"""What is divided by at least."""


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
        rectify(s, x) if any(s is later for later in shares[i + 1 :]) else _rectify_in_place(s, x)
        for i, (s, x) in enumerate(zip(shares, inputs, strict=True))
    ]


class SignedParts:
    """Positive and negative part of a weight, made when they are first asked for.

    Args:
        weight: the weight, any shape.
        nonnegative: whether it is known to have no negative entry.
        dtype: of the parts; None for that of the weight.

    Example:
        >>> parts = SignedParts(torch.tensor([3.0, -5.0]))
        >>> parts.positive, parts.negative
        (tensor([3., 0.]), tensor([ 0., -5.]))
    """

    def __init__(
        self, weight: Tensor, *, nonnegative: bool = False, dtype: torch.dtype | None = None
    ) -> None:
        self.weight = weight
        self.nonnegative = nonnegative
        self._dtype = weight.dtype if dtype is None else dtype
        self._made: dict[bool, Tensor] = {}

    @property
    def positive(self) -> Tensor:
        """What is positive of the weight, and zero elsewhere."""
        if True not in self._made:
            weight = self.weight.to(self._dtype)
            self._made[True] = weight if self.nonnegative else weight.clamp(min=0)
        return self._made[True]

    @property
    def negative(self) -> Tensor:
        """What is negative of the weight, and zero elsewhere."""
        if False not in self._made:
            self._made[False] = self.weight.to(self._dtype).clamp(max=0)
        return self._made[False]

    def rows(self, step: int) -> Iterator[tuple[slice, SignedParts]]:
        """A few rows of the weight at a time, whose parts are not kept."""
        for start in range(0, len(self.weight), step):
            rows = slice(start, start + step)
            yield rows, SignedParts(self.weight[rows], dtype=self._dtype)


def _parts(weight: Tensor | SignedParts) -> SignedParts:
    return weight if isinstance(weight, SignedParts) else SignedParts(weight)


def positive_contributions(
    x: Tensor,
    weight: Tensor | SignedParts,
    transposed: Callable[[Tensor], Tensor],
    *,
    nonnegative: bool = False,
) -> Tensor:
    r"""The rule for a call that is linear in ``x``: only positive contributions count.

    :math:`R_i = \sum_j (x_i w_{ij} + |x_i w_{ij}|) s_j = 2 \sum_j (x_i w_{ij})^+ s_j`, per magnitude:
    :math:`T(w^+)` where :math:`x > 0` and :math:`-T(w^-)` where :math:`x < 0`, but for the 2. The
    second product is left out where it is known that one of them has no negative entry.

    Args:
        x: input, any shape.
        weight: the weight, any shape.
        transposed: the transposed product :math:`T(w)` of ``s`` with a weight, shaped like ``x``; a new
            tensor.
        nonnegative: whether ``x`` is known to have no negative entry that takes part.

    Returns:
        Relevance per magnitude of ``x``.

    Example:
        >>> x, w = torch.tensor([1.0, -2.0]), torch.tensor([[3.0, -5.0]])
        >>> positive_contributions(x, w, lambda w: torch.ones(1) @ w)
        tensor([3., 5.])
    """
    parts = _parts(weight)
    positive = transposed(parts.positive)
    if nonnegative or parts.nonnegative:
        return _rectify_in_place(positive, x)
    return _chosen([positive, transposed(parts.negative)], x)


def _rectify_in_place(s: Tensor, x: Tensor, *, negative: bool = False) -> Tensor:
    """:func:`rectify` of a tensor that nothing else has, or what is left where ``x`` is negative."""
    if negative:
        torch.ops.aten.hardtanh_backward.grad_input(s, x, -torch.inf, 0, grad_input=s)
    else:
        torch.ops.aten.threshold_backward.grad_input(s, x, 0, grad_input=s)
    return s


def linear(
    x: Tensor, weight: Tensor | SignedParts, s: Tensor, *, nonnegative: bool = False
) -> Tensor:
    """:func:`positive_contributions` of ``F.linear``.

    Args:
        x: (..., in_features).
        weight: (out_features, in_features).
        s: (..., out_features).
        nonnegative: whether ``x`` is known to have no negative entry that takes part.

    Example:
        >>> linear(torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0, -4.0]]), torch.ones(1, 1))
        tensor([[3., 4.]])
    """
    parts = _parts(weight)
    if parts.weight.numel() <= LARGE:
        return positive_contributions(x, parts, lambda w: s @ w, nonnegative=nonnegative)
    columns = s.flatten(0, -2)
    positive = columns.new_zeros(len(columns), x.shape[-1])
    negative = None if nonnegative else torch.zeros_like(positive)
    for rows, piece in parts.rows(max(1, LARGE // x.shape[-1])):
        positive.addmm_(columns[:, rows], piece.positive)
        if negative is not None:
            negative.addmm_(columns[:, rows], piece.negative)
    if negative is None:
        return _rectify_in_place(positive.view(x.shape), x)
    return _chosen([positive.view(x.shape), negative.view(x.shape)], x)


def convolution(
    x: Tensor,
    weight: Tensor | SignedParts,
    s: Tensor,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    output_padding: Sequence[int] | None = None,
    nonnegative: bool = False,
) -> Tensor:
    """:func:`positive_contributions` of a convolution in one, two or three dimensions.

    Args:
        x: (B, C_in, ...).
        weight: (C_out, C_in / groups, ...), or (C_in, C_out / groups, ...) where transposed.
        s: (B, C_out, ...).
        stride, padding, dilation: one number per spatial dimension.
        groups: number of blocks of channels.
        output_padding: of a transposed convolution; None for a convolution.
        nonnegative: whether ``x`` is known to have no negative entry that takes part.

    Example:
        >>> x, w = torch.ones(1, 1, 2, 2), torch.tensor([[[[2.0]]], [[[-1.0]]]])
        >>> convolution(x, w, torch.ones(1, 2, 2, 2), stride=(1, 1), padding=(0, 0),
        ...             dilation=(1, 1), groups=1).flatten()
        tensor([2., 2., 2., 2.])
    """
    parts = _parts(weight)
    is_transposed = output_padding is not None
    covers_all = parts.weight.shape[2:] == x.shape[2:] and not any(padding)
    if covers_all and groups == 1 and not is_transposed:
        # A linear layer, perhaps with a very large weight.
        flat = SignedParts(parts.weight.flatten(1), dtype=s.dtype)
        return linear(x.flatten(1), flat, s.flatten(1), nonnegative=nonnegative).view_as(x)

    spatial = parts.weight.shape[2:]
    if max(stride) > 1 and not any(padding) and set(spatial) == {1} and not is_transposed:
        # Most places of the input take no part.
        seen = (slice(None), slice(None), *(slice(None, None, step) for step in stride))
        result = torch.zeros_like(x, dtype=s.dtype)
        result[seen] = convolution(
            x[seen],
            parts,
            s,
            stride=[1] * len(spatial),
            padding=padding,
            dilation=dilation,
            groups=groups,
            nonnegative=nonnegative,
        )
        return result
    plain = groups == 1 and not is_transposed and set(dilation) == {1}
    side_by_side = tuple(stride) == tuple(spatial) != (1,) * len(spatial) and not any(padding)
    few = x.shape[1] <= FEW

    def transposed(w: Tensor, like: Tensor = x) -> Tensor:
        if plain and (side_by_side or (few and max(stride) > 1)):
            return _by_phases(s, w, like, stride, padding)
        # Of the input, only shape and layout are looked at.
        grad_input: Tensor = torch.ops.aten.convolution_backward(
            s, like, w, None, stride, padding, dilation, is_transposed,
            output_padding or [0] * len(stride), groups, [True, False, False],
        )[0]  # fmt: skip
        return grad_input

    if nonnegative or groups > 1 or is_transposed or not few:
        return positive_contributions(x, parts, transposed, nonnegative=nonnegative)
    # An image: the products with the positive and the negative part of the weight as one.
    both = transposed(torch.cat([parts.positive, parts.negative], 1), torch.cat([x, x], 1))
    positive, negative = both.chunk(2, 1)
    return _chosen([t.contiguous() for t in (positive, negative)], x)


def _by_phases(
    s: Tensor, weight: Tensor, like: Tensor, stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    """The transposed product of a convolution with a stride, as a convolution without; shaped like the input.

    Input places that are a stride apart meet the same taps: place ``k a + r`` meets tap ``r + p - k d`` of
    output place ``a + d``. So each phase ``r`` is a channel of its own, over places ``a``.
    """
    channels, dims = weight.shape[1], len(stride)
    pads, kept = [], [slice(None), slice(None)]
    for dim, (k, p, size) in enumerate(zip(stride, padding, like.shape[2:], strict=True)):
        taps = weight.shape[2 + 2 * dim]
        lowest, highest = -((taps - 1 - p) // k), (k - 1 + p) // k
        phase = torch.arange(k, device=weight.device).unsqueeze(1)
        offset = torch.arange(lowest, highest + 1, device=weight.device)
        # A tap that does not exist is the last one, which is zero.
        met = (phase + p - k * offset).flatten().clamp_(-1, taps) % (taps + 1)
        end = [0, 0] * (weight.dim() - 3 - 2 * dim) + [0, 1]
        weight = F.pad(weight, end).index_select(2 + 2 * dim, met)
        weight = weight.unflatten(2 + 2 * dim, (k, -1))
        places = -(-size // k)
        pads.append(max(0, -lowest, places - 1 + highest - (s.shape[2 + dim] - 1)))
        kept.append(slice(pads[-1] + lowest, pads[-1] + lowest + places))
    # (C_out, C_in, phase, offset, phase, offset ...) to (C_in phases, C_out, offsets)
    phases, offsets = ([2 + 2 * dim + i for dim in range(dims)] for i in (0, 1))
    weight = weight.permute(1, *phases, 0, *offsets).flatten(0, dims)
    if set(weight.shape[2:]) == {1} and not any(pads):  # patches side by side
        cells = (s.movedim(1, -1) @ weight.flatten(1).mT).movedim(-1, 1)
    else:
        convolve = (torch.conv1d, torch.conv2d, torch.conv3d)[dims - 1]
        cells = convolve(s, weight, padding=pads)
    cells = cells[tuple(kept)]
    cells = cells.unflatten(1, (channels, *stride))
    # (B, C_in, phase, phase ..., place, place ...)
    order = [i + dim for dim in range(dims) for i in (2 + dims, 2)]
    grown = [k * n for k, n in zip(stride, cells.shape[2 + dims :], strict=True)]
    result = cells.permute(0, 1, *order).reshape(len(s), channels, *grown)
    result = result[tuple(map(slice, (len(s), channels, *like.shape[2:])))]
    if like.is_contiguous():
        return result.contiguous()
    return torch.empty_like(like, dtype=result.dtype).copy_(result)


def matmul(a: Tensor | SignedParts, b: Tensor | SignedParts, s: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`positive_contributions` of ``a @ b`` for each argument, the other one fixed.

    Args:
        a: (..., N, K).
        b: (..., K, M), batch dimensions broadcast with those of ``a``.
        s: (..., N, M).

    Returns:
        What ``a`` and ``b`` get.

    Example:
        >>> matmul(torch.tensor([[1.0, -1.0]]), torch.tensor([[2.0], [3.0]]), torch.ones(1, 1))
        (tensor([[2., 0.]]), tensor([[1.],
                [0.]]))
    """
    of_a, of_b = _parts(a), _parts(b)
    x, y = of_a.weight, of_b.weight
    lies_transposed = y.stride(-2) < y.stride(-1)  # as k.mT does: what it gets lies like it

    def to_a(w: Tensor) -> Tensor:
        return (s @ w.mT).sum_to_size(x.shape)

    def to_b(w: Tensor) -> Tensor:
        return ((s.mT @ w).mT if lies_transposed else w.mT @ s).sum_to_size(y.shape)

    return (
        positive_contributions(x, of_b, to_a, nonnegative=of_a.nonnegative),
        positive_contributions(y, of_a, to_b, nonnegative=of_b.nonnegative),
    )


def linear_map(x: Tensor, call: Callable[[Tensor], Tensor], s: Tensor) -> Tensor:
    """The twin form of a linear call without weights of its own: pooling, mean, sum, interpolation.

    Where no coefficient is negative (all but bicubic interpolation) it is
    :func:`positive_contributions`.

    Args:
        x: input, any shape.
        call: the call, linear in ``x``.
        s: shaped like the output of the call.

    Example:
        >>> linear_map(torch.tensor([[1.0, -1.0]]), lambda x: x.mean(1), torch.ones(1))
        tensor([[0.5000, 0.0000]])
    """
    return rectify(_transposed(call, x, s), x)


def shares(x: Tensor, call: Callable[[Tensor], Tensor], relevance: Tensor) -> Tensor:
    r"""Relevance by the share of magnitudes, for linear calls on the tail of the score.

    :math:`R_i = \sum_j |x_i| a_{ij} / (\sum_{i'} |x_{i'}| a_{i'j}) \, R_j`. Nothing is lost, but where all
    inputs are 0.

    Args:
        x: input, any shape.
        call: the call, linear in ``x``, without negative coefficients.
        relevance: ``R``, relevance of the output, shaped like it.

    Returns:
        Relevance of ``x``, shaped like it.

    Example:
        >>> shares(torch.tensor([[1.0, -3.0]]), lambda x: x.mean(1), torch.ones(1))
        tensor([[0.2500, 0.7500]])
    """
    sizes = magnitude(x)
    whole = call(sizes)
    return sizes * _transposed(call, sizes, (relevance / whole).masked_fill_(whole == 0, 0))


def without_rounding(s: Tensor, output: Tensor, dims: Sequence[int]) -> Tensor:
    """Relevance per magnitude without that of numbers that are rounding errors.

    Args:
        s: relevance per magnitude of the output.
        output: the output of a call that adds up numbers of both signs, such as a Fourier transform.
        dims: the dimensions that it adds up over, along which the largest magnitude is what counts. Of a
            real view the last one, of the two parts, is among them.

    Returns:
        ``s``, and 0 where the output is less than 16 times the machine precision of that magnitude.

    Example:
        >>> without_rounding(torch.ones(3), torch.tensor([1.0, 1e-8, -0.1]), [0])
        tensor([1., 0., 1.])
    """
    sizes = output.abs()
    bound = 16 * torch.finfo(output.dtype).eps * sizes.amax(tuple(dims), keepdim=True)
    return s.masked_fill(sizes <= bound, 0)


def bilinear(
    a: Tensor, b: Tensor, call: Callable[[Tensor, Tensor], Tensor], s: Tensor
) -> tuple[Tensor, Tensor]:
    """:func:`positive_contributions` of a product of two tensors, for each the other one fixed.

    Args:
        a: first argument, any shape.
        b: second argument, any shape.
        call: ``(a, b) -> z``, a sum of products of their elements: einsum, outer, dot ...
        s: shaped like ``z``.

    Returns:
        What ``a`` and ``b`` get.

    Example:
        >>> bilinear(torch.tensor([1.0, -1.0]), torch.tensor([2.0, 3.0]), torch.dot, torch.tensor(1.0))
        (tensor([2., 0.]), tensor([1., 0.]))
    """
    of_a = positive_contributions(a, b, lambda w: _transposed(lambda v: call(v, w), a, s).clone())
    of_b = positive_contributions(b, a, lambda w: _transposed(lambda v: call(w, v), b, s).clone())
    return of_a, of_b


def _transposed(call: Callable[[Tensor], Tensor], x: Tensor, s: Tensor) -> Tensor:
    """The transposed product of ``s`` with the linear part of a call at ``x``."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        output = call(leaf)
    if not output.requires_grad:
        return torch.zeros_like(x)
    return torch.autograd.grad(output, leaf, s, allow_unused=True, materialize_grads=True)[0]


def diagonal(x: Tensor, weight: Tensor) -> Tensor:
    r"""The factor of calls in which each element has a weight of its own: batch norm in evaluation mode,
    a product.

    :math:`R_{in} = 2 (x c)^+ s`, per magnitude :math:`k = |c|` where :math:`x c > 0`, but for the 2.

    Args:
        x: input, broadcastable to the output.
        weight: ``c``, broadcastable to the output.

    Returns:
        What ``s`` is multiplied by, shaped like the output.

    Example:
        >>> diagonal(torch.tensor([1.0, 1.0]), torch.tensor([2.0, -2.0]))
        tensor([2., 0.])
    """
    product = x * weight
    sizes = weight.abs().expand_as(product)
    # In the memory of the product, each element of which is looked at once.
    torch.ops.aten.threshold_backward.grad_input(sizes, product, 0, grad_input=product)
    return product


def complex_diagonal(x: Tensor, weight: Tensor) -> Tensor:
    r"""The factors of a product of complex numbers, element by element.

    :math:`(a + ib)(c + id)` has the parts :math:`ac - bd` and :math:`ad + bc`: a linear map from two real
    numbers to two, of which each contribution is as in :func:`diagonal`.

    Args:
        x: real view, (..., 2), broadcastable to that of the output.
        weight: real view of what ``x`` is multiplied by, broadcastable to that of the output.

    Returns:
        What ``s`` is multiplied by, (..., part of ``x``, part of the output); is summed over the last
        dimension.

    Example:
        >>> complex_diagonal(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))
        tensor([[3., 4.],
                [0., 3.]])
    """
    (a, b), (c, d) = x.unbind(-1), weight.unbind(-1)
    of_real = torch.stack([diagonal(a, c), diagonal(a, d)], -1)
    of_imag = torch.stack([diagonal(b, -d), diagonal(b, c)], -1)
    return torch.stack([of_real, of_imag], -2)


def complex_bilinear(
    x: Tensor, weight: Tensor, call: Callable[[Tensor, Tensor], Tensor], s: Tensor
) -> Tensor:
    """:func:`positive_contributions` of a product of two complex tensors, the second one fixed.

    As in :func:`complex_diagonal`, each part of the output is a sum over both parts of ``x``.

    Args:
        x: real view, (..., 2).
        weight: real view of the other factor, (..., 2).
        call: ``(x, weight) -> z`` on real tensors, a sum of products of their elements: matmul, einsum ...
        s: shaped like the real view of the output.

    Returns:
        What ``x`` gets, shaped like it.

    Example:
        >>> x, w = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])
        >>> complex_bilinear(x, w, torch.dot, torch.ones(2))
        tensor([[7., 3.]])
    """
    (a, b), (c, d) = x.unbind(-1), weight.unbind(-1)
    s_real, s_imag = s.unbind(-1)

    def of_part(part: Tensor, to_real: Tensor, to_imag: Tensor) -> Tensor:
        def product(weight: Tensor, s: Tensor) -> Tensor:
            return _transposed(lambda v: call(v, weight), part, s)

        def transposed(weights: Tensor) -> Tensor:
            return product(weights[0], s_real) + product(weights[1], s_imag)

        return positive_contributions(part, torch.stack([to_real, to_imag]), transposed)

    return torch.stack([of_part(a, c, d), of_part(b, -d, c)], -1)


def elementwise(
    x: Tensor,
    call: Callable[[Tensor], Tensor],
    *,
    even_slope: bool = False,
) -> Tensor:
    r"""The factor of a call that acts on each element alone.

    The twin form, per magnitude: :math:`k = \mathrm{sign}(x) f'(x) + f'(|x|)`; 0 where :math:`x = 0`.

    Args:
        x: input, any shape.
        call: ``f``, for example ``torch.tanh``.
        even_slope: whether :math:`f'(x) = f'(-x)`, so that :math:`k = 2 f'(x)` where :math:`x > 0`.

    Returns:
        ``k``, what ``s`` is multiplied by, shaped like ``x``.

    Example:
        >>> elementwise(torch.tensor([2.0, -2.0]), torch.square)
        tensor([8., 8.])
    """
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        output = call(leaf)
        both = output if even_slope else output + call(leaf.abs())
        (gradient,) = torch.autograd.grad(both, leaf, torch.ones_like(both))
    if even_slope:
        return rectify(2 * gradient, x)
    # At 0 the slope may be infinite (square root).
    return (x.sign() * gradient).masked_fill_(x == 0, 0)


def slope_sign(x: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
    """The sign of the slope of a call that acts on each element alone: -1 where it falls, and 1 elsewhere.

    Args:
        x: input, any shape.
        call: ``f``, for example ``torch.abs``.

    Example:
        >>> slope_sign(torch.tensor([2.0, -2.0, 0.0]), torch.abs)
        tensor([ 1., -1.,  1.])
    """
    slope = _transposed(call, x, torch.ones_like(x))
    return torch.where(slope < 0, -1.0, 1.0).to(x.dtype)


def gate(x: Tensor, slope: Callable[[Tensor], Tensor]) -> Tensor:
    r""":func:`elementwise` of functions with :math:`f(x) - f(-x) = x`: GELU, SiLU, hardswish.

    Their slopes at ``x`` and ``-x`` add up to one, so that one is enough:
    :math:`k = \mathrm{sign}(x) f'(x) + [x < 0] / 2`, but for a factor of two.

    Args:
        x: input, any shape.
        slope: :math:`f'`; returns a new tensor.

    Returns:
        ``k``, what ``s`` is multiplied by, shaped like ``x``.

    Example:
        >>> gate(torch.tensor([1.0, -1.0]), lambda x: torch.ops.aten.silu_backward(torch.ones(2), x))
        tensor([0.9277, 0.4277])
    """
    factor = torch.empty_like(x)
    for few, into in zip(*_in_pieces(x, factor), strict=True):
        sign = few.sign()
        signed = slope(few).mul_(sign)
        torch.sub(signed, sign.clamp_(max=0), alpha=0.5, out=into)
    return factor


def max_pool(
    x: Tensor,
    pool: Callable[[Tensor], tuple[Tensor, Tensor]],
    indices: Tensor,
    s: Tensor,
    *,
    nonnegative: bool = False,
) -> Tensor:
    r"""The twin form of max pooling: the maximum of ``x`` and of ``|x|`` in every window.

    Padding by :math:`-\infty` takes no part.

    Args:
        x: (B, C, ...).
        pool: ``x -> (maximum, indices)``; the indices count the elements of one channel.
        indices: those of ``x``.
        s: shaped like the maximum.
        nonnegative: whether ``x`` is known to have no negative entry that takes part.

    Example:
        >>> x = torch.tensor([[[1.0, -2.0]]])
        >>> pool = lambda x: torch.nn.functional.max_pool1d(x, 2, return_indices=True)
        >>> max_pool(x, pool, pool(x)[1], torch.ones(1, 1, 1))
        tensor([[[1., 1.]]])
    """
    spatial = x.dim() - 2

    def routed(indices: Tensor) -> Tensor:
        rows = torch.zeros_like(x, memory_format=torch.contiguous_format).flatten(-spatial)
        rows.scatter_add_(-1, indices.flatten(-spatial), s.flatten(-spatial))
        result = rows.view(x.shape)
        return result if x.is_contiguous() else torch.empty_like(x).copy_(result)

    if nonnegative:
        return routed(indices)
    return routed(indices).mul_(x.sign()).add_(routed(pool(magnitude(x))[1]))


def layer_norm(x: Tensor, normalized_dims: int, weight: Tensor | None, eps: float) -> Tensor:
    r"""The factor of layer norm; mean and variance are constants of the call.

    :math:`R_{in} = (x w / \sigma(x) + |x w| / \sigma(|x|)) \, s`, per magnitude
    :math:`k = \mathrm{sign}(x) w / \sigma(x) + |w| / \sigma(|x|)`.

    Args:
        x: input, (..., D).
        normalized_dims: how many trailing dimensions are normalised together.
        weight: ``w`` of these dimensions, or None.
        eps: of the layer norm, inside the square root of the variance.

    Returns:
        What ``s`` is multiplied by, shaped like ``x``.

    Example:
        >>> layer_norm(torch.tensor([[1.0, -1.0]]), 1, torch.ones(2), 1.0)
        tensor([[1.7071, 0.2929]])
    """
    dims = list(range(-normalized_dims, 0))
    plain, twin_part = _rsigma(x, dims, eps), _rsigma(x.abs(), dims, eps)
    if weight is not None:
        plain, twin_part = plain * weight, twin_part * weight.abs()
    sign = x.sign()
    return (sign * plain).addcmul_(sign.abs(), twin_part)


def group_norm(x: Tensor, groups: int, weight: Tensor | None, eps: float) -> Tensor:
    r"""The factor of group norm (of instance norm, with one channel in each group).

    As :func:`layer_norm`: :math:`k = \mathrm{sign}(x) w / \sigma(x) + |w| / \sigma(|x|)` with
    :math:`\sigma` over the channels of a group and all places.

    Args:
        x: input, (B, C, ...).
        groups: number of groups of channels.
        weight: ``w`` of each channel, (C,), or None.
        eps: of the group norm, inside the square root of the variance.

    Returns:
        What ``s`` is multiplied by, shaped like ``x``.

    Example:
        >>> group_norm(torch.tensor([[[1.0, -1.0]]]), 1, torch.ones(1), 1.0)
        tensor([[[1.7071, 0.2929]]])
    """
    grouped = x.unflatten(1, (groups, -1)).flatten(2)
    per_channel = (1, x.shape[1], *[1] * (x.dim() - 2))
    plain, twin_part = (
        _rsigma(v, [2], eps).expand(-1, -1, x.shape[1] // groups).reshape(-1, *per_channel[1:])
        for v in (grouped, grouped.abs())
    )
    if weight is not None:
        weight = weight.view(per_channel)
        plain, twin_part = plain * weight, twin_part * weight.abs()
    sign = x.sign()
    return (sign * plain).addcmul_(sign.abs(), twin_part)


def _rsigma(x: Tensor, dims: list[int], eps: float) -> Tensor:
    """The reciprocal of the standard deviation over some dimensions."""
    centred = x - x.mean(dims, keepdim=True)
    return centred.square_().mean(dims, keepdim=True).add_(eps).rsqrt_()


def rms_norm(x: Tensor, normalized_dims: int, weight: Tensor | None, eps: float) -> Tensor:
    r"""The factor of RMS norm; the mean square is a constant of the call.

    The mean square of ``x`` is that of ``|x|``: :math:`R_{in} = 2 (x w)^+ / \mathrm{rms}(x) \, s`,
    per magnitude :math:`k = 2 |w| / \mathrm{rms}(x)` where :math:`x w > 0`.

    Args and returns: as :func:`layer_norm`.

    Example:
        >>> rms_norm(torch.tensor([[3.0, -4.0]]), 1, torch.ones(2), 0.0)
        tensor([[0.5657, 0.0000]])
    """
    dims = list(range(-normalized_dims, 0))
    scale = 2 * (x.square().mean(dims, keepdim=True) + eps).rsqrt()
    scale = scale.expand_as(x) if weight is None else scale * weight
    return rectify(scale.abs(), x * scale)


def softmax(x: Tensor, probabilities: Tensor, dim: int) -> Tensor:
    r"""The factor of softmax; maximum and denominator are constants of the call.

    :math:`R_{in} = (x p + |x| \, \mathrm{softmax}(|x|)) \, s`, per magnitude
    :math:`k = \mathrm{sign}(x) p + \mathrm{softmax}(|x|)`. What is masked, by :math:`-\infty` or a number
    that leaves it a probability of at most ``EPS``, takes no part; where all is masked there is none.

    Args:
        x: logits, any shape.
        probabilities: ``p = softmax(x)``.
        dim: the dimension that adds up to one.

    Returns:
        What ``s`` is multiplied by, shaped like ``x``.

    Example:
        >>> x = torch.tensor([0.0, -float("inf"), 1.0])
        >>> softmax(x, x.softmax(0), 0)
        tensor([0.0000, -0.0000, 1.4621])
    """

    factor = torch.empty_like(x)
    whole = dim % x.dim() == 0
    pieces = (
        ([t] for t in (x, probabilities, factor)) if whole else _in_pieces(x, probabilities, factor)
    )
    for few, shares, into in zip(*pieces, strict=True):
        _softmax(few, shares, dim, into, [torch.empty_like(few) for _ in range(2)])
    return factor


def _softmax(
    x: Tensor, probabilities: Tensor, dim: int, factor: Tensor, scratch: Sequence[Tensor]
) -> None:
    """:func:`softmax`, into the memory of ``factor``; what two more tensors of the shape hold is lost."""
    sizes, twin_part = scratch
    torch.nan_to_num(probabilities, out=factor)

    def unmask(values: Tensor) -> Tensor:
        torch.ops.aten.threshold_backward.grad_input(values, factor, EPS, grad_input=values)
        return values

    # What is masked counts as zero here, and is left out of the denominator by the division below.
    torch.softmax(unmask(torch.abs(x, out=sizes)), dim, out=twin_part)
    unmask(twin_part).div_(twin_part.sum(dim, keepdim=True).clamp_(min=_SMALLEST))
    sign = torch.sign(x, out=sizes)
    unmask(factor).addcmul_(twin_part, sign).mul_(sign)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seeds: Sequence[Tensor],
    *,
    mask: Tensor | None = None,
    stabilised: int = 1,
) -> list[tuple[Tensor, Tensor, Tensor]]:
    r""":func:`matmul`, :func:`softmax` and :func:`matmul` again, of :math:`\mathrm{softmax}(q k^T) v`.

    A few rows of the attention at a time, which are made again: what stays in the cache costs little, and
    memory does not grow with the square of the number of tokens.

    Axes: G samples and heads, N queries, M keys, D and E features.

    Args:
        query: (G, N, D), scaled.
        key: (G, M, D).
        value: (G, M, E).
        seeds: relevance per magnitude of the output for each seed, (G, N, E).
        mask: what is seen, bool, (G, N, M) or (1, N, M); None for all.
        stabilised: how many calls divide by the probabilities: softmax, and a dropout behind it.

    Returns:
        What query, key and value get, for each seed.

    Example:
        >>> q, k, v = torch.ones(1, 1, 1), torch.tensor([[[1.0], [-1.0]]]), torch.ones(1, 2, 1)
        >>> attention(q, k, v, [torch.ones(1, 1, 1)])[0][2]
        tensor([[[0.8808],
                 [0.1192]]])
    """
    groups, rows = _blocks(len(query), query.shape[1], key.shape[1], query.device)
    found = [
        (torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)) for _ in seeds
    ]
    # Memory is made once for all blocks: fresh memory costs more than what is computed in it.
    made = [query.new_empty(groups[0].stop, rows[0].stop, key.shape[1]) for _ in range(5)]
    for group in groups:
        q, k, v = query[group], key[group], value[group].clamp(min=0)
        of_keys = [k.clamp(min=0), k.clamp(max=0)]
        negatives = [torch.zeros_like(k) for _ in seeds]
        for row in rows:
            few = q[:, row]
            logits, probabilities, factor, *scratch = (
                memory[: len(few), : few.shape[1]] for memory in made
            )
            torch.bmm(few, k.mT, out=logits)
            if mask is not None:
                seen = mask[group if len(mask) > 1 else slice(None), row]
                logits.masked_fill_(~seen, -torch.inf)
            torch.softmax(logits, -1, out=probabilities)
            if mask is not None:  # a query that sees nothing
                probabilities.nan_to_num_(0)
            _softmax(logits, probabilities, -1, factor, scratch)
            ratio = torch.add(probabilities, EPS, out=scratch[0])
            torch.div(probabilities, ratio, out=ratio)
            for _ in range(stabilised):
                factor *= ratio
            of_logits, of_queries = scratch[0], [few.clamp(min=0), few.clamp(max=0)]
            for seed, found_of_seed, negative in zip(seeds, found, negatives, strict=True):
                s = seed[group, row]
                to_query, to_key, to_value = (t[group] for t in found_of_seed)
                to_value.baddbmm_(probabilities.mT, s)
                torch.bmm(s, v.mT, out=of_logits).mul_(factor)
                positive = torch.bmm(of_logits, of_keys[0], out=to_query[:, row])
                _chosen([positive, of_logits @ of_keys[1]], few)
                for result, part in zip((to_key, negative), of_queries, strict=True):
                    result.baddbmm_(of_logits.mT, part)
        for (_, to_key, _), negative in zip(found, negatives, strict=True):
            _chosen([to_key[group], negative], k)
    return [(to_q, to_k, _rectify_in_place(to_v, value)) for to_q, to_k, to_v in found]


def _chosen(products: Sequence[Tensor], x: Tensor) -> Tensor:
    """Of products with a positive and a negative part, the one of the sign of ``x``, in place of the first;
    overwrites both."""
    positive, negative = products
    return _rectify_in_place(positive, x).sub_(_rectify_in_place(negative, x, negative=True))


BLOCK = {"cpu": 2**18, "cuda": 2**26}
"""Elements of attention that are made at a time, by the kind of device: about five tensors of as many, 5 MB
or 1.3 GB in float32. That of the CPU was measured; a GPU wants large products and has memory for them."""

ROWS = 256
"""Rows of attention that are made at a time at least, so that products with them are efficient."""


def _blocks(
    groups: int, rows: int, columns: int, device: torch.device
) -> tuple[list[slice], list[slice]]:
    """Some groups with all of their rows, or some rows of a group, at a time."""
    elements = BLOCK.get(device.type, BLOCK["cuda"])
    many = max(1, elements // (rows * columns))
    few = rows if many > 1 else max(ROWS, elements // columns)
    return _slices(groups, many), _slices(rows, few)


def _slices(size: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, size)) for start in range(0, max(size, 1), step)]


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


def twin(
    x: Tensor,
    call: Callable[[Tensor], Tensor],
    absolute_call: Callable[[Tensor], Tensor],
    s: Tensor,
) -> Tensor:
    r"""The definition of the rule, for any differentiable call.

    :math:`R_{in} = x \, \partial/\partial x \langle s, f(x; w, b) + f(|x|; |w|, |b|) \rangle`, per
    magnitude with :math:`\mathrm{sign}(x)` in place of :math:`x`. Infinite values mask an element, which
    takes no part.

    Args:
        x: input, any shape.
        call: ``x -> f(x; w, b)``.
        absolute_call: ``x -> f(x; |w|, |b|)``; it is given ``|x|``.
        s: shaped like the output of the call.

    Returns:
        Relevance per magnitude of ``x``.

    Example:
        >>> w = torch.tensor([[3.0, -4.0]])
        >>> twin(torch.tensor([[1.0, -2.0]]), lambda x: F.linear(x, w),
        ...      lambda x: F.linear(x, w.abs()), torch.ones(1, 1))
        tensor([[6., 8.]])
    """
    gradient = _transposed(lambda x: call(x) + absolute_call(magnitude(x)), x, s)
    sign = x.sign()
    return (sign * gradient).masked_fill_((x == 0) | x.isinf(), 0)
