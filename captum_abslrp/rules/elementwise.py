"""Calls on each element alone: activations, powers, dropout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from captum_abslrp.engine import numerics
from captum_abslrp.engine.calls import Call
from captum_abslrp.engine.dependence import is_source
from captum_abslrp.engine.numerics import in_pieces, rectify
from captum_abslrp.engine.saved import SavedTensor
from captum_abslrp.engine.tape import Record, Step
from captum_abslrp.rules.base import Form, Rule, once, record_constant
from captum_abslrp.rules.contributions import transposed
from captum_abslrp.rules.tails import passed_on, tail_of
from captum_abslrp.rules.twin import record_twin


def elementwise(
    x: Tensor,
    call: Callable[[Tensor], Tensor],
    *,
    even_slope: bool = False,
) -> Tensor:
    r"""The factor of a call that acts on each element alone.

    The twin form, per magnitude: :math:`k = \mathrm{sign}(x) f'(x) + f'(|x|)`; 0 where :math:`x = 0`.

    Args:
        x: input, any shape.
        call: ``f``, for example ``torch.tanh``.
        even_slope: whether :math:`f'(x) = f'(-x)`, so that :math:`k = 2 f'(x)` where :math:`x > 0`.

    Returns:
        ``k``, what ``s`` is multiplied by, shaped like ``x``.

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


def slope_sign(x: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
    """The sign of the slope of a call that acts on each element alone: -1 where it falls, and 1 elsewhere.

    Args:
        x: input, any shape.
        call: ``f``, for example ``torch.abs``.

    Example:
        >>> slope_sign(torch.tensor([2.0, -2.0, 0.0]), torch.abs)
        tensor([ 1., -1.,  1.])
    """
    slope = transposed(call, x, torch.ones_like(x))
    return torch.where(slope < 0, -1.0, 1.0).to(x.dtype)


def gate(x: Tensor, slope: Callable[[Tensor], Tensor]) -> Tensor:
    r""":func:`elementwise` of functions with :math:`f(x) - f(-x) = x`: GELU, SiLU, hardswish.

    Their slopes at ``x`` and ``-x`` add up to one, so that one is enough:
    :math:`k = \mathrm{sign}(x) f'(x) + [x < 0] / 2`, but for a factor of two.

    Args:
        x: input, any shape.
        slope: :math:`f'`; returns a new tensor.

    Returns:
        ``k``, what ``s`` is multiplied by, shaped like ``x``.

    Example:
        >>> gate(torch.tensor([1.0, -1.0]), lambda x: torch.ops.aten.silu_backward(torch.ones(2), x))
        tensor([0.9277, 0.4277])
    """
    factor = torch.empty_like(x)
    for few, into in zip(*in_pieces(x, factor), strict=True):
        sign = few.sign()
        signed = slope(few).mul_(sign)
        torch.sub(signed, sign.clamp_(max=0), alpha=0.5, out=into)
    return factor


def record_elementwise(call: Call, input: Tensor, *args: Any, **kwargs: Any) -> Record:
    if any(map(is_source, [*args, *kwargs.values()])):
        return record_twin(call)
    args = tuple(a.clone() if isinstance(a, Tensor) and a.is_inference() else a for a in args)
    func = call.func

    def run(x: Tensor) -> Tensor:
        result: Tensor = func(x, *args, **kwargs)
        return result

    slope = _GATES.get(call.name)
    return _record_function(
        call, input, run, None if slope is None else lambda x: slope(x, *args, **kwargs)
    )


def _record_function(
    call: Call,
    input: Tensor,
    run: Callable[[Tensor], Tensor],
    slope: Callable[[Tensor], Tensor] | None = None,
) -> Record:
    """A function of one tensor, element by element."""
    output = call.run(lambda: run(input))
    if output.shape != input.shape:  # broadcast with another argument
        return record_twin(call)
    x = call.save(input)
    even_slope = call.name in _EVEN_SLOPE

    @once
    def factor() -> Tensor:
        if slope is not None:
            return gate(x(), slope)
        return elementwise(x(), run, even_slope=even_slope)

    # Drawn at random in training mode.
    kept = None if call.name == "rrelu" else call.save_output(output, lambda: run(x()))
    increases = call.name in _INCREASING
    return Record(
        output,
        [input],
        lambda s: [s.mul_(factor())],
        nonnegative=call.name in _NONNEGATIVE,
        keeps_sign=even_slope and increases,
        vanishing=True,
        saved_output=kept,
        tail=passed_on(
            call.save(output) if kept is None else kept,
            x,
            None if increases else lambda: slope_sign(x(), run),
        ),
        logits=x if call.name == "sigmoid" else None,
    )


def record_power(call: Call, input: Any, exponent: Any) -> Any:
    if is_source(exponent):
        return (
            record_twin(call)
            if is_source(input)
            else _record_function(call, exponent, lambda x: torch.pow(input, x))
        )
    if not isinstance(exponent, Tensor) and exponent < 0:  # a divisor
        return record_constant(call)
    return _record_function(call, input, lambda x: torch.pow(x, exponent))


def record_clamp(call: Call, input: Tensor, min: Any = None, max: Any = None) -> Record:
    if max is None and not isinstance(min, Tensor) and min == 0:
        return record_relu(call, input)
    return record_elementwise(call, *call.operands, **call.kwargs)


def record_relu(call: Call, input: Tensor, inplace: bool = False) -> Any:
    """The twin rule of ReLU is the identity, up to the scale of a sample, where the output is positive.

    Where the output is zero, so is the relevance that arrives there: the call that handed it over has
    multiplied by that zero. So nothing is left to do on the way back.
    """
    if call.target is input and call.recording.is_fresh(input):
        call.recording.release(input)
        torch.relu_(input)  # its history stays what it is, but that it hands on less
        step: Step = input.grad_fn.step  # type: ignore[union-attr]  # fresh: a call has made it
        if step.output is not None:
            step.output = SavedTensor(remake=partial(_rectified, step.output))
        step.rectified = call.save(input)
        call.recording.mark_nonnegative(input)
        return input
    output = call.run(lambda: torch.relu(input))
    x = call.save(input)
    z = call.save_output(output, lambda: torch.relu(x()))
    # A score of zero does not depend on what is negative.
    tail = tail_of(z, [x], lambda r: [numerics.rectify(r, x())], keeps_sign=True)
    return Record(output, [input], lambda s: [s], nonnegative=True, keeps_sign=True, tail=tail)


def _rectified(kept: SavedTensor) -> Tensor:
    return kept.as_given().clamp(min=0)


def record_dropout(
    call: Call,
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
) -> Record:
    output = call.run(lambda: call.func(input, p, training))
    if call.is_nonnegative(input):
        # Attention of next to nothing is divided by `EPS` once more.
        kept = call.save(output)
        return Record(
            output, [input], lambda s: [s], nonnegative=True, vanishing=True, saved_output=kept
        )
    z = call.save(output)
    return Record(
        output,
        [input],
        lambda s: [numerics.rectified([s], [z()])[0]],
        nonnegative=True,
        saved_output=z,
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
    r"""Dropout as in the published Vision Transformer mapping: the twin of the identity,
    :math:`2 x^+ s`, which lets relevance through where the activation is positive.

    Example:
        >>> mapping = get_mapping().extended({"dropout": DropoutRule()})
        >>> AbsLRP(nn.Sequential(nn.Linear(3, 2)), mapping).attribute(torch.rand(4, 3), 0).shape
        torch.Size([4, 3])
    """

    closed_forms: ClassVar[Mapping[str, Form]] = DROPOUTS
