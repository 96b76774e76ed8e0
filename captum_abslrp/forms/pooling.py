"""Maxima: over windows, over axes, of two tensors."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from captum_abslrp import functional
from captum_abslrp.forms.base import Form, check_batched
from captum_abslrp.interception import Answer, Call


def answer_max_pool(
    call: Call, input: Tensor, *args: Any, divides: bool = True, **kwargs: Any
) -> Answer:
    check_batched(call, input, int(call.name[-2]))
    output = call.run(lambda: call.func(input, *args, **kwargs))
    if not isinstance(output, Tensor):
        raise TypeError(f"Expected max pooling without indices, but got {call}.")
    x = call.keep(input)
    z = None if divides else call.keep(output)
    nonnegative = call.is_nonnegative(input)

    def pool(x: Tensor) -> Tensor:
        result: Tensor = call.func(x, *args, **kwargs)
        return result

    def propagate(s: Tensor) -> list[Tensor]:
        given = s if z is None else s * (z().abs() + functional.EPS)
        return [functional.max_pool(x(), pool, given, nonnegative=nonnegative)]

    return Answer(output, [input], propagate, nonnegative=nonnegative)


MAX_POOLS: dict[str, Form] = dict.fromkeys(
    "max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d "
    "adaptive_max_pool3d".split(),
    answer_max_pool,
)
