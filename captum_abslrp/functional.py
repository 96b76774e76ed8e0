r"""The mathematics of absLRP as pure tensor functions.

Every function works on one call ``z = f(x; w, b)`` of a network and on

- ``x``: the input of the call; ``weight``: what it is multiplied by,
- ``s = R / (|z| + EPS)``, see :func:`divide`: the relevance ``R`` of the output, shaped like ``z``,
  divided by the *magnitude* of the output,

and returns the relevance of ``x``, shaped like ``x``, before it is scaled (:func:`normalize`).
Relevance has no unit: only its share of the sample's total has a meaning.

Source: Vukadin et al., *Advancing Attribution-Based Neural Network Explainability through Relative
Absolute Magnitude Layer-Wise Relevance Propagation and Multi-Component Evaluation*, ACM TIST 15(3),
2024. The definition is the *twin* form, :func:`twin`; everything else here is a closed form of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = [
    "EPS",
    "bilinear",
    "convolution",
    "diagonal",
    "divide",
    "elementwise",
    "group_norm",
    "layer_norm",
    "linear",
    "linear_map",
    "magnitude",
    "matmul",
    "max_pool",
    "normalize",
    "positive_contributions",
    "rms_norm",
    "softmax",
    "sum_to_size",
    "twin",
]

EPS = 1e-9
"""The one stabiliser: added to the magnitude of a divisor, always in float32 or float64."""


def divide(relevance: Tensor, output: Tensor) -> Tensor:
    """Divide relevance by the magnitude of the output that it belongs to.

    Args:
        relevance: relevance ``R`` of the output, any shape.
        output: the output ``z`` of the call, same shape.

    Returns:
        ``s = R / (|z| + EPS)``, same shape.

    Example:
        >>> divide(torch.tensor([1.0, 3.0]), torch.tensor([2.0, -3.0]))
        tensor([0.5000, 1.0000])
    """
    return relevance / (output.abs() + EPS)


def normalize(
    relevances: Sequence[Tensor], *, totals: Tensor | float, joint: bool = False
) -> tuple[Tensor, ...]:
    """Scale the relevance that one call hands to its inputs, sample by sample.

    Args:
        relevances: one tensor per input of the call, each of shape (B, ...).
        totals: what the sum of magnitudes shall be: a number, or a tensor of shape (B,).
        joint: scale all inputs together to ``totals``; by default each is scaled on its own.

    Returns:
        The scaled relevances, same shapes. A sample without any relevance stays zero.

    Example:
        >>> a, b = torch.tensor([[1.0, 3.0]]), torch.tensor([[4.0]])
        >>> normalize([a, b], totals=1.0)
        (tensor([[0.2500, 0.7500]]), tensor([[1.]]))
        >>> normalize([a, b], totals=1.0, joint=True)
        (tensor([[0.1250, 0.3750]]), tensor([[0.5000]]))
    """
    sums = [r.abs().flatten(1).sum(1) if r.dim() > 1 else r.abs() for r in relevances]
    if joint:
        sums = [torch.stack(sums).sum(0)] * len(sums)
    return tuple(
        r * (totals / (total + EPS)).view(-1, *[1] * (r.dim() - 1))
        for r, total in zip(relevances, sums, strict=True)
    )


def sum_to_size(relevance: Tensor, like: Tensor) -> Tensor:
    """Add up the relevance of an input that was broadcast, so that it has the input's shape.

    Example:
        >>> sum_to_size(torch.ones(2, 3), torch.zeros(3))
        tensor([2., 2., 2.])
    """
    return relevance.sum_to_size(like.shape)


def positive_contributions(
    x: Tensor, weight: Tensor, transposed: Callable[[Tensor], Tensor]
) -> Tensor:
    r"""The rule for a call that is linear in ``x``: only positive contributions count.

    :math:`R_i = \sum_j (x_i w_{ij} + |x_i w_{ij}|) s_j = 2 \sum_j (x_i w_{ij})^+ s_j`, computed as
    :math:`2 (x^+ \, T(w^+) + x^- \, T(w^-))`. Where ``x`` has no negative entry the second product
    is left out.

    Args:
        x: input, any shape.
        weight: the weight, any shape.
        transposed: the transposed product :math:`T(w)` of ``s`` with a weight, shaped like ``x``.

    Returns:
        Relevance shaped like ``x``.

    Example:
        >>> x, w = torch.tensor([1.0, -2.0]), torch.tensor([[3.0, 5.0]])
        >>> positive_contributions(x, w, lambda w: torch.ones(1) @ w)
        tensor([6., 0.])
    """
    relevance = x.clamp(min=0) * transposed(weight.clamp(min=0))
    if bool((x < 0).any()):
        relevance = relevance + x.clamp(max=0) * transposed(weight.clamp(max=0))
    return 2 * relevance


def linear(x: Tensor, weight: Tensor, s: Tensor) -> Tensor:
    """:func:`positive_contributions` of ``F.linear``.

    Args:
        x: (..., in_features).
        weight: (out_features, in_features).
        s: (..., out_features), see :func:`divide`.

    Example:
        >>> linear(torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0, -4.0]]), torch.ones(1, 1))
        tensor([[ 6., 16.]])
    """
    return positive_contributions(x, weight, lambda w: s @ w)


def convolution(
    x: Tensor,
    weight: Tensor,
    s: Tensor,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    output_padding: Sequence[int] | None = None,
) -> Tensor:
    """:func:`positive_contributions` of a convolution in one, two or three dimensions.

    Args:
        x: (B, C_in, ...).
        weight: (C_out, C_in / groups, ...), or (C_in, C_out / groups, ...) where transposed.
        s: (B, C_out, ...), see :func:`divide`.
        stride, padding, dilation: one number per spatial dimension.
        groups: number of blocks of channels.
        output_padding: of a transposed convolution; None for a convolution.

    Example:
        >>> x, w = torch.ones(1, 1, 2, 2), torch.tensor([[[[2.0]]], [[[-1.0]]]])
        >>> convolution(x, w, torch.ones(1, 2, 2, 2), stride=(1, 1), padding=(0, 0),
        ...             dilation=(1, 1), groups=1).flatten()
        tensor([4., 4., 4., 4.])
    """
    is_transposed = output_padding is not None

    def transposed(w: Tensor) -> Tensor:
        grad_input: Tensor = torch.ops.aten.convolution_backward(
            s, x, w, None, stride, padding, dilation, is_transposed,
            output_padding or [0] * len(stride), groups, [True, False, False],
        )[0]  # fmt: skip
        return grad_input

    return positive_contributions(x, weight, transposed)


def matmul(a: Tensor, b: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`positive_contributions` of ``a @ b`` for each argument, the other one fixed.

    Args:
        a: (..., N, K).
        b: (..., K, M), batch dimensions broadcast with those of ``a``.
        s: (..., N, M), see :func:`divide`.

    Returns:
        The relevance of ``a`` and of ``b``.

    Example:
        >>> matmul(torch.tensor([[1.0, -1.0]]), torch.tensor([[2.0], [3.0]]), torch.ones(1, 1))
        (tensor([[4., 0.]]), tensor([[4.],
                [0.]]))
    """
    of_a = positive_contributions(a, b, lambda w: sum_to_size(s @ w.mT, a))
    of_b = positive_contributions(b, a, lambda w: sum_to_size(w.mT @ s, b))
    return of_a, of_b


