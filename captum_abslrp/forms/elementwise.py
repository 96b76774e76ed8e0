"""Calls on each element alone: activations, powers, sums, products, quotients, dropout."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from functools import partial
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from captum_abslrp import functional
from captum_abslrp.calls import on_host
from captum_abslrp.forms.base import (
    Form,
    answer_constant,
    answer_twin,
    is_source,
    once,
    passed,
    passed_on,
    scaled_tail,
    tail_of,
)
from captum_abslrp.interception import Call
from captum_abslrp.steps import Answer, Kept, Step


def answer_elementwise(call: Call, input: Tensor, *args: Any, **kwargs: Any) -> Answer:
    if any(map(is_source, [*args, *kwargs.values()])):
        return answer_twin(call)
    args = tuple(a.clone() if isinstance(a, Tensor) and a.is_inference() else a for a in args)
    func = call.func

    def run(x: Tensor) -> Tensor:
        result: Tensor = func(x, *args, **kwargs)
        return result

    slope = _GATES.get(call.name)
    return _answer_function(
        call, input, run, None if slope is None else lambda x: slope(x, *args, **kwargs)
    )


def _answer_function(
    call: Call,
    input: Tensor,
    run: Callable[[Tensor], Tensor],
    slope: Callable[[Tensor], Tensor] | None = None,
) -> Answer:
    """A function of one tensor, element by element."""
    output = call.run(lambda: run(input))
    if output.shape != input.shape:  # broadcast with another argument
        return answer_twin(call)
    x = call.keep(input)
    even_slope = call.name in _EVEN_SLOPE

    @once
    def factor() -> Tensor:
        if slope is not None:
            return functional.gate(x(), slope)
        return functional.elementwise(x(), run, even_slope=even_slope)

    # Drawn at random in training mode.
    kept = None if call.name == "rrelu" else call.keep_output(output, lambda: run(x()))
    increases = call.name in _INCREASING
    return Answer(
        output,
        [input],
        lambda s: [s.mul_(factor())],
        nonnegative=call.name in _NONNEGATIVE,
        keeps_sign=even_slope and increases,
        vanishing=True,
        kept=kept,
        tail=passed_on(
            call.keep(output) if kept is None else kept,
            x,
            None if increases else lambda: functional.slope_sign(x(), run),
        ),
        logits=x if call.name == "sigmoid" else None,
    )


def answer_power(call: Call, input: Any, exponent: Any) -> Any:
    if is_source(exponent):
        return (
            answer_twin(call)
            if is_source(input)
            else _answer_function(call, exponent, lambda x: torch.pow(input, x))
        )
    if not isinstance(exponent, Tensor) and exponent < 0:  # a divisor
        return answer_constant(call)
    return _answer_function(call, input, lambda x: torch.pow(x, exponent))


def answer_clamp(call: Call, input: Tensor, min: Any = None, max: Any = None) -> Answer:
    if max is None and not isinstance(min, Tensor) and min == 0:
        return answer_relu(call, input)
    return answer_elementwise(call, *call.operands, **call.kwargs)


def answer_relu(call: Call, input: Tensor, inplace: bool = False) -> Any:
    """The twin rule of ReLU is the identity, up to the scale of a sample, where the output is positive.

    Where the output is zero, so is the relevance that arrives there: the call that handed it over has
    multiplied by that zero. So nothing is left to do on the way back.
    """
    if call.target is input and call.interception.is_fresh(input):
        call.interception.release(input)
        torch.relu_(input)  # its history stays what it is, but that it hands on less
        step: Step = input.grad_fn.step  # type: ignore[union-attr]  # fresh: a call has made it
        if step.output is not None:
            step.output = Kept(remake=partial(_rectified, step.output))
        step.rectified = call.keep(input)
        call.interception.mark_nonnegative(input)
        return input
    output = call.run(lambda: torch.relu(input))
    x = call.keep(input)
    z = call.keep_output(output, lambda: torch.relu(x()))
    # A score of zero does not depend on what is negative.
    tail = tail_of(z, [x], lambda r: [functional.rectify(r, x())], keeps_sign=True)
    return Answer(output, [input], lambda s: [s], nonnegative=True, keeps_sign=True, tail=tail)


def _rectified(kept: Kept) -> Tensor:
    return kept.as_given().clamp(min=0)


MASKED = -100.0
"""What is added to a logit so that softmax leaves nothing of it, or any lower number."""


def answer_addition(call: Call, input: Any, other: Any, *, alpha: float = 1) -> Answer:
    summand = other if alpha == 1 else other * alpha
    return _answer_summands(call, (input, other), (input, summand), alpha)


def answer_subtraction(call: Call, input: Any, other: Any, *, alpha: float = 1) -> Answer:
    return _answer_summands(call, (input, other), (input, -alpha * other), -alpha)


def _answer_summands(
    call: Call, arguments: Sequence[Any], summands: Sequence[Any], alpha: float
) -> Answer:
    """A sum of two; the second summand is the second argument times ``alpha``."""
    sources = [(a, s) for a, s in zip(arguments, summands, strict=True) if is_source(a)]
    constants = [s for a, s in zip(arguments, summands, strict=True) if not is_source(a)]
    nonnegative = call.is_nonnegative(*summands)
    factor = abs(alpha) if is_source(arguments[1]) else 1.0
    # The first argument is added; the second one may be subtracted.
    signs = [
        1.0 if i == 0 else math.copysign(1.0, alpha)
        for i, argument in enumerate(arguments)
        if is_source(argument)
    ]
    is_mask = _is_mask(constants[0]) if constants else False
    if is_mask is True:
        output = call.run(lambda: summands[0] + summands[1])
        answer = passed(call, output, [argument for argument, _ in sources], lambda: factor)
        return answer._replace(tail=scaled_tail(call.keep(output), lambda: factor * signs[0]))
    kept = [call.keep(s) for _, s in sources]
    kept_sources = [
        k if argument is summand else call.keep(argument)
        for k, (argument, summand) in zip(kept, sources, strict=True)
    ]
    constant = [call.keep(c) if isinstance(c, Tensor) else partial(float, c) for c in constants]
    overwritten = _add_in_place(call, *summands)
    output = call.run(lambda: summands[0] + summands[1]) if overwritten is None else overwritten

    def values() -> list[Any]:
        return [value() for value in (*kept, *constant)]

    z = call.keep_output(output, lambda: operator.add(*values()))
    cancels = call.name == "sub" or any(c < 0 for c in constants if not isinstance(c, Tensor))

    least = functional.rounding(output.dtype)  # no closure may hold the output, see `Step.output`

    @once
    def noise() -> Tensor:
        """Elements of a difference that are rounding errors of the two."""
        largest = torch.maximum(*(torch.as_tensor(v).abs() for v in values()))
        return z().abs() <= least * largest

    def propagate(s: Tensor) -> list[Tensor]:
        if is_mask is not False:  # known on the device only
            return [torch.where(is_mask, s, functional.rectify(s, kept[0]()))]
        if cancels:
            s = s.masked_fill(noise(), 0)
        seeds = [s.sum_to_size(x().shape) for x in kept]
        if factor != 1:
            seeds[-1] = seeds[-1] * factor
        return functional.rectified(seeds, [x() for x in kept])

    def share(relevance: Tensor) -> list[Tensor]:
        if len(kept) == 1:
            return [(relevance * signs[0]).sum_to_size(kept[0]().shape)]
        sizes = [functional.magnitude(x()) for x in kept]
        if signs[1] < 0 and sizes[1].numel() < relevance.numel() == sizes[0].numel():
            # What all of a row are less by, as in a softmax that is written out, tells no class from another.
            return [relevance, torch.zeros_like(sizes[1])]
        whole = sizes[0] + sizes[1]
        parts = (relevance / whole).masked_fill_(whole == 0, 0)
        return [
            (parts * size * sign).sum_to_size(size.shape)
            for size, sign in zip(sizes, signs, strict=True)
        ]

    return Answer(
        output,
        [argument for argument, _ in sources],
        propagate,
        nonnegative=nonnegative,
        keeps_sign=True,
        kept_sources=kept_sources,
        tail=tail_of(z, kept_sources, share, keeps_sign=min(signs) > 0),
    )


def _add_in_place(call: Call, target: Any, other: Any) -> Tensor | None:
    """The target of an in-place addition, changed; None if there is none or it cannot be."""
    if call.target is None or call.target is not target or target._is_view() or target.is_leaf:
        return None
    if isinstance(other, Tensor):
        fits = torch.broadcast_shapes(target.shape, other.shape) == target.shape
        kept = torch.promote_types(target.dtype, other.dtype) == target.dtype
        apart = target.untyped_storage()._cdata != other.untyped_storage()._cdata
        if not (fits and kept and apart and target.device == other.device):
            return None
    call.interception.release(target)
    return target.add_(other)


def _is_mask(value: Any) -> bool | Tensor:
    """Whether a constant summand only masks: it holds 0 where all stays, and a very low number.

    A tensor of one element, where the answer is on a device that would have to be waited for.
    """
    if not isinstance(value, Tensor):
        return bool(value == 0)
    if value.is_meta:  # inspected without values
        return False
    answer = ((value == 0) | (value <= MASKED)).all()
    known = on_host(answer)
    return answer if known is None else known


def answer_head_sum(call: Call, input: Any, other: Any) -> Answer:
    if not (is_source(input) and is_source(other)):
        return answer_addition(call, input, other)
    output = call.run(lambda: torch.add(input, other))
    return Answer(output, [input, other], lambda s: [s, s])


def answer_product(call: Call, input: Any, other: Any) -> Answer:
    output = call.run(lambda: input * other)
    sources = [t for t in (input, other) if is_source(t)]
    nonnegative = call.is_nonnegative(input, other)
    for value, against in ((input, other), (other, input)):
        if _is_scalar(value, against):
            answer = _answer_scaled(call, output, value, against)
            return answer._replace(nonnegative=nonnegative)
    a, b = call.keep(input), call.keep(other)
    wanted = [is_source(t) for t in (input, other)]

    @once
    def factors() -> list[Tensor]:
        pairs = compress(((a(), b()), (b(), a())), wanted)
        return [functional.diagonal(x, y) for x, y in pairs]

    def propagate(s: Tensor) -> list[Tensor]:
        return [s * factor for factor in factors()]

    z = call.keep(output)
    if len(sources) == 1:
        tail = scaled_tail(z, b if is_source(input) else a)
    else:  # half for each factor, also where the product is negative
        shapes = [t.shape for t in (input, other)]
        tail = tail_of(
            z, [a, b], lambda r: [(r / 2).sum_to_size(shape) for shape in shapes], keeps_sign=True
        )
    return Answer(output, sources, propagate, nonnegative=nonnegative, keeps_sign=True, tail=tail)


def _answer_scaled(call: Call, output: Tensor, value: Any, input: Tensor) -> Answer:
    """The product with a constant that all elements share."""
    factor = call.keep(value) if isinstance(value, Tensor) else partial(float, value)
    x = call.keep(input)
    kept = call.keep_output(output, lambda: x() * factor())
    return passed(call, output, [input], factor)._replace(kept=kept)


def answer_division(call: Call, input: Any, other: Any, *, rounding_mode: str | None = None) -> Any:
    """The divisor is a constant of the call, also where it depends on the data."""
    output = call.run(lambda: torch.div(input, other, rounding_mode=rounding_mode))
    if rounding_mode is not None or not is_source(input):
        return output
    nonnegative = call.is_nonnegative(input, other)
    if _is_scalar(other, input):
        divisor = call.keep(other) if isinstance(other, Tensor) else partial(float, other)
        return passed(call, output, [input], lambda: 1 / divisor(), nonnegative=nonnegative)
    x, c = call.keep(input), call.keep(other)
    factor = once(lambda: functional.diagonal(x(), c().reciprocal()))
    return Answer(
        output,
        [input],
        lambda s: [s.mul_(factor())],
        constants=[other] if is_source(other) else [],
        nonnegative=nonnegative,
        keeps_sign=True,
        tail=scaled_tail(call.keep(output), lambda: c().reciprocal()),
    )


def _is_scalar(value: Any, other: Any) -> bool:
    """Whether multiplying by a value is scaling by a constant, whatever the batch size."""
    if not isinstance(value, Tensor):
        return True
    if is_source(value):  # the other one may be a number
        return False
    return value.dim() == 0 or (value.numel() == 1 and value.dim() < other.dim())


def answer_dropout(
    call: Call,
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
) -> Answer:
    output = call.run(lambda: call.func(input, p, training))
    if call.is_nonnegative(input):
        # Attention of next to nothing is divided by `EPS` once more.
        kept = call.keep(output)
        return Answer(output, [input], lambda s: [s], nonnegative=True, vanishing=True, kept=kept)
    z = call.keep(output)
    return Answer(
        output, [input], lambda s: [functional.rectified([s], [z()])[0]], nonnegative=True, kept=z
    )


def _slope_of_gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    slope: Tensor = torch.ops.aten.gelu_backward(torch.ones_like(x), x, approximate=approximate)
    return slope


_EVEN_SLOPE = frozenset("erf hardsigmoid sigmoid sin sinh softsign tan tanh".split())
"""Functions of which negative inputs get exactly nothing."""
_GATES: dict[str, Callable[..., Tensor]] = {
    "gelu": _slope_of_gelu,
    "hardswish": lambda x, inplace=False: torch.ops.aten.hardswish_backward(torch.ones_like(x), x),
    "silu": lambda x, inplace=False: torch.ops.aten.silu_backward(torch.ones_like(x), x),
}
"""Slopes of functions that are their input times a share, and at -x times the rest."""
_INCREASING = frozenset(
    "clamp clamp_max clamp_min clip elu erf exp exp2 expm1 hardshrink hardsigmoid hardtanh log log10 log1p "
    "asinh atan log2 logit logsigmoid relu6 selu sigmoid sinh softplus softshrink softsign sqrt tanh "
    "threshold".split()
)
"""Functions that never fall."""
_NONNEGATIVE = frozenset("abs exp exp2 hardsigmoid relu6 sigmoid softplus sqrt square".split())
"""Functions without negative results."""
ACTIVATIONS: dict[str, Form] = {"relu": answer_relu}
ACTIVATIONS |= dict.fromkeys(["clamp", "clamp_min", "clip"], answer_clamp)
ACTIVATIONS |= dict.fromkeys(["float_power", "pow"], answer_power)
ACTIVATIONS |= dict.fromkeys(
    "abs celu clamp_max cos elu erf exp exp2 expm1 gelu hardshrink hardsigmoid hardswish hardtanh "
    "asinh atan leaky_relu log logit log10 log1p log2 logsigmoid mish prelu relu6 rrelu selu sigmoid silu "
    "sin sinh softplus softshrink softsign sqrt square tan tanh tanhshrink threshold".split(),
    answer_elementwise,
)
SUMS: dict[str, Form] = {"add": answer_addition, "sub": answer_subtraction}
PRODUCTS: dict[str, Form] = {"mul": answer_product, "div": answer_division}
DROPOUTS: dict[str, Form] = dict.fromkeys(
    "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout".split(),
    answer_dropout,
)
