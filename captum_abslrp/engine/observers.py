"""Observers of the calls of a model, in the forward and the backward pass of an explanation.

The engine passes every recorded call to an :class:`Observer`. The :class:`ObservedCall` that it returns
receives the relevance of the output and of the inputs of the call.

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
    """Observes every call while a model is explained.

    Args:
        finite: raise FloatingPointError at the first call with a value that is not finite.
        traced: measure the relevance of the output and the inputs of each call.
        repeated: whether the pass repeats an earlier one, so that warnings are not repeated.
    """

    finite: bool = False
    traced: bool = False
    repeated: bool = False
    calls: list[ObservedCall] = field(default_factory=list)
    """The calls of the backward pass, in order, if they are traced."""

    def recorded(
        self, call: Call, rule: Any, sources: Sequence[Tensor], output: Tensor, batch_size: int
    ) -> ObservedCall:
        """Observe a recorded call of the forward pass.

        Args:
            call: the call.
            rule: its rule.
            sources: the inputs that receive relevance.
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
    """Raise if the output of a call is not finite."""
    # A mask may contain -inf, and so may the tensor that it is added to.
    given = [t for t in (*tensors_in((call.args, call.kwargs)), *sources) if t.is_floating_point()]
    masked = any(bool(t.isinf().any()) for t in given)
    bad = output.isnan() if masked else ~output.isfinite()
    if not bool(bad.any()):
        return
    has_nan = any(bool(t.isnan().any()) for t in given)
    finite = [t.detach().abs().float().max().item() for t in given if t.numel() and not has_nan]
    of = (
        "one of its inputs or weights already has NaN"
        if has_nan
        else f"its inputs and weights are up to {max(finite, default=0):.3g} in magnitude"
    )
    raise FloatingPointError(
        f"Expected every call to return finite values, but got {int(bad.sum())} NaN or infinite values "
        f"out of {output.numel()} in {output.dtype} from {call}; {of}. Pass inputs in the range that the "
        f"model expects, or use a wider dtype: `model.float()` or `model.double()`."
    )


@dataclass
class ObservedCall:
    """A call whose relevance is observed in the backward pass."""

    observer: Observer
    place: str
    """The function and its module, for messages."""
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
        """Observe the relevance per magnitude of the output, for each seed."""
        self._check(seeds, "of the output")
        if self.output is not None:
            magnitude = self.output().abs() + (EPS if stabilized else 0)
            self.arrived = torch.stack([sums(magnitude, s, self.batch_size) for s in seeds])

    def passes(self, of_seeds: Sequence[Sequence[Tensor]], *, stabilized: bool = False) -> None:
        """Observe the relevance per magnitude of each source, for each seed."""
        for shares in of_seeds:
            self._check(shares, "of an input")
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
                f"Expected relevance to be finite, but got NaN or infinite values {what} of {self.place} in "
                f"the backward pass. Use a wider dtype: `model.float()` or `model.double()`."
            )

    def ends(self, seed: int, samples: Sequence[int]) -> bool:
        """Whether one of the samples has relevance of a seed at the output, but not at any source."""
        assert self.arrived is not None
        arrived = self.arrived[seed, samples] > 0
        passed = [share[seed, samples] > 0 for share in self.passed]
        return bool((arrived & ~torch.stack(passed).any(0)).any())
