"""Tails of the score: rules for calls after the last layer with weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from captum_abslrp.engine import numerics
from captum_abslrp.engine.numerics import EPS
from captum_abslrp.engine.saved import SavedTensor
from captum_abslrp.engine.tape import Tail


def tail_of(
    output: SavedTensor,
    inputs: Sequence[SavedTensor],
    share: Callable[[Tensor], Sequence[Tensor]],
    *,
    keeps_sign: bool = False,
) -> Tail:
    """Create a tail from a function that maps relevance of the output to relevance of each input."""

    def propagate(s: Tensor) -> list[Tensor]:
        relevance = numerics.relevance(output().abs() + EPS, s)
        return [
            r / (x().abs() + EPS).clamp(max=torch.finfo(r.dtype).max)
            for r, x in zip(share(relevance), inputs, strict=True)
        ]

    return Tail(propagate, output, inputs, keeps_sign=keeps_sign)


def scaled_tail(output: SavedTensor, factor: Callable[[], Tensor | float]) -> Tail:
    """Create the tail of a product with a constant: relevance passes with the sign of the constant."""

    def propagate(s: Tensor) -> list[Tensor]:
        c = torch.as_tensor(factor(), dtype=s.dtype, device=s.device)
        size = output().abs()
        of_input = size / c.abs().clamp(min=torch.finfo(s.dtype).tiny)
        return [s * c.sign() * ((size + EPS) / (of_input + EPS))]

    return Tail(propagate, output, factor=factor)


def passed_on(
    output: SavedTensor, input: SavedTensor, sign: Callable[[], Tensor | float] | None = None
) -> Tail:
    """Create the tail of an elementwise call: relevance passes with the sign of the slope.

    ``sign`` is None if no slope is negative.
    """
    if sign is None:
        return tail_of(output, [input], lambda relevance: [relevance], keeps_sign=True)
    return tail_of(output, [input], lambda relevance: [relevance * sign()])