def linear_map(x: Tensor, call: Callable[[Tensor], Tensor], s: Tensor) -> Tensor:
    """The twin form of a linear call without weights of its own: pooling, mean, sum, interpolation.

    Where no coefficient is negative (all but bicubic interpolation) it is
    :func:`positive_contributions`.

    Args:
        x: input, any shape.
        call: the call, linear in ``x``.
        s: shaped like the output of the call, see :func:`divide`.

    Example:
        >>> linear_map(torch.tensor([[1.0, -1.0]]), lambda x: x.mean(1), torch.ones(1))
        tensor([[1., 0.]])
    """
    return 2 * x.clamp(min=0) * _transposed(call, x, s)


def bilinear(
    a: Tensor, b: Tensor, call: Callable[[Tensor, Tensor], Tensor], s: Tensor
) -> tuple[Tensor, Tensor]:
    """:func:`positive_contributions` of a product of two tensors, for each the other one fixed.

    Args:
        a: first argument, any shape.
        b: second argument, any shape.
        call: ``(a, b) -> z``, a sum of products of their elements: einsum, outer, dot ...
        s: shaped like ``z``, see :func:`divide`.

    Returns:
        The relevance of ``a`` and of ``b``.

    Example:
        >>> bilinear(torch.tensor([1.0, -1.0]), torch.tensor([2.0, 3.0]), torch.dot, torch.tensor(1.0))
        (tensor([4., 0.]), tensor([4., 0.]))
    """
    of_a = positive_contributions(a, b, lambda w: _transposed(lambda v: call(v, w), a, s))
    of_b = positive_contributions(b, a, lambda w: _transposed(lambda v: call(w, v), b, s))
    return of_a, of_b


