"""Elementwise products and quotients."""

from __future__ import annotations

from collections.abc import Callable
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
    nonnegative = call.is_nonnegative(input, other)
    if _is_scalar(input, other):
        input, other = other, input
    if _is_scalar(other, input):
        x, factor = call.save(input), _saved(call, other)
        record = passed(call, output, [input], factor, nonnegative=nonnegative)
        return record._replace(saved_output=call.save_output(output, lambda: x() * factor()))
    a, b, z = call.save(input), call.save(other), call.save(output)
    wanted = [is_source(t) for t in (input, other)]

    @once
    def factors() -> list[Tensor]:
        return [diagonal(x(), y()) for x, y in compress([(a, b), (b, a)], wanted)]

    if all(wanted):  # half for each factor, even if the product is negative
        shapes = input.shape, other.shape
        tail = tail_of(
            z, [a, b], lambda r: [(r / 2).sum_to_size(shape) for shape in shapes], keeps_sign=True
        )
    else:
        tail = scaled_tail(z, b if wanted[0] else a)
    return Record(
        output,
        list(compress([input, other], wanted)),
        lambda s: [s * factor for factor in factors()],
        nonnegative=nonnegative,
        keeps_sign=True,
        tail=tail,
    )


def record_division(call: Call, input: Any, other: Any, *, rounding_mode: str | None = None) -> Any:
    """Record a division; the divisor is a constant of the call, even if it depends on the inputs."""
    output = call.run(lambda: torch.div(input, other, rounding_mode=rounding_mode))
    if rounding_mode is not None or not is_source(input):
        return output
    nonnegative = call.is_nonnegative(input, other)
    divisor = _saved(call, other)
    if _is_scalar(other, input):
        return passed(call, output, [input], lambda: 1 / divisor(), nonnegative=nonnegative)
    x = call.save(input)
    factor = once(lambda: diagonal(x(), divisor().reciprocal()))
    return Record(
        output,
        [input],
        lambda s: [s.mul_(factor())],
        constants=[other] if is_source(other) else [],
        nonnegative=nonnegative,
        keeps_sign=True,
        tail=scaled_tail(call.save(output), lambda: divisor().reciprocal()),
    )


def _is_scalar(value: Any, other: Any) -> bool:
    """Whether multiplying by a value is scaling by a constant, regardless of the batch size."""
    if not isinstance(value, Tensor):
        return True
    if is_source(value):  # the other factor may be a number
        return False
    return value.dim() == 0 or (value.numel() == 1 and value.dim() < other.dim())


def _saved(call: Call, value: Any) -> Callable[[], Any]:
    return call.save(value) if isinstance(value, Tensor) else partial(float, value)


PRODUCTS: dict[str, Form] = {"mul": record_product, "div": record_division}
