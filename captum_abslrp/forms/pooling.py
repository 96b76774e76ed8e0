"""Maxima: over windows, over axes, of two tensors."""

from __future__ import annotations

import inspect
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from captum_abslrp import functional
from captum_abslrp.forms.base import Form, check_batched
from captum_abslrp.functional import divide
from captum_abslrp.interception import Answer, Call


def answer_max_pool(
    call: Call, input: Tensor, *args: Any, divides: bool = True, **kwargs: Any
) -> Answer:
    check_batched(call, input, int(call.name[-2]))
    with_indices = getattr(F, f"{call.name}_with_indices")
    bound = inspect.signature(with_indices).bind(input, *args, **kwargs)
    bound.arguments["return_indices"] = True
    options = {key: value for key, value in bound.arguments.items() if key != "input"}

    def pool(x: Tensor) -> tuple[Tensor, Tensor]:
        maximum, indices = with_indices(x, **options)
        return maximum, indices

    output = call.run(lambda: call.func(input, *args, **kwargs))
    if not isinstance(output, Tensor):
        raise TypeError(f"Expected max pooling without indices, but got {call}.")
    x, z = call.keep(input), call.keep(output)
    return Answer(
        output,
        [input],
        lambda relevance: [
            functional.max_pool(x(), pool, divide(relevance, z()) if divides else relevance)
        ],
    )


MAX_POOLS: dict[str, Form] = dict.fromkeys(
    "max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d "
    "adaptive_max_pool3d".split(),
    answer_max_pool,
)
