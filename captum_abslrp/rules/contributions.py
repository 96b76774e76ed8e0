"""Positive contributions, the common part of the rules of affine calls and products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from captum_abslrp.engine.numerics import rectify, rectify_in_place


class SignedParts:
    """The positive and the negative part of a weight, computed on first use.

    Args:
        weight: any shape.
        nonnegative: whether it is known to have no negative entries.
        dtype: the dtype of the parts; None for that of the weight.

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
        self.dtype = weight.dtype if dtype is None else dtype

    @cached_property
    def positive(self) -> Tensor:
        return self.weight.to(self.dtype) if self.nonnegative else self.clamped(min=0)

    @cached_property
    def negative(self) -> Tensor:
        return self.clamped(max=0)

    def clamped(self, **limit: float) -> Tensor:
        return self.weight.to(self.dtype).clamp(**limit)


def signed_parts(weight: Tensor | SignedParts) -> SignedParts:
    return weight if isinstance(weight, SignedParts) else SignedParts(weight)


def positive_contributions(
    x: Tensor,
    weight: Tensor | SignedParts,
    transposed: Callable[[Tensor], Tensor],
    *,
    nonnegative: bool = False,
) -> Tensor:
    r"""Apply the rule of a call that is linear in ``x``, which uses only positive contributions.

    :math:`R_i = \sum_j (x_i w_{ij} + |x_i w_{ij}|) s_j = 2 \sum_j (x_i w_{ij})^+ s_j`. Per magnitude and
    without the factor 2, this is :math:`T(w^+)` where :math:`x > 0` and :math:`-T(w^-)` where :math:`x < 0`.

    Args:
        x: the input.
        weight: the weight, or its parts.
        transposed: a function that returns the transposed product :math:`T(w)` of ``s`` with a weight, as a
            new tensor.
        nonnegative: whether negative entries of ``x`` can be ignored or do not exist, which saves a product.

    Example:
        >>> x, w = torch.tensor([1.0, -2.0]), torch.tensor([[3.0, -5.0]])
        >>> positive_contributions(x, w, lambda w: torch.ones(1) @ w)
        tensor([3., 5.])
    """
    parts = signed_parts(weight)
    positive = transposed(parts.positive)
    if nonnegative or parts.nonnegative:
        return rectify_in_place(positive, x)
    return chosen([positive, transposed(parts.negative)], x)


def chosen(products: Sequence[Tensor], x: Tensor) -> Tensor:
    """Select from the products with the positive and the negative part by the sign of ``x``, in place."""
    positive, negative = products
    return rectify_in_place(positive, x).sub_(rectify_in_place(negative, x, negative=True))


def bilinear(
    a: Tensor, b: Tensor, call: Callable[[Tensor, Tensor], Tensor], s: Tensor
) -> tuple[Tensor, Tensor]:
    """Apply :func:`positive_contributions` to both arguments of a sum of products: einsum, outer, dot ...

    Example:
        >>> bilinear(torch.tensor([1.0, -1.0]), torch.tensor([2.0, 3.0]), torch.dot, torch.tensor(1.0))
        (tensor([2., 0.]), tensor([1., 0.]))
    """
    of_a = positive_contributions(a, b, lambda w: transposed(lambda v: call(v, w), a, s).clone())
    of_b = positive_contributions(b, a, lambda w: transposed(lambda v: call(w, v), b, s).clone())
    return of_a, of_b


def transposed(call: Callable[[Tensor], Tensor], x: Tensor, s: Tensor) -> Tensor:
    """Compute the transposed product of ``s`` with the linear part of a call at ``x``."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        output = call(leaf)
    if not output.requires_grad:
        return torch.zeros_like(x)
    return torch.autograd.grad(output, leaf, s, allow_unused=True, materialize_grads=True)[0]


def diagonal(x: Tensor, weight: Tensor, *, positive: bool = False) -> Tensor:
    r"""Compute the factor of a call that multiplies each element by a weight ``c``: batch norm, a product.

    :math:`R_{in} = 2 (x c)^+ s`; per magnitude and without the factor 2, the factor is :math:`|c|` where
    :math:`x c > 0`. With ``positive``, all weights are known to be positive.

    Example:
        >>> diagonal(torch.tensor([1.0, 1.0]), torch.tensor([2.0, -2.0]))
        tensor([2., 0.])
    """
    if positive:
        return rectify(weight.expand_as(x), x)
    product = x * weight
    return rectify(weight.abs().expand_as(product), product)
