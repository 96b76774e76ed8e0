"""The rule of softmax."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from captum_abslrp.engine.calls import Call
from captum_abslrp.engine.numerics import EPS, LEAST
from captum_abslrp.engine.tape import Record
from captum_abslrp.rules.base import Form, multiplied
from captum_abslrp.rules.tails import passed_on


def softmax(x: Tensor, probabilities: Tensor, dim: int) -> Tensor:
    r"""Compute the factor of softmax; maximum and denominator are constants of the call.

    :math:`R_{in} = (x p + |x| \, \mathrm{softmax}(|x|)) \, s`, per magnitude
    :math:`k = \mathrm{sign}(x) p + \mathrm{softmax}(|x|)`. Masked entries, whose probability is at most
    ``EPS``, are ignored; if all entries are masked, relevance is zero. ``probabilities`` are
    ``p = softmax(x)`` over ``dim``.

    Example:
        >>> x = torch.tensor([0.0, -float("inf"), 1.0])
        >>> softmax(x, x.softmax(0), 0)
        tensor([0.0000, -0.0000, 1.4621])
    """
    shares = probabilities.nan_to_num()

    def unmasked(values: Tensor) -> Tensor:
        result: Tensor = torch.ops.aten.threshold_backward(values, shares, EPS)
        return result

    # Masked entries count as zero here. The division below removes them from the denominator.
    twin_part = unmasked(unmasked(x.abs()).softmax(dim))
    twin_part /= twin_part.sum(dim, keepdim=True).clamp_(min=LEAST)
    sign = x.sign()
    return unmasked(shares).addcmul_(twin_part, sign).mul_(sign)


def record_softmax(
    call: Call,
    input: Tensor,
    dim: int | None = None,
    *options: Any,
    dtype: torch.dtype | None = None,
    _stacklevel: int = 3,
) -> Record:
    # F.softmax(x, dim, _stacklevel, dtype); torch.softmax(x, dim, dtype)
    dtype = next((o for o in options if isinstance(o, torch.dtype)), dtype)
    if dim is None:
        raise ValueError(
            f"Expected softmax to be called with a dimension, but got {call} without one. Pass `dim`."
        )
    output = call.run(lambda: torch.softmax(input, dim, dtype=dtype))
    x = call.save(input)
    p = call.save_output(output, lambda: torch.softmax(x(), dim))
    return multiplied(
        output,
        input,
        lambda: softmax(x(), p(), dim),
        nonnegative=True,
        vanishing=True,
        saved_output=p,
        tail=passed_on(p, x),
        logits=x,
    )


SOFTMAX: dict[str, Form] = {"softmax": record_softmax}
