"""Products of two tensors of the network: each one with the other one fixed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from captum_abslrp import functional
from captum_abslrp.forms.base import Form, answer_twin, is_source, once
from captum_abslrp.functional import SignedParts
from captum_abslrp.interception import Call
from captum_abslrp.steps import Answer


def answer_matmul(call: Call, input: Tensor, other: Tensor) -> Answer:
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

    def propagate(s: Tensor) -> list[Tensor]:
        of_input, of_other = parts()
        return list(compress(functional.matmul(of_input, of_other, s.contiguous()), wanted))

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


def _by_batch(x: Tensor) -> Tensor:
    """The tensor with one matrix after the other in memory, each as it lies or transposed."""
    if x.dim() > 2 and x.stride(-2) < x.stride(-1):
        return x.mT.contiguous().mT
    return x.contiguous()


def answer_bilinear(call: Call, input: Tensor, other: Tensor, *args: Any, **kwargs: Any) -> Answer:
    func = call.func
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

    def propagate(s: Tensor) -> list[Tensor]:
        return list(compress(functional.bilinear(a(), b(), run, s), wanted))

    return Answer(output, list(compress(operands, wanted)), propagate)


def answer_product_and_sum(
    call: Call, input: Tensor, first: Tensor, second: Tensor, *, beta: float = 1, alpha: float = 1
) -> Answer:
    """``beta * input + alpha * (first @ second)``: one affine call."""
    output = call.run(lambda: call.func(input, first, second, beta=beta, alpha=alpha))
    c, a, b = (call.keep(t) for t in (input, first, second))
    wanted = [is_source(t) for t in (input, first, second)]

    def run(a: Tensor, b: Tensor) -> Tensor:
        product = alpha * (a @ b)
        return product if product.dim() == output_dims else product.sum(0)

    output_dims = output.dim()

    def propagate(s: Tensor) -> list[Tensor]:
        of_sum = abs(beta) * functional.rectify(s.sum_to_size(c().shape), beta * c())
        return list(compress([of_sum, *functional.bilinear(a(), b(), run, s)], wanted))

    return Answer(output, list(compress([input, first, second], wanted)), propagate)


MATMULS: dict[str, Form] = (
    dict.fromkeys(["matmul", "bmm", "mm"], answer_matmul)
    | dict.fromkeys(
        "dot ger inner kron linalg_matmul mv outer tensordot vdot".split(), answer_bilinear
    )
    | dict.fromkeys("addbmm addmm addmv baddbmm".split(), answer_product_and_sum)
    | {"einsum": answer_einsum}
)
