"""Calls on complex tensors, each given as its real view: the last dimension holds real and imaginary part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import compress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_abslrp import functional
from captum_abslrp.complex_calls import PREFIX, as_complex, as_parts
from captum_abslrp.forms.affine import CONVOLUTIONS
from captum_abslrp.forms.base import Form, answer_twin, is_source, once, passed, tail_of
from captum_abslrp.forms.elementwise import (
    answer_addition,
    answer_division,
    answer_product,
    answer_subtraction,
)
from captum_abslrp.interception import Call
from captum_abslrp.steps import Answer


def answer_complex_product(call: Call, input: Any, other: Any) -> Answer:
    for value, parts in ((input, other), (other, input)):
        if isinstance(value, complex):
            return _answer_number(call, parts, value)
        if _is_shared(value):
            return answer_product(call, input, other)
    pairs = [(input, other), (other, input)]
    return _answer_diagonal(call, [(x, w) for x, w in pairs if is_source(x)], lambda w: w)


def answer_complex_division(call: Call, input: Any, other: Any) -> Any:
    """The divisor is a constant of the call, also where it depends on the data."""
    if not is_source(input):
        return call.run(lambda: call.func(*call.args))
    if isinstance(other, complex):
        return _answer_number(call, input, 1 / other)
    if _is_shared(other):
        return answer_division(call, input, other)
    answer = _answer_diagonal(
        call, [(input, other)], lambda w: as_parts(as_complex(w).reciprocal())
    )
    return answer._replace(constants=[other] if is_source(other) else [])


def _is_shared(value: Any) -> bool:
    """Whether a factor is a real number that all elements share; a real view has two elements at least."""
    return not isinstance(value, Tensor) or value.numel() == 1


def _answer_number(call: Call, parts: Tensor, number: complex) -> Answer:
    """The product with a complex number; a real or an imaginary one only moves and scales the parts."""
    if number.real and number.imag:
        factor = torch.tensor([number.real, number.imag], dtype=parts.dtype, device=parts.device)
        return _answer_diagonal(call, [(parts, factor)], lambda w: w)
    output = call.run(lambda: call.func(*call.args))
    if not number.imag:
        return passed(call, output, [parts], lambda: number.real)
    size, sign = abs(number), 1.0 if number.imag > 0 else -1.0

    def share(relevance: Tensor) -> list[Tensor]:
        real, imag = relevance.unbind(-1)
        return [torch.stack([sign * imag, -sign * real], -1)]

    return Answer(
        output,
        [parts],
        lambda s: [s.flip(-1) * size],
        scaled=False,
        keeps_sign=True,
        tail=tail_of(call.keep(output), [call.keep(parts)], share),
    )


def _answer_diagonal(
    call: Call, pairs: Sequence[tuple[Tensor, Tensor]], weight: Callable[[Tensor], Tensor]
) -> Answer:
    """Elementwise products: of each source with what it is multiplied by, or with what is made of that."""
    output = call.run(lambda: call.func(*call.args))
    kept = [(call.keep(x), call.keep(w)) for x, w in pairs]

    @once
    def factors() -> list[Tensor]:
        return [functional.complex_diagonal(x(), weight(w())) for x, w in kept]

    def propagate(s: Tensor) -> list[Tensor]:
        return [(factor * s.unsqueeze(-2)).sum(-1) for factor in factors()]

    return Answer(output, [x for x, _ in pairs], propagate, keeps_sign=True)


def _answer_bilinear(
    call: Call, a: Tensor, b: Tensor, run: Callable[[Tensor, Tensor], Tensor]
) -> Answer:
    """A sum of products of the elements of two tensors; ``run`` is the call on real tensors."""
    output = call.run(lambda: call.func(*call.args, **call.kwargs))
    propagate = _shares(call, a, b, run)
    return Answer(output, [t for t in (a, b) if is_source(t)], propagate, keeps_sign=True)


def _shares(
    call: Call, a: Tensor, b: Tensor, run: Callable[[Tensor, Tensor], Tensor], alpha: float = 1
) -> Callable[[Tensor], list[Tensor]]:
    """What those of two factors that are sources get; the product is taken ``alpha`` times."""
    kept_a, kept_b = call.keep(a), call.keep(b)
    of_a, of_b = is_source(a), is_source(b)

    def scaled(weight: Tensor) -> Tensor:
        return weight if alpha == 1 else alpha * weight

    def propagate(s: Tensor) -> list[Tensor]:
        shares = []
        if of_a:
            shares.append(functional.complex_bilinear(kept_a(), scaled(kept_b()), run, s))
        if of_b:
            shares.append(
                functional.complex_bilinear(kept_b(), scaled(kept_a()), lambda b, a: run(a, b), s)
            )
        return shares

    return propagate


def answer_complex_matmul(call: Call, input: Tensor, other: Tensor) -> Answer:
    return _answer_bilinear(call, input, other, torch.matmul)


def answer_complex_bilinear(
    call: Call, input: Tensor, other: Tensor, *args: Any, **kwargs: Any
) -> Answer:
    run = getattr(torch, call.name.removeprefix(PREFIX))
    return _answer_bilinear(call, input, other, lambda a, b: run(a, b, *args, **kwargs))


def answer_complex_einsum(call: Call, equation: Any, *operands: Any) -> Answer:
    given = (
        operands[0] if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else operands
    )
    if not isinstance(equation, str) or len(given) != 2:
        return answer_twin(call)
    a, b = given
    return _answer_bilinear(call, a, b, lambda a, b: torch.einsum(equation, a, b))


def answer_complex_product_and_sum(
    call: Call, input: Tensor, first: Tensor, second: Tensor, *, beta: float = 1, alpha: float = 1
) -> Answer:
    """``beta * input + alpha * (first @ second)``: one affine call."""
    output = call.run(lambda: call.func(*call.args, **call.kwargs))
    c = call.keep(input)
    wanted = is_source(input)

    def run(a: Tensor, b: Tensor) -> Tensor:
        product = a @ b
        return product if product.dim() == output.dim() - 1 else product.sum(0)

    of_factors = _shares(call, first, second, run, alpha)

    def propagate(s: Tensor) -> list[Tensor]:
        of_sum = abs(beta) * functional.rectify(s.sum_to_size(c().shape), beta * c())
        return [*compress([of_sum], [wanted]), *of_factors(s)]

    sources = [t for t in (input, first, second) if is_source(t)]
    return Answer(output, sources, propagate, keeps_sign=True)


def answer_complex_linear(
    call: Call, input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Answer:
    return _answer_bilinear(call, input, weight, F.linear)


def _complex_convolution(name: str) -> Form:
    run = getattr(F, name)

    def answer_complex_convolution(
        call: Call,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Answer:
        return _answer_bilinear(call, input, weight, lambda x, w: run(x, w, None, *args, **kwargs))

    return answer_complex_convolution


def answer_complex_exponential(call: Call, input: Tensor) -> Any:
    """``exp(a + ib)`` is ``exp(a)`` times ``cos(b)`` and ``sin(b)``."""

    def parts(input: Tensor) -> Tensor:
        real, imag = input.unbind(-1)
        size = real.exp()
        return torch.stack([size * imag.cos(), size * imag.sin()], -1)

    return call.interception.composite(parts, input)


def answer_magnitude(call: Call, input: Tensor) -> Answer:
    """The norm of the two parts."""
    return answer_twin(replace(call, name="linalg_vector_norm"))


COMPLEX: dict[str, Form] = {
    "abs": answer_magnitude,
    "add": answer_addition,
    "div": answer_complex_division,
    "einsum": answer_complex_einsum,
    "exp": answer_complex_exponential,
    "linear": answer_complex_linear,
    "mul": answer_complex_product,
    "sub": answer_subtraction,
    **{name: _complex_convolution(name) for name in CONVOLUTIONS},
    **dict.fromkeys(["matmul", "bmm", "mm", "linalg_matmul"], answer_complex_matmul),
    **dict.fromkeys("dot ger inner kron mv outer tensordot".split(), answer_complex_bilinear),
    **dict.fromkeys("addbmm addmm addmv baddbmm".split(), answer_complex_product_and_sum),
}
"""By the name of a call on complex tensors, the form of it on real views."""
