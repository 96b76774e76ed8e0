"""Products of a sparse constant with a dense tensor."""

from __future__ import annotations

from collections.abc import Callable
from itertools import compress

import torch
from torch import Tensor

from captum_abslrp.engine import numerics
from captum_abslrp.engine.arguments import on_host
from captum_abslrp.engine.calls import Call
from captum_abslrp.engine.dependence import is_source
from captum_abslrp.engine.tape import Record
from captum_abslrp.rules.base import once
from captum_abslrp.rules.contributions import SignedParts, positive_contributions


def is_sparse(tensor: Tensor) -> bool:
    return tensor.layout != torch.strided


def record_sparse(call: Call, output: Tensor, input: Tensor, other: Tensor) -> Record:
    """The product of a sparse constant with a dense tensor: one affine call.

    Args:
        output: the product, perhaps with a constant added.
        input, other: its factors.
    """
    dense = other if is_sparse(input) else input
    x, contributions = call.save(dense), _sparse_contributions(call, input, other)
    return Record(output, [dense], lambda s: [contributions(x(), s)], keeps_sign=True)


def _sparse_contributions(
    call: Call, input: Tensor, other: Tensor, *, factor: float = 1
) -> Callable[[Tensor, Tensor], Tensor]:
    """From the dense factor of a product with a sparse constant, and ``s``, to what this factor gets."""
    is_first = is_sparse(input)
    sparse = call.save(input if is_first else other)
    parts = once(lambda: _sparse_parts(factor * sparse()))

    def of_dense(x: Tensor, s: Tensor) -> Tensor:
        def transposed(w: Tensor) -> Tensor:
            if w.dim() == 3:
                return torch.bmm(w.mT, s) if is_first else torch.bmm(s, w.mT)
            return w.mT @ s if is_first else s @ w.mT

        return positive_contributions(
            x, parts(), transposed, nonnegative=call.is_nonnegative(dense)
        )

    dense = other if is_first else input
    return of_dense


def _sparse_parts(matrix: Tensor) -> SignedParts:
    """The parts of a sparse matrix, of any layout."""
    matrix = matrix.to_sparse_coo().coalesce()  # entries of one place are one weight
    return _SparseParts(matrix, nonnegative=on_host((matrix.values() >= 0).all()) is True)


class _SparseParts(SignedParts):
    @property
    def positive(self) -> Tensor:
        return self.weight if self.nonnegative else self._clamped(min=0)

    @property
    def negative(self) -> Tensor:
        return self._clamped(max=0)

    def _clamped(self, **limit: float) -> Tensor:
        w = self.weight
        return torch.sparse_coo_tensor(
            w.indices(),
            w.values().clamp(**limit),
            w.shape,
            check_invariants=False,
            is_coalesced=True,
        )


def record_sparse_and_sum(
    call: Call,
    output: Tensor,
    input: Tensor,
    first: Tensor,
    second: Tensor,
    beta: float,
    alpha: float,
) -> Record:
    dense = second if is_sparse(first) else first
    contributions = _sparse_contributions(call, first, second, factor=alpha)
    c, x = call.save(input), call.save(dense)
    wanted = [is_source(t) for t in (input, dense)]

    def propagate(s: Tensor) -> list[Tensor]:
        of_sum = abs(beta) * numerics.rectify(s.sum_to_size(c().shape), beta * c())
        return list(compress([of_sum, contributions(x(), s)], wanted))

    return Record(output, list(compress([input, dense], wanted)), propagate)
