"""Observers of the calls of a pass: whether values are finite, and where relevance goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import resolve_name

from captum_abslrp.engine.arguments import tensors_in
from captum_abslrp.engine.calls import Call
from captum_abslrp.engine.numerics import EPS, sums
from captum_abslrp.engine.saved import SavedTensor, in_full_precision


@dataclass
class Observer:
    """What is looked at while a model is explained.

    Args:
        finite: raise FloatingPointError at the first call that makes something that is not finite.
        traced: keep what is needed to tell the relevance at each call.
        repeated: whether this is a second look, so that nothing is warned about again.
    """

    finite: bool = False
    traced: bool = False
    repeated: bool = False
    calls: list[ObservedCall] = field(default_factory=list)
    """The calls on the way back, in its order, where they are traced."""

    def recorded(
        self, call: Call, rule: Any, sources: Sequence[Tensor], output: Tensor, batch_size: int
    ) -> ObservedCall:
        """Look at a call of the forward pass that a rule has answered."""
        if self.finite:
            _check_output(call, sources, output)
        return ObservedCall(
            self,
            str(call),
            resolve_name(call.func) or call.name,
            call.path,
            type(call.module).__name__,
            repr(rule),
            batch_size,
            SavedTensor(output.detach().clone()) if self.traced else None,
            [SavedTensor(source.detach().clone()) for source in sources] if self.traced else [],
        )


def _check_output(call: Call, sources: Sequence[Tensor], output: Tensor) -> None:
    # A mask may be of -inf, and so may be what it is added to.
    given = [t for t in (*tensors_in((call.args, call.kwargs)), *sources) if t.is_floating_point()]
    masked = any(bool(t.isinf().any()) for t in given)
    bad = output.isnan() if masked else ~output.isfinite()
    if not bool(bad.any()):
        return
    spoilt = any(bool(t.isnan().any()) for t in given)
    finite = [t.detach().abs().float().max().item() for t in given if t.numel() and not spoilt]
    of = (
        "an input or weight of it has NaN already"
        if spoilt
        else f"its inputs and weights are up to {max(finite, default=0):.3g} in magnitude"
    )
    raise FloatingPointError(
        f"Expected every call to return finite values, but got {int(bad.sum())} NaN or infinite ones "
        f"of {output.numel()} in {output.dtype} from {call}; {of}. Explain inputs in the range that the "
        f"model was made for, or compute in a wider dtype: `model.float()`, `model.double()`."
    )


@dataclass
class ObservedCall:
    """A call that is looked at again on the way back."""

    observer: Observer
    name: str
    call: str
    path: str
    layer: str
    rule: str
    batch_size: int
    output: SavedTensor | None
    sources: Sequence[SavedTensor]
    arrived: Tensor | None = None
    """What has arrived, of each seed and sample."""
    handed_on: Sequence[Tensor] = ()
    """What each source got, of each seed and sample."""

    def arrives(self, seeds: Sequence[Tensor], *, stabilized: bool) -> None:
        """What arrives, per magnitude of the output, for each seed."""
        self._check(seeds, "arrived at")
        if self.output is not None:
            magnitude = self.output().abs() + (EPS if stabilized else 0)
            self.arrived = torch.stack([sums(magnitude, s, self.batch_size) for s in seeds])

    def passes(self, of_seeds: Sequence[Sequence[Tensor]], *, stabilized: bool = False) -> None:
        """What is handed on, per magnitude of each source."""
        for shares in of_seeds:
            self._check(shares, "came out of")
        if self.output is None:
            return
        magnitudes = [kept().abs() + (EPS if stabilized else 0) for kept in self.sources]
        self.handed_on = [
            torch.stack(
                [sums(size, in_full_precision(shares[i]), self.batch_size) for shares in of_seeds]
            )
            for i, size in enumerate(magnitudes)
        ]
        self.observer.calls.append(self)

    def _check(self, values: Sequence[Tensor], what: str) -> None:
        if self.observer.finite and not all(bool(s.isfinite().all()) for s in values):
            raise FloatingPointError(
                f"Expected relevance to be finite, but got NaN or infinite values that {what} {self.name} "
                f"on the way back. Compute in a wider dtype: `model.float()`, `model.double()`."
            )

    def ends(self, seed: int, samples: Sequence[int]) -> bool:
        """Whether relevance of a seed arrived for one of the samples, and no source got any of it."""
        assert self.arrived is not None
        arrived = self.arrived[seed, samples] > 0
        passed = [share[seed, samples] > 0 for share in self.handed_on]
        return bool((arrived & ~torch.stack(passed).any(0)).any())
