"""Maxima: over windows, over axes, of two tensors."""

from __future__ import annotations

import inspect
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from captum_abslrp import functional
from captum_abslrp.forms.base import Form, check_batched
from captum_abslrp.interception import Call
from captum_abslrp.steps import Answer, Tail


def answer_max_pool(
    call: Call, input: Tensor, *args: Any, divides: bool = True, **kwargs: Any
) -> Answer:
    check_batched(call, input, int(call.name[-2]))
    with_indices = getattr(F, f"{call.name}_with_indices")
    bound = inspect.signature(with_indices).bind(input, *args, **kwargs)
    if bound.arguments.get("return_indices", False):
        raise TypeError(f"Expected max pooling without indices, but got {call}.")
    options = {key: value for key, value in bound.arguments.items() if key != "input"}

    def pool(x: Tensor) -> tuple[Tensor, Tensor]:
        maximum, indices = with_indices(x, **options)
        return maximum, indices

    output, indices = pool(input)
    x, at = call.keep(input), call.keep(indices)
    z = None if divides else call.keep(output)
    nonnegative = call.is_nonnegative(input)

    def propagate(s: Tensor) -> list[Tensor]:
        if z is not None:
            s.mul_(z().abs() + functional.EPS)
        return [functional.max_pool(x(), pool, at(), s, nonnegative=nonnegative)]

    def to_maximum(s: Tensor) -> list[Tensor]:
        return [functional.max_pool(x(), pool, at(), s, nonnegative=True)]

    return Answer(
        output,
        [input],
        propagate,
        nonnegative=nonnegative,
        keeps_sign=nonnegative,
        at_once=not divides,
        tail=Tail(to_maximum, call.keep(output), [x], keeps_sign=True),
    )


MAX_POOLS: dict[str, Form] = dict.fromkeys(
    "max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d "
    "adaptive_max_pool3d".split(),
    answer_max_pool,
)
