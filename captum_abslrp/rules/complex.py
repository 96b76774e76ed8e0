"""Calls on complex tensors, each given as its real view: the last dimension holds real and imaginary part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import compress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_abslrp.engine import numerics
from captum_abslrp.engine.calls import Call
from captum_abslrp.engine.complex import as_complex, as_parts
from captum_abslrp.engine.dependence import is_source
from captum_abslrp.engine.names import PREFIX
from captum_abslrp.engine.tape import Record
from captum_abslrp.rules.affine import CONVOLUTIONS
from captum_abslrp.rules.base import Form, once, passed
from captum_abslrp.rules.contributions import diagonal, positive_contributions, transposed
from captum_abslrp.rules.products import record_division, record_product
from captum_abslrp.rules.sums import record_addition, record_subtraction
from captum_abslrp.rules.tails import tail_of
from captum_abslrp.rules.twin import record_twin


def complex_diagonal(x: Tensor, weight: Tensor) -> Tensor:
    r"""The factors of a product of complex numbers, element by element.

    :math:`(a + ib)(c + id)` has the parts :math:`ac - bd` and :math:`ad + bc`: a linear map from two real
    numbers to two, of which each contribution is as in :func:`diagonal`.

    Args:
        x: real view, (..., 2), broadcastable to that of the output.
        weight: real view of what ``x`` is multiplied by, broadcastable to that of the output.

    Returns:
        What ``s`` is multiplied by, (..., part of ``x``, part of the output); is summed over the last
        dimension.

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
    """:func:`positive_contributions` of a product of two complex tensors, the second one fixed.

    As in :func:`complex_diagonal`, each part of the output is a sum over both parts of ``x``.

    Args:
        x: real view, (..., 2).
        weight: real view of the other factor, (..., 2).
        call: ``(x, weight) -> z`` on real tensors, a sum of products of their elements: matmul, einsum ...
        s: shaped like the real view of the output.

    Returns:
        What ``x`` gets, shaped like it.

    Example:
        >>> x, w = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])
        >>> complex_bilinear(x, w, torch.dot, torch.ones(2))
        tensor([[7., 3.]])
    """
    (a, b), (c, d) = x.unbind(-1), weight.unbind(-1)
    s_real, s_imag = s.unbind(-1)

    def of_part(part: Tensor, to_real: Tensor, to_imag: Tensor) -> Tensor:
        def product(weight: Tensor, s: Tensor) -> Tensor:
            return transposed(lambda v: call(v, weight), part, s)

        def of_weights(weights: Tensor) -> Tensor:
            return product(weights[0], s_real) + product(weights[1], s_imag)

        return positive_contributions(part, torch.stack([to_real, to_imag]), of_weights)

    return torch.stack([of_part(a, c, d), of_part(b, -d, c)], -1)


def record_complex_product(call: Call, input: Any, other: Any) -> Record:
    for value, parts in ((input, other), (other, input)):
        if isinstance(value, complex):
            return _record_number(call, parts, value)
        if _is_shared(value):
            return record_product(call, input, other)
    pairs = [(input, other), (other, input)]
    return _record_diagonal(call, [(x, w) for x, w in pairs if is_source(x)], lambda w: w)


def record_complex_division(call: Call, input: Any, other: Any) -> Any:
    """The divisor is a constant of the call, also where it depends on the data."""
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
    """Whether a factor is a real number that all elements share; a real view has two elements at least."""
    return not isinstance(value, Tensor) or value.numel() == 1


def _record_number(call: Call, parts: Tensor, number: complex) -> Record:
    """The product with a complex number; a real or an imaginary one only moves and scales the parts."""
    if number.real and number.imag:
        factor = torch.tensor([number.real, number.imag], dtype=parts.dtype, device=parts.device)
        return _record_diagonal(call, [(parts, factor)], lambda w: w)
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
    call: Call, pairs: Sequence[tuple[Tensor, Tensor]], weight: Callable[[Tensor], Tensor]
) -> Record:
    """Elementwise products: of each source with what it is multiplied by, or with what is made of that."""
    output = call.run(lambda: call.func(*call.args))
    kept = [(call.save(x), call.save(w)) for x, w in pairs]

    @once
    def factors() -> list[Tensor]:
        return [complex_diagonal(x(), weight(w())) for x, w in kept]

    def propagate(s: Tensor) -> list[Tensor]:
        return [(factor * s.unsqueeze(-2)).sum(-1) for factor in factors()]

    return Record(output, [x for x, _ in pairs], propagate, keeps_sign=True)