def _transposed(call: Callable[[Tensor], Tensor], x: Tensor, s: Tensor) -> Tensor:
    """The transposed product of ``s`` with a call that is linear in ``x``."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        output = call(leaf)
    return torch.autograd.grad(output, leaf, s)[0]


def diagonal(x: Tensor, scale: Tensor | float, output: Tensor) -> Tensor:
    r"""The factor from output to input relevance where every element has a weight of its own.

    :math:`R_{in} = k R` with :math:`k = 2 (x c)^+ / (|z| + EPS)`: batch norm in evaluation mode,
    addition (:math:`c = 1`), elementwise product.

    Args:
        x: input, broadcastable to the output.
        scale: weight ``c``, broadcastable to the output.
        output: output ``z``, bias included.

    Returns:
        ``k``, shaped like the output.

    Example:
        >>> diagonal(torch.tensor([1.0, 1.0]), torch.tensor([2.0, -2.0]), torch.tensor([4.0, -2.0]))
        tensor([1., 0.])
    """
    return 2 * (x * scale).clamp(min=0) / (output.abs() + EPS)


def elementwise(x: Tensor, call: Callable[[Tensor], Tensor], *, even_slope: bool = False) -> Tensor:
    r"""The factor from output to input relevance of a call that acts on each element alone.

    The twin form: :math:`k = (x f'(x) + |x| f'(|x|)) / (|f(x)| + EPS)`; 0 where :math:`x = 0`.

    Args:
        x: input, any shape.
        call: ``f``, for example ``torch.nn.functional.gelu``.
        even_slope: whether :math:`f'(x) = f'(-x)`, so that :math:`k = 2 x^+ f'(x) / (|f(x)| + EPS)`.

    Returns:
        ``k``, shaped like ``x``.

    Example:
        >>> elementwise(torch.tensor([2.0]), torch.square)
        tensor([4.])
    """
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        output = call(leaf)
        both = output if even_slope else output + call(leaf.abs())
        (gradient,) = torch.autograd.grad(both.sum(), leaf)
    if even_slope:
        numerator = 2 * x.clamp(min=0) * gradient
    else:  # at 0 the slope may be infinite (square root)
        numerator = (x * gradient).masked_fill(x == 0, 0)
    return numerator / (output.detach().abs() + EPS)


def max_pool(x: Tensor, pool: Callable[[Tensor], tuple[Tensor, Tensor]], s: Tensor) -> Tensor:
    r"""The twin form of max pooling: the maximum of ``x`` and of ``|x|`` in every window.

    Padding by :math:`-\infty` takes no part.

    Args:
        x: (B, C, ...).
        pool: ``x -> (maximum, indices)``; the indices count the elements of one channel.
        s: shaped like the maximum.

    Example:
        >>> x = torch.tensor([[[1.0, -2.0]]])
        >>> pool = lambda x: torch.nn.functional.max_pool1d(x, 2, return_indices=True)
        >>> max_pool(x, pool, torch.ones(1, 1, 1))
        tensor([[[1., 2.]]])
    """
    spatial = s.dim() - 2

    def routed(values: Tensor) -> Tensor:
        maximum, indices = pool(values)
        scattered = torch.zeros_like(x).flatten(-spatial)
        contributions = (maximum * s).flatten(-spatial)
        return scattered.scatter_add(-1, indices.flatten(-spatial), contributions).view_as(x)

    if bool((x < 0).any()):
        return routed(x) + routed(magnitude(x))
    return 2 * routed(x)


def layer_norm(x: Tensor, normalized_dims: int, weight: Tensor | None, eps: float) -> Tensor:
    r"""The numerator of the rule of layer norm; mean and variance are constants of the call.

    :math:`R_{in} = (x w / \sigma(x) + |x w| / \sigma(|x|)) \, s`.

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
    plain, twin_part = _scaled(x, dims, eps), _scaled(x.abs(), dims, eps)
    return plain + twin_part if weight is None else plain * weight + twin_part * weight.abs()


