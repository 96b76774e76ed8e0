r"""Closed forms of signed rules: the same results as from the gradient, without running the call again.

Each form propagates :math:`g = R_z / (z + \epsilon \, \mathrm{sign} z)` backward through the call and
multiplies it by the sign of the input, because :math:`R_x = x \, \partial / \partial x \langle g, f(x)
\rangle`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import compress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_abslrp.engine.calls import Call
from captum_abslrp.engine.dependence import is_source
from captum_abslrp.engine.numerics import rectify, rectify_in_place
from captum_abslrp.engine.tape import Record
from captum_abslrp.rules import pooling
from captum_abslrp.rules.base import Form, Function, once, passed
from captum_abslrp.rules.normalization import rsigma
from captum_abslrp.rules.sparse import is_sparse


def per_output(z: Callable[[], Tensor], epsilon: float, *, finite: bool = False) -> Function:
    r"""Return a function from :math:`R / |z|` to :math:`R / (z + \epsilon \, \mathrm{sign} z)`.

    The result is a new tensor, and 0 where ``z`` is 0 or infinite. Terms that do not depend on relevance are
    computed once.

    Args:
        z: returns the output of a call.
        epsilon: the stabilizer.
        finite: whether ``z`` is known to have no infinite values (masks).

    Example:
        >>> divide = per_output(lambda: torch.tensor([2.0, -2.0, 0.0]), 2.0)
        >>> divide(torch.tensor([1.0, 1.0, 1.0]))
        tensor([ 0.5000, -0.5000,  0.0000])
    """

    @once
    def ratio() -> Tensor:
        output = z()
        result = output.abs().add_(epsilon)
        torch.div(output, result, out=result)
        if not finite or epsilon == 0:
            result.nan_to_num_(0.0)
        return result

    return lambda s: ratio() * s


def per_magnitude_of(
    x: Callable[[], Tensor], *, nonnegative: bool = False, overwrites: bool = True
) -> Function:
    r"""Return a function from :math:`R / x` to :math:`R / |x|`; 0 where ``x`` is 0.

    Args:
        x: returns the input of a call.
        nonnegative: whether negative entries of ``x`` can be ignored or do not exist.
        overwrites: whether the function overwrites :math:`R / x`.

    Example:
        >>> signed = per_magnitude_of(lambda: torch.tensor([2.0, -2.0, 0.0]))
        >>> signed(torch.tensor([1.0, 2.0, 3.0]))
        tensor([ 1., -2.,  0.])
    """
    if nonnegative:
        mask = rectify_in_place if overwrites else rectify
        return lambda gradient: mask(gradient, x())
    sign = once(lambda: x().sign())
    return lambda gradient: gradient.mul_(sign()) if overwrites else gradient * sign()


def record_sum(call: Call, input: Any, other: Any, *, alpha: float = 1, epsilon: float) -> Record:
    """Record a sum or difference by the epsilon rule; one summand may be a constant."""
    factors = [1.0, float(-alpha if call.name == "sub" else alpha)]
    given = [input, other]
    output = call.run(lambda: call.func(*call.args, **call.kwargs))
    wanted = [is_source(t) for t in given]
    inputs, factors = list(compress(given, wanted)), list(compress(factors, wanted))
    divide = per_output(call.save(output), epsilon)
    signed = [
        per_magnitude_of(
            call.save(x), nonnegative=call.is_nonnegative(x), overwrites=n == len(inputs) - 1
        )
        for n, x in enumerate(inputs)
    ]
    shapes = [x.shape for x in inputs]

    def propagate(s: Tensor) -> list[Tensor]:
        g = divide(s)
        shares = [
            (g if factor == 1 else g * factor).sum_to_size(shape)
            for factor, shape in zip(factors, shapes, strict=True)
        ]
        return [of(share) for of, share in zip(signed, shares, strict=True)]

    return Record(output, inputs, propagate, scaled=False, spares_zeros=True)


def record_weighted_sum(
    call: Call, input: Tensor, other: Tensor, *, alpha: float = 1, gamma: float, epsilon: float
) -> Record:
    """Record a sum or difference with a larger weight for summands with the sign of the sum."""
    factor = -alpha if call.name == "sub" else alpha
    output = call.run(lambda: torch.add(input, other, alpha=factor))
    a, b = call.save(input), call.save(other)

    @once
    def factors() -> list[Tensor]:
        """The factor of each summand for relevance per magnitude of the sum."""
        x, y = a(), b()
        z = torch.add(x, y, alpha=factor)
        sign = z.sign()
        # The summands times the sign of the sum; positive ones have the larger weight.
        summands = [x * sign, y * sign if factor == 1 else (y * sign).mul_(factor)]
        more = summands[0].relu().add_(summands[1].relu())
        size = z.abs_()
        whole = torch.add(size, more, alpha=gamma).add_(epsilon)
        ratio = size.mul_(1 + gamma).div_(whole).nan_to_num_(0.0, 0.0)
        found = [x.sign_() for x in summands]
        for of_summand in found:  # 1 + gamma, 0 or -1, times the ratio
            F.leaky_relu_(of_summand, 1 / (1 + gamma)).mul_(ratio)
        if abs(factor) != 1:
            found[1].mul_(abs(factor))
        return found

    def propagate(s: Tensor) -> list[Tensor]:
        return [s * of_summand for of_summand in factors()]

    return Record(output, [input, other], propagate, scaled=False, spares_zeros=True)


def record_product(call: Call, input: Any, other: Any, *, epsilon: float) -> Record:
    """Record an elementwise product: an even split between two tensors, nothing for a constant factor."""
    return _record_bilinear(
        call, input, other, epsilon, lambda g, a, b: (g * b, g * a), lambda: input * other
    )


def record_quotient(
    call: Call, input: Any, other: Any, *, rounding_mode: None = None, epsilon: float
) -> Any:
    """Record a quotient: the divisor is a constant of the call, so the numerator gets all relevance."""
    output = call.run(lambda: torch.div(input, other))
    if not is_source(input):
        return output
    divisor = call.save(other) if isinstance(other, Tensor) else partial(float, other)
    record = passed(call, output, [input], lambda: 1 / divisor())
    return record._replace(constants=[other] if is_source(other) else [])


def record_matmul(call: Call, input: Tensor, other: Tensor, *, epsilon: float) -> Record:
    """Record a matrix product: an even split between two tensors, nothing for a constant factor."""
    return _record_bilinear(
        call,
        input,
        other,
        epsilon,
        lambda g, a, b: (g @ b.mT, a.mT @ g),
        lambda: torch.matmul(input, other),
    )


def _record_bilinear(
    call: Call,
    input: Any,
    other: Any,
    epsilon: float,
    back: Callable[[Tensor, Any, Any], Sequence[Tensor]],
    run: Callable[[], Tensor],
) -> Record:
    output = call.run(run)
    given = [input, other]
    wanted = [is_source(t) for t in given]
    parts = sum(wanted)
    divide = per_output(call.save(output), epsilon * parts)
    kept: list[Callable[[], Any]] = [
        call.save(t) if isinstance(t, Tensor) else partial(float, t) for t in given
    ]
    signed = [per_magnitude_of(value) for value in kept]

    def propagate(s: Tensor) -> list[Tensor]:
        g = divide(s)
        values = [value() for value in kept]
        found = back(g if parts == 1 else g.div_(parts), *values)
        return [
            of(share.nan_to_num_(0.0).sum_to_size(x.shape))  # masks are infinite
            for of, share, x in compress(zip(signed, found, values, strict=True), wanted)
        ]

    return Record(output, list(compress(given, wanted)), propagate, scaled=False, spares_zeros=True)


def record_softmax(
    call: Call,
    input: Tensor,
    dim: int,
    *options: Any,
    dtype: torch.dtype | None = None,
    epsilon: float,
    **_: Any,
) -> Record:
    """Record softmax by its gradient, as in AttnLRP."""
    dtype = next((o for o in options if isinstance(o, torch.dtype)), dtype)
    output = call.run(lambda: torch.softmax(input, dim, dtype=dtype))
    p = call.save(output)
    divide, signed = per_output(p, epsilon), per_magnitude_of(call.save(input))

    def propagate(s: Tensor) -> list[Tensor]:
        probabilities = p()
        g = divide(s)
        gradient = torch._softmax_backward_data(g, probabilities, dim, probabilities.dtype)
        return [signed(gradient).nan_to_num_(0.0)]

    return Record(output, [input], propagate, scaled=False, spares_zeros=True)


def record_layer_norm(
    call: Call,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
    epsilon: float,
) -> Record:
    """Record layer norm with a constant standard deviation."""
    output = call.run(lambda: F.layer_norm(input, normalized_shape, weight, bias, eps))
    dims = list(range(-len(normalized_shape), 0))
    x, w = call.save(input), None if weight is None else call.save(weight)
    divide, signed = per_output(call.save(output), epsilon, finite=True), per_magnitude_of(x)
    scale = once(lambda: rsigma(x(), dims, eps))

    def propagate(s: Tensor) -> list[Tensor]:
        g = divide(s)
        if w is not None:
            g.mul_(w())
        g -= g.mean(dims, keepdim=True)
        return [signed(g.mul_(scale()))]

    return Record(output, [input], propagate, scaled=False, spares_zeros=True)


def record_max_pool(call: Call, input: Tensor, *args: Any, epsilon: float, **kwargs: Any) -> Record:
    """Record max pooling: relevance goes to the maximum."""
    record = pooling.record_max_pool(call, input, *args, **kwargs)
    z, to_maximum = call.save(record.output), record.tail
    divide, signed = per_output(z, epsilon), per_magnitude_of(z)

    def propagate(s: Tensor) -> Sequence[Tensor]:
        assert to_maximum is not None
        return to_maximum.propagate(signed(divide(s)))

    return Record(
        record.output,
        [input],
        propagate,
        scaled=False,
        nonnegative=record.nonnegative,
        spares_zeros=True,
    )


def suits(call: Call) -> Form | None:
    """Return the closed form of a call, or None if it has none for these arguments."""
    given = [t for t in call.operands if isinstance(t, Tensor)]
    if any(map(is_sparse, given)) or not given:
        return None
    if call.name in PRODUCTS:
        both = len(call.operands) == 2 and not call.kwargs
        if not both or (call.name != "mul" and any(t.dim() < 2 for t in given)):
            return None
    if call.name == "div":
        rounded = len(call.operands) > 2 or call.kwargs.get("rounding_mode") is not None
        return None if rounded else record_quotient
    if call.name == "softmax" and (len(call.operands) < 2 or call.operands[1] is None):
        return None
    if any(is_source(v) for v in call.kwargs.values()):
        return None
    if call.name in pooling.MAX_POOLS:
        batched = given[0].dim() == int(call.name[-2]) + 2
        if call.kwargs.get("return_indices") or not batched:
            return None
    return _FORMS.get(call.name)


PRODUCTS: dict[str, Form] = {"mul": record_product} | dict.fromkeys(
    ["matmul", "bmm", "mm"], record_matmul
)
_FORMS: dict[str, Form] = {
    **PRODUCTS,
    "add": record_sum,
    "sub": record_sum,
    "softmax": record_softmax,
    **dict.fromkeys(pooling.MAX_POOLS, record_max_pool),
}
