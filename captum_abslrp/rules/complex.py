"""Rules of calls on complex tensors, as real views: the last dimension has the real and imaginary part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_abslrp.engine.calls import Call
from captum_abslrp.engine.complex import as_complex, as_parts
from captum_abslrp.engine.dependence import is_source
from captum_abslrp.engine.names import PREFIX
from captum_abslrp.engine.tape import Record
from captum_abslrp.rules.affine import CONVOLUTIONS
from captum_abslrp.rules.base import Form, once, passed
from captum_abslrp.rules.contributions import diagonal, positive_contributions, transposed
from captum_abslrp.rules.matmul import einsum_pair, with_summand
from captum_abslrp.rules.products import record_division, record_product
from captum_abslrp.rules.sums import record_addition, record_subtraction
from captum_abslrp.rules.tails import tail_of
from captum_abslrp.rules.twin import record_twin


def complex_diagonal(x: Tensor, weight: Tensor) -> Tensor:
    r"""Compute the factors of an elementwise product of complex numbers, on real views.

    :math:`(a + ib)(c + id)` has the parts :math:`ac - bd` and :math:`ad + bc`, which is a linear map between
    pairs of real numbers. Each contribution is as in :func:`diagonal`. The result has shape
    (..., part of ``x``, part of the output).

    Example:
        >>> complex_diagonal(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))
        tensor([[3., 4.],
                [0., 3.]])
    """
    (a, b), (c, d) = x.unbind(-1), weight.unbind(-1)
    of_real = torch.stack([diagonal(a, c), diagonal(a, d)], -1)
    of_imag = torch.stack([diagonal(b, -d), diagonal(b, c)], -1)
    return torch.stack([of_real, of_imag], -2)


def complex_bilinear(
    x: Tensor, weight: Tensor, call: Callable[[Tensor, Tensor], Tensor], s: Tensor
) -> Tensor:
    """Apply :func:`positive_contributions` to a product of complex tensors, the second one fixed.

    As in :func:`complex_diagonal`, each part of the output is a sum over both parts of ``x``. The tensors are
    real views; ``call`` is the product on real tensors.

    Example:
        >>> x, w = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])
        >>> complex_bilinear(x, w, torch.dot, torch.ones(2))
        tensor([[7., 3.]])
    """
    (a, b), (c, d) = x.unbind(-1), weight.unbind(-1)

    def of_part(part: Tensor, to_real: Tensor, to_imag: Tensor) -> Tensor:
        def product(weights: Tensor) -> Tensor:
            of_real, of_imag = (
                transposed(lambda v: call(v, w), part, of_s)  # noqa: B023  # run at once
                for w, of_s in zip(weights, s.unbind(-1), strict=True)
            )
            return of_real + of_imag

        return positive_contributions(part, torch.stack([to_real, to_imag]), product)

    return torch.stack([of_part(a, c, d), of_part(b, -d, c)], -1)


def record_complex_product(call: Call, input: Any, other: Any) -> Record:
    pairs = [(other, input), (input, other)]
    for x, factor in pairs:
        if isinstance(factor, complex):
            return _record_number(call, x, factor)
        if _is_shared(factor):
            return record_product(call, input, other)
    return _record_diagonal(call, [(x, w) for x, w in reversed(pairs) if is_source(x)])


def record_complex_division(call: Call, input: Any, other: Any) -> Any:
    """Record a division; the divisor is a constant of the call, even if it depends on the inputs."""
    if not is_source(input):
        return call.run(lambda: call.func(*call.args))
    if isinstance(other, complex):
        return _record_number(call, input, 1 / other)
    if _is_shared(other):
        return record_division(call, input, other)
    record = _record_diagonal(
        call, [(input, other)], lambda w: as_parts(as_complex(w).reciprocal())
    )
    return record._replace(constants=[other] if is_source(other) else [])


def _is_shared(value: Any) -> bool:
    """Whether a factor is a real number that all elements share; a real view has at least two elements."""
    return not isinstance(value, Tensor) or value.numel() == 1


def _record_number(call: Call, parts: Tensor, number: complex) -> Record:
    """Record a product with a complex number; a real or imaginary number only moves and scales the parts."""
    if number.real and number.imag:
        factor = torch.tensor([number.real, number.imag], dtype=parts.dtype, device=parts.device)
        return _record_diagonal(call, [(parts, factor)])
    output = call.run(lambda: call.func(*call.args))
    if not number.imag:
        return passed(call, output, [parts], lambda: number.real)
    size, sign = abs(number), 1.0 if number.imag > 0 else -1.0

    def share(relevance: Tensor) -> list[Tensor]:
        real, imag = relevance.unbind(-1)
        return [torch.stack([sign * imag, -sign * real], -1)]

    return Record(
        output,
        [parts],
        lambda s: [s.flip(-1) * size],
        scaled=False,
        keeps_sign=True,
        tail=tail_of(call.save(output), [call.save(parts)], share),
    )


def _record_diagonal(
    call: Call,
    pairs: Sequence[tuple[Tensor, Tensor]],
    weight: Callable[[Tensor], Tensor] = lambda w: w,
) -> Record:
    """Record the elementwise product of each source with a weight that is computed from the other operand."""
    output = call.run(lambda: call.func(*call.args))
    kept = [(call.save(x), call.save(w)) for x, w in pairs]
    factors = once(lambda: [complex_diagonal(x(), weight(w())) for x, w in kept])

    def propagate(s: Tensor) -> list[Tensor]:
        return [(factor * s.unsqueeze(-2)).sum(-1) for factor in factors()]

    return Record(output, [x for x, _ in pairs], propagate, keeps_sign=True)


def _record_product(
    call: Call, a: Tensor, b: Tensor, run: Callable[[Tensor, Tensor], Tensor], alpha: float = 1
) -> Record:
    """Record a sum of products of two tensors, times `alpha`; ``run`` is the call on real tensors."""
    output = call.run(lambda: call.func(*call.args, **call.kwargs))
    pairs = [(a, b, run), (b, a, lambda b, a: run(a, b))]
    kept = [(call.save(x), call.save(w), f) for x, w, f in pairs if is_source(x)]

    def propagate(s: Tensor) -> list[Tensor]:
        return [complex_bilinear(x(), w() if alpha == 1 else alpha * w(), f, s) for x, w, f in kept]

    return Record(output, [x for x in (a, b) if is_source(x)], propagate, keeps_sign=True)


def record_complex_bilinear(
    call: Call, input: Tensor, other: Tensor, *args: Any, **kwargs: Any
) -> Record:
    run = getattr(
        torch, call.name.removeprefix(PREFIX), torch.matmul
    )  # the default: `linalg_matmul`
    return _record_product(call, input, other, lambda a, b: run(a, b, *args, **kwargs))


def record_complex_layer(
    call: Call, input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any
) -> Record:
    run = getattr(F, call.name.removeprefix(PREFIX))
    return _record_product(call, input, weight, lambda x, w: run(x, w, None, *args, **kwargs))


def record_complex_einsum(call: Call, equation: Any, *operands: Any) -> Record:
    pair = einsum_pair(equation, operands)
    if pair is None:
        return record_twin(call)
    first, second = pair
    return _record_product(call, first, second, lambda a, b: torch.einsum(equation, a, b))


def record_complex_product_and_sum(
    call: Call, input: Tensor, first: Tensor, second: Tensor, *, beta: float = 1, alpha: float = 1
) -> Record:
    """Record ``beta * input + alpha * (first @ second)`` as one affine call."""
    sums_batch = call.name.removeprefix(PREFIX) == "addbmm"

    def run(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b).sum(0) if sums_batch else a @ b

    return with_summand(call, _record_product(call, first, second, run, alpha), input, beta)


def record_complex_exponential(call: Call, input: Tensor) -> Any:
    """Record ``exp(a + ib)`` as ``exp(a)`` times ``cos(b)`` and ``sin(b)``."""

    def parts(input: Tensor) -> Tensor:
        real, imag = input.unbind(-1)
        size = real.exp()
        return torch.stack([size * imag.cos(), size * imag.sin()], -1)

    return call.recording.run_parts(parts, input)


def record_magnitude(call: Call, input: Tensor) -> Record:
    """Record the magnitude as the norm of the two parts."""
    return record_twin(replace(call, name="linalg_vector_norm"))


COMPLEX: dict[str, Form] = {
    "abs": record_magnitude,
    "add": record_addition,
    "div": record_complex_division,
    "einsum": record_complex_einsum,
    "exp": record_complex_exponential,
    "mul": record_complex_product,
    "sub": record_subtraction,
    **dict.fromkeys(["linear", *CONVOLUTIONS], record_complex_layer),
    **dict.fromkeys(
        "bmm dot ger inner kron linalg_matmul matmul mm mv outer tensordot".split(),
        record_complex_bilinear,
    ),
    **dict.fromkeys("addbmm addmm addmv baddbmm".split(), record_complex_product_and_sum),
}
"""The forms on real views, by the name of a call on complex tensors."""