def group_norm(x: Tensor, groups: int, weight: Tensor | None, eps: float) -> Tensor:
    r"""The numerator of the rule of group norm (of instance norm, with one channel in each group).

    As :func:`layer_norm`: :math:`R_{in} = (x w / \sigma(x) + |x w| / \sigma(|x|)) \, s` with
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
    plain, twin_part = (_scaled(v, [2], eps).view_as(x) for v in (grouped, grouped.abs()))
    if weight is None:
        return plain + twin_part
    weight = weight.view(-1, *[1] * (x.dim() - 2))
    return plain * weight + twin_part * weight.abs()


def _scaled(x: Tensor, dims: list[int], eps: float) -> Tensor:
    """The tensor divided by its standard deviation over some dimensions."""
    return x * (x.var(dims, correction=0, keepdim=True) + eps).rsqrt()


def rms_norm(x: Tensor, normalized_dims: int, weight: Tensor | None, eps: float) -> Tensor:
    r"""The numerator of the rule of RMS norm; the mean square is a constant of the call.

    The mean square of ``x`` is that of ``|x|``:
    :math:`R_{in} = 2 (x w)^+ / \mathrm{rms}(x) \, s`.

    Args and returns: as :func:`layer_norm`.

    Example:
        >>> rms_norm(torch.tensor([[3.0, -4.0]]), 1, torch.ones(2), 0.0)
        tensor([[1.6971, 0.0000]])
    """
    dims = list(range(-normalized_dims, 0))
    scaled = x * (x.square().mean(dims, keepdim=True) + eps).rsqrt()
    return 2 * (scaled if weight is None else scaled * weight).clamp(min=0)


def softmax(x: Tensor, probabilities: Tensor, dim: int) -> Tensor:
    r"""The numerator of the rule of softmax; maximum and denominator are constants of the call.

    :math:`R_{in} = (x p + |x| \, \mathrm{softmax}(|x|)) \, s`. What is masked, by :math:`-\infty` or a number
    that leaves it a probability below ``EPS``, takes no part; where all is masked there is no relevance.

    Args:
        x: logits, any shape.
        probabilities: ``p = softmax(x)``.
        dim: the dimension that adds up to one.

    Returns:
        What ``s`` is multiplied by, shaped like ``x``.

    Example:
        >>> x = torch.tensor([0.0, -float("inf"), 1.0])
        >>> softmax(x, x.softmax(0), 0)
        tensor([0.0000, 0.0000, 1.4621])
    """
    masked = torch.isneginf(x) | (probabilities < EPS)
    absolute = x.abs().masked_fill(masked, 0)
    twin_probabilities = absolute.masked_fill(masked, -torch.inf).softmax(dim).nan_to_num()
    return x.masked_fill(masked, 0) * probabilities.nan_to_num() + absolute * twin_probabilities


def magnitude(x: Tensor) -> Tensor:
    """``|x|``; 0 for what is masked by an infinite value, which takes no part.

    Example:
        >>> magnitude(torch.tensor([-2.0, -float("inf")]))
        tensor([2., 0.])
    """
    return x.abs().masked_fill(x.isinf(), 0)


def twin(
    x: Tensor,
    call: Callable[[Tensor], Tensor],
    absolute_call: Callable[[Tensor], Tensor],
    s: Tensor,
) -> Tensor:
    r"""The definition of the rule, for any differentiable call.

    :math:`R_{in} = x \, \partial/\partial x \langle s, f(x; w, b) + f(|x|; |w|, |b|) \rangle`.
    Infinite values mask an element, which takes no part.

    Args:
        x: input, any shape.
        call: ``x -> f(x; w, b)``.
        absolute_call: ``x -> f(x; |w|, |b|)``; it is given ``|x|``.
        s: shaped like the output of the call, see :func:`divide`.

    Returns:
        Relevance shaped like ``x``.

    Example:
        >>> w = torch.tensor([[3.0, -4.0]])
        >>> twin(torch.tensor([[1.0, -2.0]]), lambda x: F.linear(x, w),
        ...      lambda x: F.linear(x, w.abs()), torch.ones(1, 1))
        tensor([[ 6., 16.]])
    """
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        value = call(leaf) + absolute_call(magnitude(leaf))
    return (x * torch.autograd.grad(value, leaf, s)[0]).masked_fill(x.isinf(), 0)
