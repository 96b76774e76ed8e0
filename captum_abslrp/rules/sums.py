"""Sums and differences of two tensors."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from functools import partial
from itertools import compress
from typing import Any, ClassVar

import torch
from torch import Tensor

from captum_abslrp.engine import numerics
from captum_abslrp.engine.arguments import on_host
from captum_abslrp.engine.calls import Call
from captum_abslrp.engine.dependence import is_source
from captum_abslrp.engine.tape import Record
from captum_abslrp.rules.base import Form, Rule, once, passed
from captum_abslrp.rules.tails import scaled_tail, tail_of

MASKED = -100.0
"""Summands of at most this value count as masks: softmax maps a masked logit to zero."""


def record_addition(call: Call, input: Any, other: Any, *, alpha: float = 1) -> Record:
    arguments, summands = (input, other), (input, other if alpha == 1 else other * alpha)
    wanted = [is_source(a) for a in arguments]
    inputs = list(compress(arguments, wanted))
    constants = [s for s, is_input in zip(summands, wanted, strict=True) if not is_input]
    signs = list(compress([1.0, math.copysign(1.0, alpha)], wanted))
    factor = abs(alpha) if wanted[1] else 1.0
    is_mask = _is_mask(constants[0]) if constants else False
    if is_mask is True:
        output = call.run(lambda: operator.add(*summands))
        record = passed(call, output, inputs, lambda: factor)
        return record._replace(tail=scaled_tail(call.save(output), lambda: factor * signs[0]))
    nonnegative = call.is_nonnegative(*summands)
    kept = [call.save(s) for s in compress(summands, wanted)]
    saved_inputs = [
        k if argument is summand else call.save(argument)
        for k, argument, summand in zip(kept, inputs, compress(summands, wanted), strict=True)
    ]
    constant = [call.save(c) if isinstance(c, Tensor) else partial(float, c) for c in constants]
    overwritten = _add_in_place(call, *summands)
    output = call.run(lambda: operator.add(*summands)) if overwritten is None else overwritten

    def values() -> list[Any]:
        return [value() for value in (*kept, *constant)]

    z = call.save_output(output, lambda: operator.add(*values()))
    cancels = call.name == "sub" or any(c < 0 for c in constants if not isinstance(c, Tensor))
    least = numerics.rounding(output.dtype)  # no closure may hold the output, see `Step.output`

    @once
    def noise() -> Tensor:
        """Elements of a difference that are rounding errors of the summands."""
        largest = torch.maximum(*(torch.as_tensor(v).abs() for v in values()))
        return z().abs() <= least * largest

    def propagate(s: Tensor) -> list[Tensor]:
        if is_mask is not False:  # a tensor on a device
            return [torch.where(is_mask, s, numerics.rectify(s, kept[0]()))]
        if cancels:
            s = s.masked_fill(noise(), 0)
        seeds = [s.sum_to_size(x().shape) for x in kept]
        if factor != 1:
            seeds[-1] = seeds[-1] * factor
        return numerics.rectified(seeds, [x() for x in kept])

    def share(relevance: Tensor) -> list[Tensor]:
        if len(kept) == 1:
            return [(relevance * signs[0]).sum_to_size(kept[0]().shape)]
        sizes = [numerics.magnitude(x()) for x in kept]
        if signs[1] < 0 and sizes[1].numel() < relevance.numel() == sizes[0].numel():
            # A value that is subtracted from a whole row, as in an explicit softmax, affects all classes
            # alike.
            return [relevance, torch.zeros_like(sizes[1])]
        whole = sizes[0] + sizes[1]
        parts = (relevance / whole).masked_fill_(whole == 0, 0)
        pairs = zip(sizes, signs, strict=True)
        return [(parts * size * sign).sum_to_size(size.shape) for size, sign in pairs]

    return Record(
        output,
        inputs,
        propagate,
        nonnegative=nonnegative,
        keeps_sign=True,
        saved_inputs=saved_inputs,
        tail=tail_of(z, saved_inputs, share, keeps_sign=min(signs) > 0),
    )


def record_subtraction(call: Call, input: Any, other: Any, *, alpha: float = 1) -> Record:
    return record_addition(call, input, other, alpha=-alpha)


def _add_in_place(call: Call, target: Any, other: Any) -> Tensor | None:
    """Add in place and return the target, or return None if this is not possible."""
    if call.target is None or call.target is not target or target._is_view() or target.is_leaf:
        return None
    if isinstance(other, Tensor):
        fits = torch.broadcast_shapes(target.shape, other.shape) == target.shape
        kept = torch.promote_types(target.dtype, other.dtype) == target.dtype
        apart = target.untyped_storage()._cdata != other.untyped_storage()._cdata
        if not (fits and kept and apart and target.device == other.device):
            return None
    call.recording.release(target)
    return target.add_(other)


def _is_mask(value: Any) -> bool | Tensor:
    """Whether a constant contains only 0 and large negative values; a tensor if the value is on a device."""
    if not isinstance(value, Tensor):
        return bool(value == 0)
    if value.is_meta:  # inspected without values
        return False
    is_mask = ((value == 0) | (value <= MASKED)).all()
    known = on_host(is_mask)  # avoids a synchronization
    return is_mask if known is None else known


def record_head_sum(call: Call, input: Any, other: Any) -> Record:
    if not (is_source(input) and is_source(other)):
        return record_addition(call, input, other)
    output = call.run(lambda: torch.add(input, other))
    return Record(output, [input, other], lambda s: [s, s])


SUMS: dict[str, Form] = {"add": record_addition, "sub": record_subtraction}


class HeadSumRule(Rule):
    r"""The rule for the sum of the outputs of two linear heads (distilled DeiT).

    The summands get :math:`|x| s` and :math:`|y| s`. The rule treats the two heads as one linear layer on
    both inputs. It looks for positive contributions in the inputs of the heads, so that a class with two
    negative logits can be explained. No mapping of this package needs it, because sums on the tail of the
    score already distribute relevance in this way.

    Example:
        >>> mapping = get_mapping().extended({At("", call="add"): HeadSumRule()})
        >>> AbsLRP(nn.Sequential(nn.Linear(3, 2)), mapping).attribute(torch.rand(4, 3), 0).shape
        torch.Size([4, 3])
    """

    closed_forms: ClassVar[Mapping[str, Form]] = {**SUMS, "add": record_head_sum}
