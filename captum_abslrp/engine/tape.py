"""The tape: records of calls by rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from captum_abslrp.engine import numerics
from captum_abslrp.engine.saved import SavedTensor

Totals = Sequence[Tensor] | None
"""The sum of the magnitudes of relevance of each sample, (B,), for each seed; None if it is unknown."""

Propagate = Callable[[Tensor], Sequence[Tensor]]
"""Maps relevance per magnitude of the output to that of each input. If the result is scaled afterwards, a
factor that all inputs share can be omitted. The function may overwrite its argument, and its results will be
overwritten."""


class Record(NamedTuple):
    """The record of a call by its rule."""

    output: Tensor
    """The result of the call, without autograd history."""
    inputs: Sequence[Tensor]
    """The inputs of the call that receive relevance."""
    propagate: Propagate
    """Maps relevance per magnitude of the output to that of each input; runs once per seed."""
    scaled: bool = True
    """Whether the relevance of each sample is scaled afterwards, such that the sum of its magnitudes is the
    total or, with ``"joint"``, that of the output. False for other families of rules, and for rules that only
    pass relevance on."""
    constants: Sequence[Tensor] = ()
    """Arguments that depend on the explained inputs, but are constants of this call."""
    nonnegative: bool = False
    """Whether later calls can ignore negative entries of the output, because there are none, or because the
    rule passes on no relevance where the output is negative."""
    vanishing: bool = False
    """Whether the output may be tiny where the input is not (softmax, GELU at -6). Its relevance is then
    divided by ``|z| + EPS``, as in the definition, and nearly vanishes."""
    keeps_sign: bool = False
    """Whether the relevance of the inputs is nonnegative if that of the output is."""
    saved_output: SavedTensor | None = None
    """The output, saved by ``Call.save_output`` or otherwise."""
    all_seeds: bool = False
    """Whether `propagate` takes a list of all seeds and returns a list with the result for each seed."""
    scale_now: bool = False
    """Whether relevance must be scaled immediately, because the rule changes its order of magnitude."""
    conserves: bool = False
    """Whether a call with one input, whose relevance is not scaled, conserves the sum of magnitudes."""
    adds_total: bool = False
    """Whether `propagate` also returns, after the relevance of each input, the sum of magnitudes that all
    inputs together represent, (B,), because some relevance ends inside the call."""
    spares_zeros: bool = False
    """Whether zero entries of the inputs never get relevance."""
    without_zeros: Propagate | None = None
    """A faster `propagate` for the case that zero entries of the output have no relevance. Zero entries of
    the inputs then get no relevance either."""
    saved_inputs: Sequence[SavedTensor] | None = None
    """The original inputs, if the call has modified one of them in place."""
    tail: Tail | None = None
    """The rule of the call on the tail of the score; None if the tail ends before the call."""
    logits: SavedTensor | None = None
    """The input, if the output consists of its probabilities (softmax, sigmoid)."""
    layer: Any = None
    """The layer and its rule, if it has weights and a later call may be folded into it."""


class Tail(NamedTuple):
    """A call on the tail of the score: between the last layer with weights and the output.

    The score itself is explained, so all of its relevance has to reach the last layer with weights. The calls
    after this layer distribute relevance by the magnitudes of their inputs, with the sign of their slope.
    """

    propagate: Propagate
    """Maps relevance per magnitude of the output, ``R / (|z| + EPS)``, to that of each input."""
    output: SavedTensor
    inputs: Sequence[SavedTensor] | None = None
    """The inputs; None if the call scales its only input by `factor`."""
    factor: Callable[[], Tensor | float] | None = None
    keeps_sign: bool = False
    """Whether the relevance of the inputs is nonnegative if that of the output is."""

    def change(self, s: Tensor, shares: Sequence[Tensor], batch_size: int) -> Tensor:
        """Return the change of the sum of relevance of each sample due to negative slopes."""
        relevance = numerics.relevance(self.output(), s)
        if self.inputs is None:
            assert self.factor is not None
            factor = torch.as_tensor(self.factor(), dtype=s.dtype, device=s.device)
            change = relevance * (factor.sign() - 1)
            return change.reshape(batch_size, -1).sum(1)
        found = [numerics.relevance(x(), r) for x, r in zip(self.inputs, shares, strict=True)]
        sums = [r.reshape(batch_size, -1).sum(1) for r in (relevance, *found)]
        return torch.stack(sums[1:]).sum(0) - sums[0]
