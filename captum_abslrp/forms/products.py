"""Products of two tensors of the network: each one with the other one fixed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from captum_abslrp import functional
from captum_abslrp.calls import on_host
from captum_abslrp.forms.base import Form, answer_twin, is_source, once, without_noise
from captum_abslrp.functional import SignedParts
from captum_abslrp.interception import Call
from captum_abslrp.steps import Answer


def answer_matmul(call: Call, input: Tensor, other: Tensor) -> Any:
    if is_sparse(input) or is_sparse(other):
        output = call.run(lambda: call.func(*call.args, **call.kwargs))
        return answer_sparse(call, output, input, other)
    if input.dim() < 2 or other.dim() < 2:
        return answer_bilinear(call, input, other)
    output = call.run(lambda: torch.matmul(input, other))
    a, b = call.keep(input), call.keep(other)
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
        return list(compress(functional.matmul(of_input, of_other, s), wanted))

    return Answer(
        output,
        list(compress([input, other], wanted)),
        propagate,
        nonnegative=all(nonnegative),
        # Attention of many tokens on each other is made again.
        kept=call.keep_output(output, lambda: torch.matmul(a(), b()))
        if output.numel() > input.numel() + other.numel()
        else None,
    )


def answer_sparse(call: Call, output: Tensor, input: Tensor, other: Tensor) -> Answer:
    """The product of a sparse constant with a dense tensor: one affine call.

    Args:
        output: the product, perhaps with a constant added.
        input, other: its factors.
    """
    dense = other if is_sparse(input) else input
    x, contributions = call.keep(dense), _sparse_contributions(call, input, other)
    return Answer(output, [dense], lambda s: [contributions(x(), s)], keeps_sign=True)


def _sparse_contributions(
    call: Call, input: Tensor, other: Tensor, *, factor: float = 1
) -> Callable[[Tensor, Tensor], Tensor]:
    """From the dense factor of a product with a sparse constant, and ``s``, to what this factor gets."""
    is_first = is_sparse(input)
    sparse = call.keep(input if is_first else other)
    parts = once(lambda: _sparse_parts(factor * sparse()))

    def of_dense(x: Tensor, s: Tensor) -> Tensor:
        def transposed(w: Tensor) -> Tensor:
            if w.dim() == 3:
                return torch.bmm(w.mT, s) if is_first else torch.bmm(s, w.mT)
            return w.mT @ s if is_first else s @ w.mT

        return functional.positive_contributions(
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


def is_sparse(tensor: Tensor) -> bool:
    return tensor.layout != torch.strided


def _by_batch(x: Tensor) -> Tensor:
    """The tensor with one matrix after the other in memory, each as it lies or transposed."""
    if x.dim() > 2 and x.stride(-2) < x.stride(-1):
        return x.mT.contiguous().mT
    return x.contiguous()


def answer_bilinear(call: Call, input: Tensor, other: Tensor, *args: Any, **kwargs: Any) -> Answer:
    func = call.func
    if is_sparse(input) or is_sparse(other):
        return answer_sparse(
            call, call.run(lambda: func(input, other, *args, **kwargs)), input, other
        )
    return _answer_product(call, [input, other], lambda a, b: func(a, b, *args, **kwargs))


def answer_einsum(call: Call, equation: Any, *operands: Any) -> Answer:
    given = (
        operands[0] if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else operands
    )
    if not isinstance(equation, str) or len(given) != 2:
        return answer_twin(call)
    return _answer_product(call, given, lambda a, b: torch.einsum(equation, a, b))


def _answer_product(
    call: Call, operands: Sequence[Tensor], run: Callable[[Tensor, Tensor], Tensor]
) -> Answer:
    output = call.run(lambda: run(*operands))
    a, b = (call.keep(t) for t in operands)
    wanted = [is_source(t) for t in operands]
    masked = _without_noise(call, output, operands, run)

    def propagate(s: Tensor) -> list[Tensor]:
        return list(compress(functional.bilinear(a(), b(), run, masked(s)), wanted))

    return Answer(output, list(compress(operands, wanted)), propagate)


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


def answer_product_and_sum(
    call: Call, input: Tensor, first: Tensor, second: Tensor, *, beta: float = 1, alpha: float = 1
) -> Answer:
    """``beta * input + alpha * (first @ second)``: one affine call."""
    output = call.run(lambda: call.func(*call.args, **call.kwargs))
    if is_sparse(first) or is_sparse(second):
        return _answer_sparse_and_sum(call, output, input, first, second, beta, alpha)
    c, a, b = (call.keep(t) for t in (input, first, second))
    wanted = [is_source(t) for t in (input, first, second)]

    def run(a: Tensor, b: Tensor) -> Tensor:
        product = a @ b
        return product if product.dim() == output_dims else product.sum(0)

    output_dims = output.dim()

    def propagate(s: Tensor) -> list[Tensor]:
        of_sum = abs(beta) * functional.rectify(s.sum_to_size(c().shape), beta * c())
        # The sign of the factor is that of a weight.
        of_first, of_second = functional.bilinear(alpha * a(), b(), run, s)
        return list(compress([of_sum, abs(alpha) * of_first, of_second], wanted))

    return Answer(output, list(compress([input, first, second], wanted)), propagate)


def _answer_sparse_and_sum(
    call: Call,
    output: Tensor,
    input: Tensor,
    first: Tensor,
    second: Tensor,
    beta: float,
    alpha: float,
) -> Answer:
    dense = second if is_sparse(first) else first
    contributions = _sparse_contributions(call, first, second, factor=alpha)
    c, x = call.keep(input), call.keep(dense)
    wanted = [is_source(t) for t in (input, dense)]

    def propagate(s: Tensor) -> list[Tensor]:
        of_sum = abs(beta) * functional.rectify(s.sum_to_size(c().shape), beta * c())
        return list(compress([of_sum, contributions(x(), s)], wanted))

    return Answer(output, list(compress([input, dense], wanted)), propagate)


MATMULS: dict[str, Form] = (
    dict.fromkeys("_sparse_mm bmm matmul mm spmm".split(), answer_matmul)
    | dict.fromkeys(
        "dot ger inner kron linalg_matmul mv outer tensordot vdot".split(), answer_bilinear
    )
    | dict.fromkeys("_sparse_addmm addbmm addmm addmv baddbmm".split(), answer_product_and_sum)
    | {"einsum": answer_einsum}
)
