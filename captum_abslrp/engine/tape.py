"""The tape: what a rule records for a call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from captum_abslrp.engine import numerics
from captum_abslrp.engine.saved import SavedTensor

Totals = Sequence[Tensor] | None
"""The sum of the magnitudes of relevance of each sample, (B,), for each seed; None where it is not known."""

Propagate = Callable[[Tensor], Sequence[Tensor]]
"""From relevance per magnitude of the output to that of each input. Where it is scaled afterwards, a factor
that all inputs share may be left out. The argument may be overwritten, and what is returned will be."""


class Record(NamedTuple):
    """What a rule makes of a call."""

    output: Tensor
    """The result of the call, without history."""
    inputs: Sequence[Tensor]
    """The inputs of the call that receive relevance."""
    propagate: Propagate
    """Maps relevance per magnitude of the output to that of each input; runs once per seed."""
    scaled: bool = True
    """Whether the relevance of each sample is scaled afterwards, so that the sum of its magnitudes is the
    total, or with ``"joint"`` that of what arrived. A rule of another family, or one that only passes
    relevance, says no."""
    constants: Sequence[Tensor] = ()
    """Arguments that depend on the explained inputs, too, and are constants of this call."""
    nonnegative: bool = False
    """Whether no negative entry of the output takes part in what comes after, because there is none, or the
    rule passes nothing where the output is negative. The rules of later calls may make use of it."""
    vanishing: bool = False
    """Whether the output may be next to nothing where the input is not (softmax, GELU at -6). Its relevance
    is divided by ``|z| + EPS`` there, as in the definition, which leaves nothing of it."""
    keeps_sign: bool = False
    """Whether the rule passes nothing negative where nothing negative arrives."""
    saved_output: SavedTensor | None = None
    """The output, saved by ``Call.save_output`` or otherwise."""
    all_seeds: bool = False
    """Whether `propagate` takes a list of all seeds, and returns a list of what it would for each."""
    scale_now: bool = False
    """Whether relevance must be scaled at once, because the rule takes it out of its range."""
    conserves: bool = False
    """Whether a call with one input, whose relevance is not scaled, passes on the magnitude of all of it."""
    adds_total: bool = False
    """Whether `propagate` returns, behind what each input gets, the sum of magnitudes of each sample that
    all inputs together stand for, (B,), where some of it ends inside of the call."""
    spares_zeros: bool = False
    """Whether entries of the inputs that are zero get no relevance, wherever it arrives."""
    without_zeros: Propagate | None = None
    """A faster `propagate` for where no relevance arrives at entries of zero. Then none of it goes to such
    entries of the inputs, either."""
    saved_inputs: Sequence[SavedTensor] | None = None
    """The inputs as they were, where the call has changed one of them in place."""
    tail: Tail | None = None
    """What the call does on the tail of the score; None if the tail ends before it."""
    logits: SavedTensor | None = None
    """The input, where the output holds probabilities of it (softmax, sigmoid)."""
    layer: Any = None
    """The call by its parts and its rule, if it is a layer with weights that a later call may fold into."""


class Tail(NamedTuple):
    """A call on the tail of the score: between the last layer with weights and the output.

    The score itself is explained, so all of its relevance arrives at the last layer with weights. The calls
    behind it pass relevance by the share of the magnitudes of their inputs, with the sign of their slope.
    """

    propagate: Propagate
    """From relevance over magnitude of the output, ``R / (|z| + EPS)``, to that of each input."""
    output: SavedTensor
    inputs: Sequence[SavedTensor] | None = None
    """The inputs; None where the call scales its only input by `factor`."""
    factor: Callable[[], Tensor | float] | None = None
    keeps_sign: bool = False
    """Whether nonnegative relevance of the output makes nonnegative relevance of the inputs."""

    def change(self, s: Tensor, shares: Sequence[Tensor], batch_size: int) -> Tensor:
        """By how much the sum of the relevance of each sample changes, because signs do."""
        relevance = numerics.relevance(self.output(), s)
        if self.inputs is None:
            assert self.factor is not None
            factor = torch.as_tensor(self.factor(), dtype=s.dtype, device=s.device)
            change = relevance * (factor.sign() - 1)
            return change.reshape(batch_size, -1).sum(1)
        found = [numerics.relevance(x(), r) for x, r in zip(self.inputs, shares, strict=True)]
        sums = [r.reshape(batch_size, -1).sum(1) for r in (relevance, *found)]
        return torch.stack(sums[1:]).sum(0) - sums[0]