def _record_bilinear(
    call: Call, a: Tensor, b: Tensor, run: Callable[[Tensor, Tensor], Tensor]
) -> Record:
    """A sum of products of the elements of two tensors; ``run`` is the call on real tensors."""
    output = call.run(lambda: call.func(*call.args, **call.kwargs))
    propagate = _shares(call, a, b, run)
    return Record(output, [t for t in (a, b) if is_source(t)], propagate, keeps_sign=True)


def _shares(
    call: Call, a: Tensor, b: Tensor, run: Callable[[Tensor, Tensor], Tensor], alpha: float = 1
) -> Callable[[Tensor], list[Tensor]]:
    """What those of two factors that are inputs get; the product is taken ``alpha`` times."""
    kept_a, kept_b = call.save(a), call.save(b)
    of_a, of_b = is_source(a), is_source(b)

    def scaled(weight: Tensor) -> Tensor:
        return weight if alpha == 1 else alpha * weight

    def propagate(s: Tensor) -> list[Tensor]:
        shares = []
        if of_a:
            shares.append(complex_bilinear(kept_a(), scaled(kept_b()), run, s))
        if of_b:
            shares.append(complex_bilinear(kept_b(), scaled(kept_a()), lambda b, a: run(a, b), s))
        return shares

    return propagate


def record_complex_matmul(call: Call, input: Tensor, other: Tensor) -> Record:
    return _record_bilinear(call, input, other, torch.matmul)


def record_complex_bilinear(
    call: Call, input: Tensor, other: Tensor, *args: Any, **kwargs: Any
) -> Record:
    run = getattr(torch, call.name.removeprefix(PREFIX))
    return _record_bilinear(call, input, other, lambda a, b: run(a, b, *args, **kwargs))


def record_complex_einsum(call: Call, equation: Any, *operands: Any) -> Record:
    given = (
        operands[0] if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else operands
    )
    if not isinstance(equation, str) or len(given) != 2:
        return record_twin(call)
    a, b = given
    return _record_bilinear(call, a, b, lambda a, b: torch.einsum(equation, a, b))


def record_complex_product_and_sum(
    call: Call, input: Tensor, first: Tensor, second: Tensor, *, beta: float = 1, alpha: float = 1
) -> Record:
    """``beta * input + alpha * (first @ second)``: one affine call."""
    output = call.run(lambda: call.func(*call.args, **call.kwargs))
    c = call.save(input)
    wanted = is_source(input)

    def run(a: Tensor, b: Tensor) -> Tensor:
        product = a @ b
        return product if product.dim() == output.dim() - 1 else product.sum(0)

    of_factors = _shares(call, first, second, run, alpha)

    def propagate(s: Tensor) -> list[Tensor]:
        of_sum = abs(beta) * numerics.rectify(s.sum_to_size(c().shape), beta * c())
        return [*compress([of_sum], [wanted]), *of_factors(s)]

    inputs = [t for t in (input, first, second) if is_source(t)]
    return Record(output, inputs, propagate, keeps_sign=True)


def record_complex_linear(
    call: Call, input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Record:
    return _record_bilinear(call, input, weight, F.linear)


def _complex_convolution(name: str) -> Form:
    run = getattr(F, name)

    def record_complex_convolution(
        call: Call,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Record:
        return _record_bilinear(call, input, weight, lambda x, w: run(x, w, None, *args, **kwargs))

    return record_complex_convolution


def record_complex_exponential(call: Call, input: Tensor) -> Any:
    """``exp(a + ib)`` is ``exp(a)`` times ``cos(b)`` and ``sin(b)``."""

    def parts(input: Tensor) -> Tensor:
        real, imag = input.unbind(-1)
        size = real.exp()
        return torch.stack([size * imag.cos(), size * imag.sin()], -1)

    return call.recording.run_parts(parts, input)


def record_magnitude(call: Call, input: Tensor) -> Record:
    """The norm of the two parts."""
    return record_twin(replace(call, name="linalg_vector_norm"))


COMPLEX: dict[str, Form] = {
    "abs": record_magnitude,
    "add": record_addition,
    "div": record_complex_division,
    "einsum": record_complex_einsum,
    "exp": record_complex_exponential,
    "linear": record_complex_linear,
    "mul": record_complex_product,
    "sub": record_subtraction,
    **{name: _complex_convolution(name) for name in CONVOLUTIONS},
    **dict.fromkeys(["matmul", "bmm", "mm", "linalg_matmul"], record_complex_matmul),
    **dict.fromkeys("dot ger inner kron mv outer tensordot".split(), record_complex_bilinear),
    **dict.fromkeys("addbmm addmm addmv baddbmm".split(), record_complex_product_and_sum),
}
"""By the name of a call on complex tensors, the form of it on real views."""
