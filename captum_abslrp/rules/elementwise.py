"""Elementwise calls: activations, powers, dropout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from captum_abslrp.engine.calls import Call
from captum_abslrp.engine.dependence import is_source
from captum_abslrp.engine.numerics import rectified, rectify
from captum_abslrp.engine.saved import SavedTensor
from captum_abslrp.engine.steps import Step
from captum_abslrp.engine.tape import Record
from captum_abslrp.rules.base import Form, Function, Rule, multiplied, record_constant
from captum_abslrp.rules.contributions import transposed
from captum_abslrp.rules.tails import passed_on, tail_of
from captum_abslrp.rules.twin import record_twin


def elementwise(x: Tensor, call: Function, *, even_slope: bool = False) -> Tensor:
    r"""Compute the factor of an elementwise call ``f``, with the shape of ``x``.

    It is the twin form, per magnitude: :math:`k = \mathrm{sign}(x) f'(x) + f'(|x|)`, and 0 where
    :math:`x = 0`. With ``even_slope``, :math:`f'(x) = f'(-x)`, so that :math:`k = 2 f'(x)` where
    :math:`x > 0`.

    Example:
        >>> elementwise(torch.tensor([2.0, -2.0]), torch.square)
        tensor([8., 8.])
    """
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        output = call(leaf)
        both = output if even_slope else output + call(leaf.abs())
        (gradient,) = torch.autograd.grad(both, leaf, torch.ones_like(both))
    if even_slope:
        return rectify(2 * gradient, x)
    # At 0 the slope may be infinite (square root).
    return (x.sign() * gradient).masked_fill_(x == 0, 0)


def gate(x: Tensor, slope: Function) -> Tensor:
    r"""Compute the factor of functions with :math:`f(x) - f(-x) = x`: GELU, SiLU, hardswish.

    Their slopes at ``x`` and ``-x`` sum to one, so that one slope is sufficient:
    :math:`k = \mathrm{sign}(x) f'(x) + [x < 0] / 2`, up to a factor of two. ``slope`` is :math:`f'` and
    returns a new tensor.

    Example:
        >>> gate(torch.tensor([1.0, -1.0]), lambda x: torch.ops.aten.silu_backward(torch.ones(2), x))
        tensor([0.9277, 0.4277])
    """
    sign = x.sign()
    return slope(x).mul_(sign).sub_(sign.clamp_(max=0), alpha=0.5)


def record_elementwise(call: Call, input: Tensor, *args: Any, **kwargs: Any) -> Record:
    if any(map(is_source, [*args, *kwargs.values()])):
        return record_twin(call)
    args = tuple(a.clone() if isinstance(a, Tensor) and a.is_inference() else a for a in args)
    func, slope = call.func, _GATES.get(call.name)
    of_x = None if slope is None else lambda x: slope(x, *args, **kwargs)
    return _record_function(call, input, lambda x: func(x, *args, **kwargs), of_x)


def _record_function(
    call: Call, input: Tensor, run: Function, slope: Function | None = None
) -> Record:
    """Record an elementwise function of one tensor."""
    output = call.run(lambda: run(input))
    if output.shape != input.shape:  # broadcast with another argument
        return record_twin(call)
    x = call.save(input)
    even_slope, increases = call.name in _EVEN_SLOPE, call.name in _INCREASING
    # `rrelu` draws its slopes at random in training mode.
    made_again = None if call.name == "rrelu" else call.save_output(output, lambda: run(x()))

    def factor() -> Tensor:
        return elementwise(x(), run, even_slope=even_slope) if slope is None else gate(x(), slope)

    def sign() -> Tensor:
        values = x()
        slopes = transposed(run, values, torch.ones_like(values))
        return torch.where(slopes < 0, -1.0, 1.0).to(values.dtype)

    return multiplied(
        output,
        input,
        factor,
        nonnegative=call.name in _NONNEGATIVE,
        keeps_sign=even_slope and increases,
        vanishing=True,
        saved_output=made_again,
        tail=passed_on(made_again or call.save(output), x, None if increases else sign),
        logits=x if call.name == "sigmoid" else None,
    )


def record_power(call: Call, input: Any, exponent: Any) -> Any:
    if is_source(exponent):
        if is_source(input):
            return record_twin(call)
        return _record_function(call, exponent, lambda x: torch.pow(input, x))
    if not isinstance(exponent, Tensor) and exponent < 0:  # a divisor
        return record_constant(call)
    return _record_function(call, input, lambda x: torch.pow(x, exponent))


def record_clamp(call: Call, input: Tensor, min: Any = None, max: Any = None) -> Record:
    if max is None and not isinstance(min, Tensor) and min == 0:
        return record_relu(call, input)
    return record_elementwise(call, *call.operands, **call.kwargs)


def record_relu(call: Call, input: Tensor, inplace: bool = False) -> Any:
    """Record ReLU: where the output is positive, the twin rule is the identity, up to the scale of a sample.

    Where the output is zero, its relevance is zero as well, because the later call has multiplied it by the
    output. Relevance is therefore passed on unchanged.
    """
    if call.target is input and call.recording.is_fresh(input):
        call.recording.release(input)
        torch.relu_(input)  # the autograd history stays the same, but its node passes on less
        step: Step = input.grad_fn.step  # type: ignore[union-attr]  # fresh: the output of a call
        before = step.output
        if before is not None:
            step.output = SavedTensor(remake=lambda: before.as_given().clamp(min=0))
        step.rectified = call.save(input)
        call.recording.mark_nonnegative(input)
        return input
    output = call.run(lambda: torch.relu(input))
    x = call.save(input)
    z = call.save_output(output, lambda: torch.relu(x()))
    # A score of zero does not depend on negative inputs.
    tail = tail_of(z, [x], lambda r: [rectify(r, x())], keeps_sign=True)
    return Record(output, [input], lambda s: [s], nonnegative=True, keeps_sign=True, tail=tail)


def record_dropout(
    call: Call, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Record:
    output = call.run(lambda: call.func(input, p, training))
    z = call.save(output)
    # Relevance of very small attention weights is divided by `EPS` once more.
    attends = call.is_nonnegative(input)
    call.recording.hides_negatives |= not attends
    return Record(
        output,
        [input],
        lambda s: [s] if attends else rectified([s], [z()]),
        nonnegative=True,
        vanishing=attends,
        saved_output=z,
    )


_EVEN_SLOPE = frozenset("erf hardsigmoid sigmoid sin sinh softsign tan tanh".split())
"""Functions with the same slope at x and -x; negative inputs get no relevance."""


_GATES: dict[str, Callable[..., Tensor]] = {
    "gelu": lambda x, *, approximate="none": torch.ops.aten.gelu_backward(
        torch.ones_like(x), x, approximate=approximate
    ),
    "hardswish": lambda x, inplace=False: torch.ops.aten.hardswish_backward(torch.ones_like(x), x),
    "silu": lambda x, inplace=False: torch.ops.aten.silu_backward(torch.ones_like(x), x),
}
"""Slopes of gates: functions x g(x) with g(x) + g(-x) = 1."""


_INCREASING = frozenset(
    "clamp clamp_max clamp_min clip elu erf exp exp2 expm1 hardshrink hardsigmoid hardtanh log log10 log1p "
    "asinh atan log2 logit logsigmoid relu6 selu sigmoid sinh softplus softshrink softsign sqrt tanh "
    "threshold".split()
)
"""Functions that never decrease."""


_NONNEGATIVE = frozenset("abs exp exp2 hardsigmoid relu6 sigmoid softplus sqrt square".split())
"""Functions without negative results."""


ACTIVATIONS: dict[str, Form] = {"relu": record_relu}
ACTIVATIONS |= dict.fromkeys(["clamp", "clamp_min", "clip"], record_clamp)
ACTIVATIONS |= dict.fromkeys(["float_power", "pow"], record_power)
ACTIVATIONS |= dict.fromkeys(
    "abs celu clamp_max cos elu erf exp exp2 expm1 gelu hardshrink hardsigmoid hardswish hardtanh "
    "asinh atan leaky_relu log logit log10 log1p log2 logsigmoid mish prelu relu6 rrelu selu sigmoid silu "
    "sin sinh softplus softshrink softsign sqrt square tan tanh tanhshrink threshold".split(),
    record_elementwise,
)


DROPOUTS: dict[str, Form] = dict.fromkeys(
    "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout".split(),
    record_dropout,
)


class DropoutRule(Rule):
    r"""The rule of dropout in the published Vision Transformer mapping: the twin rule of the identity.

    Its formula is :math:`2 x^+ s`: only positive activations get relevance.

    Example:
        >>> mapping = get_mapping().extended({"dropout": DropoutRule()})
        >>> AbsLRP(nn.Sequential(nn.Linear(3, 2)), mapping).attribute(torch.rand(4, 3), 0).shape
        torch.Size([4, 3])
    """

    closed_forms: ClassVar[Mapping[str, Form]] = DROPOUTS
