"""Products of a sparse constant with a dense tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from captum_abslrp.engine.arguments import on_host
from captum_abslrp.engine.calls import Call
from captum_abslrp.engine.tape import Record
from captum_abslrp.rules.base import once
from captum_abslrp.rules.contributions import SignedParts, positive_contributions


def is_sparse(tensor: Tensor) -> bool:
    return tensor.layout != torch.strided


class _SparseParts(SignedParts):
    """The parts of a sparse matrix of any layout."""

    def __init__(self, matrix: Tensor) -> None:
        matrix = matrix.to_sparse_coo().coalesce()  # sums duplicate entries
        nonnegative = on_host((matrix.values() >= 0).all()) is True
        super().__init__(matrix, nonnegative=nonnegative)

    def clamped(self, **limit: float) -> Tensor:
        w = self.weight
        values = w.values().clamp(**limit)
        return torch.sparse_coo_tensor(
            w.indices(), values, w.shape, check_invariants=False, is_coalesced=True
        )


def record_sparse(
    call: Call, output: Tensor, input: Tensor, other: Tensor, *, factor: float = 1
) -> Record:
    """Record the product of a sparse constant with a dense tensor and a factor; a constant may be added."""
    is_first = is_sparse(input)
    sparse, dense = (input, other) if is_first else (other, input)
    matrix, x = call.save(sparse), call.save(dense)
    nonnegative = call.is_nonnegative(dense)
    parts = once(lambda: _SparseParts(factor * matrix()))

    def propagate(s: Tensor) -> list[Tensor]:
        def transposed(w: Tensor) -> Tensor:
            if w.dim() == 3:
                return torch.bmm(w.mT, s) if is_first else torch.bmm(s, w.mT)
            return w.mT @ s if is_first else s @ w.mT

        return [positive_contributions(x(), parts(), transposed, nonnegative=nonnegative)]

    return Record(output, [dense], propagate, keeps_sign=True)
