"""Positive contributions: what all rules of affine calls and products share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from captum_abslrp.engine.numerics import rectify_in_place


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


def signed_parts(weight: Tensor | SignedParts) -> SignedParts:
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
    parts = signed_parts(weight)
    positive = transposed(parts.positive)
    if nonnegative or parts.nonnegative:
        return rectify_in_place(positive, x)
    return chosen([positive, transposed(parts.negative)], x)


def chosen(products: Sequence[Tensor], x: Tensor) -> Tensor:
    """Of products with a positive and a negative part, the one of the sign of ``x``, in place of the first;
    overwrites both."""
    positive, negative = products
    return rectify_in_place(positive, x).sub_(rectify_in_place(negative, x, negative=True))


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
    of_a = positive_contributions(a, b, lambda w: transposed(lambda v: call(v, w), a, s).clone())
    of_b = positive_contributions(b, a, lambda w: transposed(lambda v: call(w, v), b, s).clone())
    return of_a, of_b


def transposed(call: Callable[[Tensor], Tensor], x: Tensor, s: Tensor) -> Tensor:
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
