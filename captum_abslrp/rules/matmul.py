"""Products that add up: matmul and its kin, einsum, addmm and its kin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from captum_abslrp.engine import numerics
from captum_abslrp.engine.calls import Call
from captum_abslrp.engine.dependence import is_source
from captum_abslrp.engine.tape import Record
from captum_abslrp.rules.base import Form, once, without_noise
from captum_abslrp.rules.contributions import (
    SignedParts,
    bilinear,
    positive_contributions,
    signed_parts,
)
from captum_abslrp.rules.sparse import is_sparse, record_sparse, record_sparse_and_sum
from captum_abslrp.rules.twin import record_twin


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
    of_a, of_b = signed_parts(a), signed_parts(b)
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


def record_matmul(call: Call, input: Tensor, other: Tensor) -> Any:
    if is_sparse(input) or is_sparse(other):
        output = call.run(lambda: call.func(*call.args, **call.kwargs))
        return record_sparse(call, output, input, other)
    if input.dim() < 2 or other.dim() < 2:
        return record_bilinear(call, input, other)
    output = call.run(lambda: torch.matmul(input, other))
    a, b = call.save(input), call.save(other)
    wanted = [is_source(t) for t in (input, other)]
    nonnegative = [call.is_nonnegative(t) for t in (input, other)]

    @once
    def parts() -> list[SignedParts]:
        return [
            SignedParts(_by_batch(kept()), nonnegative=n)
            for kept, n in zip((a, b), nonnegative, strict=True)
        ]

    masked = _without_noise(call, output, (input, other), torch.matmul)

    def propagate(s: Tensor) -> list[Tensor]:
        of_input, of_other = parts()
        s = masked(s).contiguous()
        return list(compress(matmul(of_input, of_other, s), wanted))

    return Record(
        output,
        list(compress([input, other], wanted)),
        propagate,
        nonnegative=all(nonnegative),
        # Attention of many tokens on each other is made again.
        saved_output=call.save_output(output, lambda: torch.matmul(a(), b()))
        if output.numel() > input.numel() + other.numel()
        else None,
    )


def _by_batch(x: Tensor) -> Tensor:
    """The tensor with one matrix after the other in memory, each as it lies or transposed."""
    if x.dim() > 2 and x.stride(-2) < x.stride(-1):
        return x.mT.contiguous().mT
    return x.contiguous()


def record_bilinear(call: Call, input: Tensor, other: Tensor, *args: Any, **kwargs: Any) -> Record:
    func = call.func
    if is_sparse(input) or is_sparse(other):
        return record_sparse(
            call, call.run(lambda: func(input, other, *args, **kwargs)), input, other
        )
    return _record_product(call, [input, other], lambda a, b: func(a, b, *args, **kwargs))


def record_einsum(call: Call, equation: Any, *operands: Any) -> Record:
    given = (
        operands[0] if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else operands
    )
    if not isinstance(equation, str) or len(given) != 2:
        return record_twin(call)
    return _record_product(call, given, lambda a, b: torch.einsum(equation, a, b))


def _record_product(
    call: Call, operands: Sequence[Tensor], run: Callable[[Tensor, Tensor], Tensor]
) -> Record:
    output = call.run(lambda: run(*operands))
    a, b = (call.save(t) for t in operands)
    wanted = [is_source(t) for t in operands]
    masked = _without_noise(call, output, operands, run)

    def propagate(s: Tensor) -> list[Tensor]:
        return list(compress(bilinear(a(), b(), run, masked(s)), wanted))

    return Record(output, list(compress(operands, wanted)), propagate)


def _without_noise(
    call: Call,
    output: Tensor,
    operands: Sequence[Tensor],
    run: Callable[[Tensor, Tensor], Tensor],
) -> Callable[[Tensor], Tensor]:
    """:func:`captum_abslrp.forms.base.without_noise` of a product one of whose factors is a constant."""
    first, second = operands
    if is_source(first) and is_source(second):
        return lambda s: s
    if is_source(first):
        return without_noise(call, output, first, second, run)
    return without_noise(call, output, second, first, lambda b, a: run(a, b))


def record_product_and_sum(
    call: Call, input: Tensor, first: Tensor, second: Tensor, *, beta: float = 1, alpha: float = 1
) -> Record:
    """``beta * input + alpha * (first @ second)``: one affine call."""
    output = call.run(lambda: call.func(*call.args, **call.kwargs))
    if is_sparse(first) or is_sparse(second):
        return record_sparse_and_sum(call, output, input, first, second, beta, alpha)
    c, a, b = (call.save(t) for t in (input, first, second))
    wanted = [is_source(t) for t in (input, first, second)]

    def run(a: Tensor, b: Tensor) -> Tensor:
        product = a @ b
        return product if product.dim() == output_dims else product.sum(0)

    output_dims = output.dim()

    def propagate(s: Tensor) -> list[Tensor]:
        of_sum = abs(beta) * numerics.rectify(s.sum_to_size(c().shape), beta * c())
        # The sign of the factor is that of a weight.
        of_first, of_second = bilinear(alpha * a(), b(), run, s)
        return list(compress([of_sum, abs(alpha) * of_first, of_second], wanted))

    return Record(output, list(compress([input, first, second], wanted)), propagate)


MATMULS: dict[str, Form] = (
    dict.fromkeys("_sparse_mm bmm matmul mm spmm".split(), record_matmul)
    | dict.fromkeys(
        "dot ger inner kron linalg_matmul mv outer tensordot vdot".split(), record_bilinear
    )
    | dict.fromkeys("_sparse_addmm addbmm addmm addmv baddbmm".split(), record_product_and_sum)
    | {"einsum": record_einsum}
)
