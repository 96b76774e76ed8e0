"""Elementwise products and quotients."""

from __future__ import annotations

from functools import partial
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from captum_abslrp.engine.calls import Call
from captum_abslrp.engine.dependence import is_source
from captum_abslrp.engine.tape import Record
from captum_abslrp.rules.base import Form, once, passed
from captum_abslrp.rules.contributions import diagonal
from captum_abslrp.rules.tails import scaled_tail, tail_of


def record_product(call: Call, input: Any, other: Any) -> Record:
    output = call.run(lambda: input * other)
    inputs = [t for t in (input, other) if is_source(t)]
    nonnegative = call.is_nonnegative(input, other)
    for value, against in ((input, other), (other, input)):
        if _is_scalar(value, against):
            record = _record_scaled(call, output, value, against)
            return record._replace(nonnegative=nonnegative)
    a, b = call.save(input), call.save(other)
    wanted = [is_source(t) for t in (input, other)]

    @once
    def factors() -> list[Tensor]:
        pairs = compress(((a(), b()), (b(), a())), wanted)
        return [diagonal(x, y) for x, y in pairs]

    def propagate(s: Tensor) -> list[Tensor]:
        return [s * factor for factor in factors()]

    z = call.save(output)
    if len(inputs) == 1:
        tail = scaled_tail(z, b if is_source(input) else a)
    else:  # half for each factor, also where the product is negative
        shapes = [t.shape for t in (input, other)]
        tail = tail_of(
            z, [a, b], lambda r: [(r / 2).sum_to_size(shape) for shape in shapes], keeps_sign=True
        )
    return Record(output, inputs, propagate, nonnegative=nonnegative, keeps_sign=True, tail=tail)


def _record_scaled(call: Call, output: Tensor, value: Any, input: Tensor) -> Record:
    """The product with a constant that all elements share."""
    factor = call.save(value) if isinstance(value, Tensor) else partial(float, value)
    x = call.save(input)
    kept = call.save_output(output, lambda: x() * factor())
    return passed(call, output, [input], factor)._replace(saved_output=kept)


def record_division(call: Call, input: Any, other: Any, *, rounding_mode: str | None = None) -> Any:
    """The divisor is a constant of the call, also where it depends on the data."""
    output = call.run(lambda: torch.div(input, other, rounding_mode=rounding_mode))
    if rounding_mode is not None or not is_source(input):
        return output
    nonnegative = call.is_nonnegative(input, other)
    if _is_scalar(other, input):
        divisor = call.save(other) if isinstance(other, Tensor) else partial(float, other)
        return passed(call, output, [input], lambda: 1 / divisor(), nonnegative=nonnegative)
    x, c = call.save(input), call.save(other)
    factor = once(lambda: diagonal(x(), c().reciprocal()))
    return Record(
        output,
        [input],
        lambda s: [s.mul_(factor())],
        constants=[other] if is_source(other) else [],
        nonnegative=nonnegative,
        keeps_sign=True,
        tail=scaled_tail(call.save(output), lambda: c().reciprocal()),
    )


def _is_scalar(value: Any, other: Any) -> bool:
    """Whether multiplying by a value is scaling by a constant, whatever the batch size."""
    if not isinstance(value, Tensor):
        return True
    if is_source(value):  # the other one may be a number
        return False
    return value.dim() == 0 or (value.numel() == 1 and value.dim() < other.dim())


PRODUCTS: dict[str, Form] = {"mul": record_product, "div": record_division}
