"""Observers: what looks at the calls of a model, forward and back, while it is explained.

The engine gives an :class:`Observer` every call that a rule has recorded; the :class:`ObservedCall` that it
returns is given the relevance that arrives at the call and the relevance that the call passes on.

Axes: B samples, S seeds.
"""

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
    """Looks at every call while a model is explained.

    Args:
        finite: raise FloatingPointError at the first call that makes a value that is not finite.
        traced: measure the relevance that arrives at each call and that it passes on.
        repeated: whether the pass repeats an earlier one, so that no warning is given again.
    """

    finite: bool = False
    traced: bool = False
    repeated: bool = False
    calls: list[ObservedCall] = field(default_factory=list)
    """The calls of the backward pass in its order, where they are traced."""

    def recorded(
        self, call: Call, rule: Any, sources: Sequence[Tensor], output: Tensor, batch_size: int
    ) -> ObservedCall:
        """Look at a call of the forward pass that a rule has recorded.

        Args:
            call: the call.
            rule: its rule.
            sources: the inputs that get relevance.
            output: its output.
            batch_size: B.
        """
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
    """Raise where the output of a call is not finite."""
    # A mask may be of -inf, and so may be what it is added to.
    given = [t for t in (*tensors_in((call.args, call.kwargs)), *sources) if t.is_floating_point()]
    masked = any(bool(t.isinf().any()) for t in given)
    bad = output.isnan() if masked else ~output.isfinite()
    if not bool(bad.any()):
        return
    has_nan = any(bool(t.isnan().any()) for t in given)
    finite = [t.detach().abs().float().max().item() for t in given if t.numel() and not has_nan]
    of = (
        "an input or weight of it has NaN already"
        if has_nan
        else f"its inputs and weights are up to {max(finite, default=0):.3g} in magnitude"
    )
    raise FloatingPointError(
        f"Expected every call to return finite values, but got {int(bad.sum())} NaN or infinite ones "
        f"of {output.numel()} in {output.dtype} from {call}; {of}. Explain inputs in the range that the "
        f"model was made for, or compute in a wider dtype: `model.float()`, `model.double()`."
    )


@dataclass
class ObservedCall:
    """A call whose relevance is looked at in the backward pass."""

    observer: Observer
    place: str
    """The function and where it is called, for messages."""
    function: str
    """Qualified name of the function."""
    path: str
    """The module that made the call."""
    layer: str
    """The type of this module."""
    rule: str
    batch_size: int
    output: SavedTensor | None
    sources: Sequence[SavedTensor]
    arrived: Tensor | None = None
    """Relevance of the output, (S, B)."""
    passed: Sequence[Tensor] = ()
    """Relevance of each source, (S, B)."""

    def arrives(self, seeds: Sequence[Tensor], *, stabilized: bool) -> None:
        """Look at the relevance per magnitude of the output, of each seed."""
        self._check(seeds, "arrived at")
        if self.output is not None:
            magnitude = self.output().abs() + (EPS if stabilized else 0)
            self.arrived = torch.stack([sums(magnitude, s, self.batch_size) for s in seeds])

    def passes(self, of_seeds: Sequence[Sequence[Tensor]], *, stabilized: bool = False) -> None:
        """Look at the relevance per magnitude of each source, of each seed."""
        for shares in of_seeds:
            self._check(shares, "came out of")
        if self.output is None:
            return
        magnitudes = [kept().abs() + (EPS if stabilized else 0) for kept in self.sources]
        self.passed = [
            torch.stack(
                [sums(size, in_full_precision(shares[i]), self.batch_size) for shares in of_seeds]
            )
            for i, size in enumerate(magnitudes)
        ]
        self.observer.calls.append(self)

    def _check(self, values: Sequence[Tensor], what: str) -> None:
        if self.observer.finite and not all(bool(s.isfinite().all()) for s in values):
            raise FloatingPointError(
                f"Expected relevance to be finite, but got NaN or infinite values that {what} {self.place} "
                f"in the backward pass. Compute in a wider dtype: `model.float()`, `model.double()`."
            )

    def ends(self, seed: int, samples: Sequence[int]) -> bool:
        """Whether relevance of a seed arrived for one of the samples, and no source got any of it."""
        assert self.arrived is not None
        arrived = self.arrived[seed, samples] > 0
        passed = [share[seed, samples] > 0 for share in self.passed]
        return bool((arrived & ~torch.stack(passed).any(0)).any())
