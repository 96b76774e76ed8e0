"""Sums of products: matmul, einsum, addmm and related calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from captum_abslrp.engine.calls import Call
from captum_abslrp.engine.dependence import is_source
from captum_abslrp.engine.numerics import rectify
from captum_abslrp.engine.tape import Record
from captum_abslrp.rules.base import Form, once, without_noise
from captum_abslrp.rules.contributions import (
    SignedParts,
    bilinear,
    positive_contributions,
    signed_parts,
)
from captum_abslrp.rules.sparse import is_sparse, record_sparse
from captum_abslrp.rules.twin import record_twin


def matmul(a: Tensor | SignedParts, b: Tensor | SignedParts, s: Tensor) -> tuple[Tensor, Tensor]:
    """Apply :func:`positive_contributions` to both arguments of ``a @ b``; batch dimensions may broadcast.

    Example:
        >>> matmul(torch.tensor([[1.0, -1.0]]), torch.tensor([[2.0], [3.0]]), torch.ones(1, 1))
        (tensor([[2., 0.]]), tensor([[1.],
                [0.]]))
    """
    of_a, of_b = signed_parts(a), signed_parts(b)
    x, y = of_a.weight, of_b.weight
    lies_transposed = y.stride(-2) < y.stride(-1)  # like k.mT; its relevance gets the same layout

    def to_a(w: Tensor) -> Tensor:
        return (s @ w.mT).sum_to_size(x.shape)

    def to_b(w: Tensor) -> Tensor:
        return ((s.mT @ w).mT if lies_transposed else w.mT @ s).sum_to_size(y.shape)

    return (
        positive_contributions(x, of_b, to_a, nonnegative=of_a.nonnegative),
        positive_contributions(y, of_a, to_b, nonnegative=of_b.nonnegative),
    )


def record_matmul(call: Call, input: Tensor, other: Tensor) -> Any:
    operands = input, other
    if any(is_sparse(t) or t.dim() < 2 for t in operands):
        return record_bilinear(call, *call.args, **call.kwargs)
    output = call.run(lambda: torch.matmul(input, other))
    a, b = call.save(input), call.save(other)
    wanted = [is_source(t) for t in operands]
    nonnegative = [call.is_nonnegative(t) for t in operands]

    @once
    def parts() -> list[SignedParts]:
        pairs = zip((a, b), nonnegative, strict=True)
        return [SignedParts(kept().contiguous(), nonnegative=known) for kept, known in pairs]

    masked = _without_noise(call, output, operands, torch.matmul)

    def propagate(s: Tensor) -> list[Tensor]:
        of_a, of_b = parts()
        return list(compress(matmul(of_a, of_b, masked(s).contiguous()), wanted))

    # Recompute large outputs, such as the attention of many tokens.
    is_larger = output.numel() > input.numel() + other.numel()
    return Record(
        output,
        list(compress(operands, wanted)),
        propagate,
        nonnegative=all(nonnegative),
        saved_output=call.save_output(output, lambda: a() @ b()) if is_larger else None,
    )


def record_bilinear(call: Call, input: Tensor, other: Tensor, *args: Any, **kwargs: Any) -> Record:
    func = call.func
    if is_sparse(input) or is_sparse(other):
        output = call.run(lambda: func(input, other, *args, **kwargs))
        return record_sparse(call, output, input, other)
    return _record_product(call, (input, other), lambda a, b: func(a, b, *args, **kwargs))


def record_einsum(call: Call, equation: Any, *operands: Any) -> Record:
    pair = einsum_pair(equation, operands)
    if pair is None:
        return record_twin(call)
    return _record_product(call, pair, lambda a, b: torch.einsum(equation, a, b))


def einsum_pair(equation: Any, operands: Sequence[Any]) -> Sequence[Tensor] | None:
    """Return the operands of an einsum of two tensors, or None."""
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = operands[0]
    return operands if isinstance(equation, str) and len(operands) == 2 else None


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
    call: Call, output: Tensor, operands: Sequence[Tensor], run: Callable[[Tensor, Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    """Apply :func:`captum_abslrp.rules.base.without_noise` with the constant factor as weight."""
    first, second = operands
    if is_source(first):
        return without_noise(call, output, first, second, run)
    return without_noise(call, output, second, first, lambda b, a: run(a, b))


def record_product_and_sum(
    call: Call, input: Tensor, first: Tensor, second: Tensor, *, beta: float = 1, alpha: float = 1
) -> Record:
    """Record ``beta * input + alpha * (first @ second)`` as one affine call."""
    output = call.run(lambda: call.func(*call.args, **call.kwargs))
    if is_sparse(first) or is_sparse(second):
        product = record_sparse(call, output, first, second, factor=alpha)
        return with_summand(call, product._replace(keeps_sign=False), input, beta)
    a, b, size = call.save(first), call.save(second), output.shape
    wanted = [is_source(t) for t in (first, second)]

    def run(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b).sum_to_size(size)  # addbmm sums over the batch

    def propagate(s: Tensor) -> list[Tensor]:
        # Treat the sign of `alpha` as part of a weight.
        of_first, of_second = bilinear(alpha * a(), b(), run, s)
        return list(compress([abs(alpha) * of_first, of_second], wanted))

    product = Record(output, list(compress([first, second], wanted)), propagate)
    return with_summand(call, product, input, beta)


def with_summand(call: Call, product: Record, summand: Tensor, beta: float) -> Record:
    """Extend the record of a product to which ``beta * summand`` is added."""
    if not is_source(summand):
        return product
    c = call.save(summand)

    def propagate(s: Tensor) -> list[Tensor]:
        of_sum = abs(beta) * rectify(s.sum_to_size(c().shape), beta * c())
        return [of_sum, *product.propagate(s)]

    return product._replace(inputs=[summand, *product.inputs], propagate=propagate)


MATMULS: dict[str, Form] = (
    dict.fromkeys("_sparse_mm bmm matmul mm spmm".split(), record_matmul)
    | dict.fromkeys(
        "dot ger inner kron linalg_matmul mv outer tensordot vdot".split(), record_bilinear
    )
    | dict.fromkeys("_sparse_addmm addbmm addmm addmv baddbmm".split(), record_product_and_sum)
    | {"einsum": record_einsum}
)
